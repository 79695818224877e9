"""Stage one: run the teacher once over the corpus and write down what it believes.

Never loads a student. The shard is the unit of work: its batches are always the same ones, so a
run that was killed and went on leaves the same bytes as one that was not.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..data.alignment import labels
from ..data.errors import ColdstillError
from ..data.files import write_json
from ..data.manifest import CorpusIdentity, Manifest, Packing, TeacherIdentity
from ..data.order import uniform
from ..data.schema import Block, Targets
from ..data.writer import StoreWriter
from .device import describe_machine, peak_memory
from .feed import flat_positions
from .isolation import model_inputs
from .models import context_length, tokenizer_identity
from .report import Report, Reporter, silent
from .selection import select, to_targets
from .speed import forward_speed

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from ..data.commit import Commit
    from ..data.prepared import CorpusRecord, SequenceFile, Split
    from ..data.schema import Capture, Sequences
    from .isolation import Isolation
    from .output_head import OutputHead
    from .selection import Selected

STAGE = "teacher-logits"
RARE_SEPARATOR = 1e-3
"""Below this mean probability the teacher does not know the separator: it was never trained to end
a document that way, and the student would learn nonsense there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptureJob:
    """Everything one split's capture needs."""

    split: Split
    head: OutputHead
    """The teacher, split at its head."""
    teacher: TeacherIdentity
    tokenizer: Any
    isolation: Isolation
    corpus: CorpusRecord
    sequences: SequenceFile
    rows: np.ndarray[Any, Any]
    """Which of the split's sequences are captured, increasing."""
    capture: Capture
    sequence_length: int
    shard_tokens: int
    batch_tokens: int
    codec: dict[str, Any]
    store: dict[str, Any]
    folder: Path


def chosen_rows(available: int, wanted: int | None, seed: int) -> np.ndarray[Any, Any]:
    """The sequences to capture: all, or a seeded sample of them in corpus order."""
    if wanted is None or wanted >= available:
        return np.arange(available)
    random = np.random.Generator(np.random.PCG64([seed, 1]))
    return np.sort(random.choice(available, wanted, replace=False))


