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
from ..data.files import json_bytes
from ..data.layout import MANIFEST, MEASUREMENTS, TOKENIZER, TOKENIZER_FILES
from ..data.manifest import CorpusIdentity, Manifest, Packing, format_settings, read_manifest
from ..data.order import uniform
from ..data.place import place_at
from ..data.reader import open_store
from ..data.schema import Block, Targets
from ..data.writer import StoreWriter, with_error
from .device import describe_machine, peak_memory
from .feed import flat_positions
from .isolation import model_inputs
from .models import tokenizer_identity
from .report import Report, Reporter, silent
from .selection import select, to_targets
from .speed import forward_speed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from ..data.manifest import TeacherIdentity
    from ..data.prepared import CorpusRecord, SequenceFile, Split
    from ..data.schema import Capture, Sequences
    from ..data.statistics import ShardStatistics
    from .isolation import Isolation
    from .output_head import OutputHead
    from .selection import Selected

STAGE = "teacher-logits"
BLOCK_TOKENS = 16_384
"""Tokens of a block inside a shard: the unit of a read. Half as many cost a tenth in decoding."""
RARE_SEPARATOR = 1e-3
"""Below this mean probability the teacher does not know the separator: it was never trained to end
a document that way, and the student would learn nonsense there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CapturePlan:
    """Everything that decides one split's store, known before the teacher is loaded."""

    split: Split
    teacher: TeacherIdentity
    context: int | None
    """The longest input the teacher takes."""
    tokenizer: Any
    corpus: CorpusRecord
    sequences: SequenceFile
    rows: NDArray[np.int64]
    """Which of the split's sequences are captured, increasing."""
    capture: Capture
    sequence_length: int
    shard_tokens: int
    batch_tokens: int
    codec: str | dict[str, Any]
    """Its name, or a table of its name and settings; `store` likewise."""
    store: str | dict[str, Any]
    folder: str | Path
    """A path or an address."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Teacher:
    """The loaded teacher."""

    head: OutputHead
    isolation: Isolation


def chosen_rows(available: int, wanted: int | None, seed: int) -> NDArray[np.int64]:
    """The sequences to capture: all, or a seeded sample of them in corpus order."""
    if wanted is None or wanted >= available:
        return np.arange(available)
    random = np.random.Generator(np.random.PCG64([seed, 1]))
    return np.sort(random.choice(available, wanted, replace=False))


def make_manifest(plan: CapturePlan, isolation: Isolation) -> Manifest:
    """What the store will say of itself; a function of its arguments alone.

    Raises
        ColdstillError: as `expect_capturable`
    """
    tokenizer = tokenizer_identity(plan.tokenizer)
    expect_capturable(plan.capture, tokenizer.size, plan.sequence_length, plan.context)
    split = plan.corpus.splits[plan.split]
    per_shard = max(1, plan.shard_tokens // plan.sequence_length)
    settings = format_settings(plan.codec, plan.store, tokenizer.size, plan.capture)
    return Manifest(
        teacher=plan.teacher,
        tokenizer=tokenizer,
        corpus=CorpusIdentity(
            fingerprint=split.content, split=plan.split, documents=split.documents
        ),
        packing=Packing(
            sequence_length=plan.sequence_length,
            together=plan.corpus.together,
            isolation=isolation,
            separator=tuple(plan.corpus.separator),
            fingerprint=split.packing,
        ),
        capture=plan.capture,
        sequences=len(plan.rows),
        shard_sequences=per_shard,
        block_sequences=min(per_shard, max(1, BLOCK_TOKENS // plan.sequence_length)),
        codec=settings["codec"],
        store=settings["store"],
    )


def expect_capturable(
    capture: Capture, size: int, sequence_length: int, longest: int | None
) -> None:
    """Refuse what a teacher of `size` tokens and a context of `longest` cannot give.

    Raises
        ColdstillError: a head or tail that the vocabulary cannot give, or a sequence longer than
            the teacher's context
    """
    if capture.head > size:
        raise ColdstillError(
            f"logits.head: {capture.head} is more than the vocabulary's {size} tokens"
        )
    if capture.head == size and capture.tail:
        raise ColdstillError(
            f"logits.tail: a head of {size} is the whole vocabulary, nothing is left to sample; "
            "set tail = 0"
        )
    if longest is not None and sequence_length > longest:
        raise ColdstillError(
            f"corpus.sequence_length: {sequence_length} is more than the teacher's context of "
            f"{longest}; choose at most {longest}"
        )


def is_captured(plan: CapturePlan) -> bool:
    """Whether the store is whole already. Needs no teacher.

    Raises
        ColdstillError: it was made by another teacher, tokenizer, corpus, packing or capture, or
            a shard is not what was committed
    """
    place = place_at(plan.folder)
    if not place.exists(MANIFEST):
        make_manifest(plan, "positions")  # refuse what cannot be captured before loading anything
        return False
    # the way of isolation is the teacher's doing and part of its fingerprint's consequences
    isolation = read_manifest(place).packing.isolation
    manifest = make_manifest(plan, isolation)
    StoreWriter(plan.folder, manifest).check()
    store = open_store(plan.folder, incomplete=True)
    store.expect_sizes()
    return len(store.done) == manifest.shards


def capture_split(
    plan: CapturePlan,
    teacher: Teacher,
    report: Reporter = silent,
    begin: Callable[[], None] = lambda: None,
) -> None:
    """Capture the shards that are missing.

    begin  called once, when nothing can be refused any more

    Raises
        ColdstillError: the store was made otherwise, the teacher gives no numbers, the disk is full
    """
    manifest = make_manifest(plan, teacher.isolation)
    if not place_at(plan.folder).exists(MANIFEST) and len(plan.rows):
        manifest = with_error(manifest, _first_batch(plan, teacher))
    stage = f"{STAGE} {plan.split}"
    with StoreWriter(plan.folder, manifest) as writer:
        begin()
        if not writer.place.exists(TOKENIZER_FILES):
            with writer.place.scratch() as folder:
                plan.tokenizer.save_pretrained(folder / TOKENIZER)
                writer.add_tokenizer(folder / TOKENIZER)
        missing = writer.missing()
        if len(missing) < manifest.shards:
            found = manifest.shards - len(missing)
            report(Report(stage=stage, note=f"going on: {found} of {manifest.shards} shards done"))
        total = sum(len(manifest.shard_rows(i)) for i in missing) * plan.sequence_length
        done, started = 0, time.perf_counter()
        with peak_memory(teacher.head.model.device) as memory:
            for shard in missing:
                parts = []
                for part in _capture_shard(plan, teacher, manifest.shard_rows(shard)):
                    parts.append(part)
                    new = len(part) * plan.sequence_length
                    done += new
                    report(Report(stage=stage, done=done, total=total, step=new))
                writer.write(shard, Block.concatenate(parts))
        if missing:
            seconds = time.perf_counter() - started
            measured = _measure(plan, teacher, done / seconds, memory.bytes)
            writer.place.write(MEASUREMENTS, json_bytes(measured))
        _tell_of_separator(open_store(plan.folder).statistics, plan, report)
    shards = "1 shard" if manifest.shards == 1 else f"{manifest.shards} shards"
    report(Report(stage=stage, note=f"{shards} in {writer.place}"))


def _first_batch(plan: CapturePlan, teacher: Teacher) -> Block:
    """What the codec's error is measured on."""
    size = max(1, plan.batch_tokens // plan.sequence_length)
    return next(_capture_shard(plan, teacher, range(min(size, len(plan.rows)))))


def _capture_shard(plan: CapturePlan, teacher: Teacher, places: range) -> Iterator[Block]:
    """The shard's batches, with targets."""
    size = max(1, plan.batch_tokens // plan.sequence_length)
    buffer = teacher.head.buffer(size * plan.sequence_length, teacher.head.model.device)
    for start in range(places.start, places.stop, size):
        rows = plan.rows[start : min(start + size, places.stop)]
        sequences = plan.sequences.read(rows)
        targets = capture_batch(teacher.head, sequences, teacher.isolation, plan.capture, buffer)
        yield Block(sequences=sequences, targets=targets, capture=plan.capture)


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


def _tell_of_separator(sums: ShardStatistics, plan: CapturePlan, report: Reporter) -> None:
    # once is enough: the held-out split is captured first, and the teacher is the same
    if plan.split != "heldout" or not sums.separators:
        return
    mean = sums.separator_mass / sums.separators
    token = plan.tokenizer.decode(list(plan.corpus.separator)[:1])
    note = f"where documents end with {token!r}, the teacher's mean probability of it is {mean:.2g}"
    known = mean >= RARE_SEPARATOR
    if not known:
        note += (
            ": it hardly knows this separator; set corpus.separator to the one it was trained "
            'with, or to "" for none'
        )
    report(Report(stage=STAGE, note=note, warning=not known))


def _measure(
    plan: CapturePlan, teacher: Teacher, tokens_per_second: float, memory: int
) -> dict[str, Any]:
    size = max(1, plan.batch_tokens // plan.sequence_length)
    sample = plan.sequences.read(plan.rows[: min(size, len(plan.rows))])
    forward = forward_speed(teacher.head, sample, teacher.isolation)
    return {
        "machine": describe_machine(),
        "capture_tokens_per_second": round(tokens_per_second, 1),
        "capture_peak_memory_bytes": memory,
        "forward": asdict(forward),
    }