def make_manifest(job: CaptureJob) -> Manifest:
    """What the store will say of itself; a function of the job alone.

    Raises
        ColdstillError: a head or tail that the vocabulary cannot give, or a sequence longer than
            the teacher's context
    """
    tokenizer = tokenizer_identity(job.tokenizer)
    capture, size = job.capture, tokenizer.size
    if capture.head > size:
        raise ColdstillError(
            f"logits.head: {capture.head} is more than the vocabulary's {size} tokens"
        )
    if capture.head == size and capture.tail:
        raise ColdstillError(
            f"logits.tail: a head of {size} is the whole vocabulary, nothing is left to sample; "
            "set tail = 0"
        )
    longest = context_length(job.head.model.config)
    if longest is not None and job.sequence_length > longest:
        raise ColdstillError(
            f"corpus.sequence_length: {job.sequence_length} is more than the teacher's context of "
            f"{longest}; choose at most {longest}"
        )
    split = job.corpus.splits[job.split]
    per_shard = max(1, job.shard_tokens // job.sequence_length)
    return Manifest(
        teacher=job.teacher,
        tokenizer=tokenizer,
        corpus=CorpusIdentity(
            fingerprint=split.content, split=job.split, documents=split.documents
        ),
        packing=Packing(
            sequence_length=job.sequence_length,
            together=job.corpus.together,
            isolation=job.isolation,
            separator=tuple(job.corpus.separator),
            fingerprint=split.packing,
        ),
        capture=capture,
        sequences=len(job.rows),
        shard_sequences=per_shard,
        block_sequences=min(per_shard, max(1, 16384 // job.sequence_length)),
        codec=job.codec,
        store=job.store,
    )


def capture_split(job: CaptureJob, report: Reporter = silent) -> None:
    """Capture the shards that are missing; do nothing if none is.

    Raises
        ColdstillError: the store was made otherwise, the teacher gives no numbers, the disk is full
    """
    manifest = make_manifest(job)
    stage = f"{STAGE} {job.split}"
    with StoreWriter(job.folder, manifest) as writer:
        if not writer.layout.tokenizer.exists():
            job.tokenizer.save_pretrained(writer.layout.tokenizer)
        missing = writer.missing()
        if not missing:
            report(Report(stage=stage, note=f"complete: {manifest.shards} shards in {job.folder}"))
            return
        total = sum(len(manifest.shard_rows(i)) for i in missing) * job.sequence_length
        if len(missing) < manifest.shards:
            found = manifest.shards - len(missing)
            report(Report(stage=stage, note=f"going on: {found} of {manifest.shards} shards done"))
        done, started = 0, time.perf_counter()
        with peak_memory(job.head.model.device) as memory:
            for shard in missing:
                parts = []
                for part in _capture_shard(job, manifest.shard_rows(shard)):
                    parts.append(part)
                    done += len(part) * job.sequence_length
                    report(Report(stage=stage, done=done, total=total))
                commit = writer.write(shard, Block.concatenate(parts))
                _warn_of_separator(commit, job, report)
        seconds = time.perf_counter() - started
        measured = _measure(job, done / seconds, memory.bytes)
        write_json(writer.layout.measurements, measured)


def _capture_shard(job: CaptureJob, places: range) -> Iterator[Block]:
    """The shard's batches, with targets."""
    size = max(1, job.batch_tokens // job.sequence_length)
    buffer = job.head.buffer(size * job.sequence_length, job.head.model.device)
    for start in range(places.start, places.stop, size):
        rows = job.rows[start : min(start + size, places.stop)]
        sequences = job.sequences.read(rows)
        targets = capture_batch(job.head, sequences, job.isolation, job.capture, buffer)
        yield Block(sequences=sequences, targets=targets, capture=job.capture)


@torch.no_grad()
def capture_batch(
    head: OutputHead,
    sequences: Sequences,
    isolation: Isolation,
    capture: Capture,
    buffer: torch.Tensor,
) -> Targets:
    """The teacher's targets at every supervised position of some sequences.

    buffer  memory from `head.buffer`, reused from batch to batch

    Raises
        ColdstillError: a logit is no number (sequence and position)
    """
    device = head.model.device
    inputs = model_inputs(sequences, isolation, head.model.dtype)
    positions = flat_positions(sequences, inputs["input_ids"].shape[1]).to(device)
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    hidden_MD = head.hidden(inputs).flatten(0, 1)[positions]
    labels_M = torch.from_numpy(labels(sequences)).long().to(device)
    ids_M = np.repeat(sequences.ids, sequences.positions.lengths)
    uniform_M = uniform(capture.seed, ids_M, sequences.positions.values)
    shifts = torch.from_numpy(uniform_M).to(device)
    parts: list[Selected] = []
    for start in range(0, len(positions), len(buffer)):
        rows = slice(start, start + len(buffer))
        logits = head.logits(hidden_MD[rows], buffer)
        parts.extend(select(logits, labels_M[rows], shifts[rows], capture))
    targets = to_targets(parts, capture)
    _expect_numbers(targets, sequences)
    return targets


def _expect_numbers(targets: Targets, sequences: Sequences) -> None:
    # any NaN or infinity among the logits spoils the normaliser, and with it every one of these
    bad = ~(np.isfinite(targets.entropy) & np.isfinite(targets.label_logprob))
    if bad.any():
        place = int(np.flatnonzero(bad)[0])
        row = int(np.searchsorted(sequences.positions.offsets, place, side="right")) - 1
        raise ColdstillError(
            f"teacher: its logits are not finite at sequence {int(sequences.ids[row])}, position "
            f"{int(sequences.positions.values[place])}; try teacher.dtype = 'fp32'"
        )


def _warn_of_separator(commit: Commit, job: CaptureJob, report: Reporter) -> None:
    sums = commit.statistics
    if commit.shard != 0 or not sums.separators:
        return
    mean = sums.separator_mass / sums.separators
    token = job.tokenizer.decode(list(job.corpus.separator)[:1])
    known = mean >= RARE_SEPARATOR
    note = f"the teacher expects the separator {token!r} with mean probability {mean:.2g} where it"
    note += (
        " stands"
        if known
        else (
            " stands: it hardly knows it, so it was probably trained with another; set "
            'corpus.separator to that, or to "" for none'
        )
    )
    report(Report(stage=f"{STAGE} {job.split}", note=note, warning=not known))


def _measure(job: CaptureJob, tokens_per_second: float, memory: int) -> dict[str, Any]:
    size = max(1, job.batch_tokens // job.sequence_length)
    sample = job.sequences.read(job.rows[: min(size, len(job.rows))])
    forward = forward_speed(job.head, sample, job.isolation)
    return {
        "machine": describe_machine(),
        "capture_tokens_per_second": round(tokens_per_second, 1),
        "capture_peak_memory_bytes": memory,
        "forward": asdict(forward),
    }
