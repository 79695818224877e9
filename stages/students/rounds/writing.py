"""The text that a student writes: prompts from a store, answers, and a prepared corpus of both.

Prompts are read from a store, so no corpus is needed. An answer depends on its prompt, its number,
the seed and the student's weights, and not on its batch. Answers are kept batch by batch, so an
interrupted writing continues and makes the same text.

The text is a folder like that of a prepared corpus (`data.prepared`), with one split or two. Its
record names the student, how it answered, and the teacher whose scores it waits for.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError

from ....data.errors import ColdstillError
from ....data.files import first_difference, json_sha256, read_json, whole_folder, write_json
from ....data.formats.arrow import ArrowStore
from ....data.prepared import (
    CorpusLayout,
    CorpusRecord,
    Packer,
    SequenceWriter,
    SplitRecord,
    TokenizedDocument,
    build_sequences,
)
from ....data.schema import Capture
from ....data.store.provenance import Writing
from ...capture.generate import answer, choose_answering, end_tokens
from ...config import sequences_in
from ...models.device import best_device
from ...models.loading import load_model, load_tokenizer, teacher_identity
from ...models.output_head import connect_head
from ...models.vocabulary import expect_same_tokens
from ...report import Report, Reporter, silent
from .config import BATCH_TOKENS

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from ....data.prepared import Split
    from ....data.store.reader import StoreReader
    from ...models.output_head import OutputHead
    from .config import RoundsConfig

_LEAST_BATCH = 8
"""Fewest prompts of a batch."""
_READ = 64
"""Sequences that are read at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manuscript:
    """What a text is: its author, and the teacher that will score it. Part of its record."""

    student: str
    written: Writing
    teacher: str
    """Fingerprint of the teacher of the first store."""
    tokenizer: str
    """Fingerprint of its tokenizer."""
    captures: dict[str, Capture]
    """What that teacher stored at each position, by split."""
    sequence_length: int
    seed: int
    prompts: dict[str, str]
    """SHA-256 of the prompts, by split."""


_MANUSCRIPT = TypeAdapter(Manuscript)


def manuscript_of(record: CorpusRecord, where: Path) -> Manuscript:
    """What a text's record says of it; raises ColdstillError if it is damaged."""
    try:
        return _MANUSCRIPT.validate_json(json.dumps(record.settings))
    except ValidationError as error:
        raise ColdstillError(
            f"{where}: damaged ({error.error_count()} fields); delete its folder and write it "
            "again with coldstill rounds write"
        ) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class WritingJob:
    """One text of one student."""

    name: str
    model: Path
    """Folder of the trained student."""
    round: int
    """Number of the training that made it, from 1."""
    config: RoundsConfig
    sources: dict[Split, StoreReader]
    """The stores whose documents give the prompts, for each split that is written."""
    seed: int
    folder: Path
    """The folder that is written."""
    speed: Path
    """The file that says how fast it was written."""
    own_code: bool = False
    begin: Callable[[], None] = lambda: None
    """Called after all checks, before the first file is written."""

    @property
    def stage(self) -> str:
        """For reports."""
        return f"rounds write {self.name} round {self.round}"


def write_text(
    job: WritingJob, report: Reporter = silent, stop: Callable[[], bool] = lambda: False
) -> None:
    """Let a student answer prompts and write its text; an existing text is only compared.

    stop  asked after every token; once it returns True, complete batches are kept for later

    Raises
        ColdstillError: no document gives a prompt, the model has other tokens than the stores, or
            the text exists and another model wrote it
    """
    where = f"students.{job.name}"
    report(Report(stage=job.stage, doing="read the prompts"))
    wanted = {"train": job.config.prompts, "heldout": job.config.heldout}
    prompts = {
        split: _prompts(
            store,
            wanted[split],
            job.config.prompt_tokens,
            # held-out prompts stay the same in every round, so that its figures compare
            job.seed + (job.round if split == "train" else 0),
            f"{where}.rounds",
        )
        for split, store in job.sources.items()
    }
    first = next(iter(job.sources.values()))
    identity = teacher_identity(str(job.model), where, dtype="auto", revision="main")
    manuscript = Manuscript(
        student=job.name,
        written=Writing(
            fingerprint=identity.fingerprint,
            round=job.round,
            **asdict(job.config.sampling),
        ),
        teacher=first.manifest.teacher.fingerprint,
        tokenizer=first.manifest.tokenizer.fingerprint,
        captures={split: store.manifest.capture for split, store in job.sources.items()},
        sequence_length=first.manifest.packing.sequence_length,
        seed=job.seed,
        prompts={split: _digest(found) for split, found in prompts.items()},
    )
    if (record := CorpusLayout(job.folder).read_record()) is not None:
        _expect_same(manuscript_of(record, job.folder), manuscript, job.folder)
        forget_answers(job.folder)
        report(Report(stage=job.stage, note=f"already written: {job.folder}"))
        return
    tokenizer = load_tokenizer(str(first.tokenizer_folder()), str(first.place))
    expect_same_tokens(tokenizer, load_tokenizer(str(job.model), where), where)
    model = load_model(str(job.model), where, precision="fp32", own_code=job.own_code)
    model.to(best_device())
    head = connect_head(model, first.manifest.tokenizer.size, report)
    for split, found in prompts.items():
        if len(found) < wanted[split]:
            note = (
                f"{job.sources[split].place} has {len(found):,} documents with a prompt, fewer "
                f"than the {wanted[split]:,} that rounds asks for"
            )
            report(Report(stage=job.stage, note=note))
    job.begin()
    kept = job.folder.with_name(f".{job.folder.name}-{json_sha256(asdict(manuscript))[:16]}")
    _answer_all(job, manuscript, head, tokenizer, prompts, kept, report, stop)
    if stop():
        return
    _write(job, manuscript, tokenizer, prompts, kept)
    forget_answers(job.folder)
    count = sum(map(len, prompts.values()))
    report(Report(stage=job.stage, note=f"{count:,} answers in {job.folder}"))


def _prompts(
    store: StoreReader, wanted: int, prompt_tokens: int, seed: int, where: str
) -> list[TokenizedDocument]:
    """Prompts of random documents of a store, each document once; no token of them is learned.

    A document with tokens before its first learned one has those as its prompt. A plain document
    gives its first `prompt_tokens` tokens, at most half of it.
    """
    found = []
    order = store.order(seed, 0)
    for start in range(0, len(order), _READ):
        sequences = store.read(order[start : start + _READ]).sequences
        for row in range(len(sequences)):
            tokens_T, starts_D = sequences.tokens[row], sequences.document_starts[row]
            ends_D = np.append(starts_D[1:], len(tokens_T))
            positions_M = sequences.positions[row]
            for document, begin, end in zip(
                sequences.document_ids[row].tolist(), starts_D.tolist(), ends_D.tolist(),
                strict=True,
            ):  # fmt: skip
                learned_M = positions_M[(positions_M >= begin) & (positions_M < end)]
                if len(learned_M) == 0:
                    continue
                given = int(learned_M[0]) + 1 - begin
                if given == 1:
                    given = max(1, min(prompt_tokens, (end - begin) // 2))
                prompt_T = tokens_T[begin : begin + given]
                found.append(TokenizedDocument(document, prompt_T, np.zeros(given, np.bool_)))
                if len(found) == wanted:
                    return found
    if not found:
        raise ColdstillError(
            f"{where}: no document of {store.place} gives a prompt, because none has a supervised "
            "position; remove 'rounds', or take a corpus with more documents"
        )
    return found


def _digest(documents: list[TokenizedDocument]) -> str:
    """SHA-256 over tokens."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(len(document.tokens_T).to_bytes(8, "little"))
        digest.update(document.tokens_T.astype("<i4").tobytes())
    return digest.hexdigest()


def _expect_same(old: Manuscript, new: Manuscript, folder: Path) -> None:
    before, now = (_MANUSCRIPT.dump_python(one, mode="json") for one in (old, new))
    if changed := first_difference(before, now):
        raise ColdstillError(
            f"{folder}: was written with {changed}; give the student another name (--student NEW), "
            f"or delete {folder.parent} to write and score it again"
        )


def _answer_all(
    job: WritingJob,
    manuscript: Manuscript,
    head: OutputHead,
    tokenizer: Any,
    prompts: dict[Split, list[TokenizedDocument]],
    kept: Path,
    report: Reporter,
    stop: Callable[[], bool],
) -> None:
    """Answer what is not answered yet; one file of answers for each batch."""
    length = manuscript.sequence_length
    size = max(_LEAST_BATCH, sequences_in(BATCH_TOKENS, length))
    batches = [(split, start) for split in prompts for start in range(0, len(prompts[split]), size)]
    total = sum(map(len, prompts.values()))
    tokens, seconds = 0, 0.0
    missing = [(split, start) for split, start in batches if not _part(kept, split, start).exists()]
    done = total - sum(len(prompts[split][start : start + size]) for split, start in missing)
    if done and missing:
        report(Report(stage=job.stage, note=f"continuing: {done:,} of {total:,} answers done"))
    ends = end_tokens(head.model, tokenizer)
    answering = choose_answering(head, length, job.stage, report) if missing else None
    report(Report(stage=job.stage, done=done, total=total, unit="answers"))
    for split, start in missing:
        part = prompts[split][start : start + size]
        started = time.perf_counter()
        with torch.no_grad():
            found = answer(
                head,
                build_sequences(start, [[prompt] for prompt in part]),
                job.config.sampling,
                seed=job.seed + (job.round if split == "train" else 0),
                ends=ends,
                sequence_length=length,
                answering=answering,
                stop=stop,
            )
        if stop():
            return
        texts = [found.tokens[row].tolist() for row in range(len(part))]
        seconds += time.perf_counter() - started
        tokens += sum(map(len, texts)) - sum(len(prompt.tokens_T) for prompt in part)
        write_json(job.speed, {"tokens_per_second": tokens / seconds})
        write_json(_part(kept, split, start), texts)
        done += len(part)
        report(Report(stage=job.stage, done=done, total=total, step=len(part), unit="answers"))


def forget_answers(text: Path) -> None:
    """Delete the answers that are kept for a text, once it is complete.

    text  its folder
    """
    for kept in text.parent.glob(f".{text.name}-*"):
        shutil.rmtree(kept, ignore_errors=True)


def _part(kept: Path, split: Split, start: int) -> Path:
    return kept / f"{split}-{start:08d}.json"


def _write(
    job: WritingJob,
    manuscript: Manuscript,
    tokenizer: Any,
    prompts: dict[Split, list[TokenizedDocument]],
    kept: Path,
) -> None:
    packing = next(iter(job.sources.values())).manifest.packing
    splits: dict[Split, SplitRecord] = {}
    with whole_folder(job.folder) as scratch:
        layout = CorpusLayout(scratch)
        for split, asked in prompts.items():
            texts = [
                np.array(text, np.int32)
                for part in sorted(kept.glob(f"{split}-*.json"))
                for text in read_json(part)
            ]
            written = [
                TokenizedDocument(number, text, np.arange(len(text)) >= len(prompt.tokens_T))
                for number, (prompt, text) in enumerate(zip(asked, texts, strict=True))
            ]
            packer = Packer(packing.sequence_length, together=packing.together)
            with ArrowStore().create(layout.split(split)) as add:
                writer = SequenceWriter(add)
                for document in written:
                    for pieces in packer.add(document):
                        writer.add(pieces)
                for pieces in packer.finish():
                    writer.add(pieces)
                digest = writer.finish()
            splits[split] = SplitRecord(
                documents=len(written),
                bytes=sum(len(tokenizer.decode(text.tolist()).encode()) for text in texts),
                sequences=writer.sequences,
                tokens=writer.tokens,
                positions=writer.positions,
                content=_digest(written),
                packing=digest,
            )
        record = CorpusRecord(
            settings=_MANUSCRIPT.dump_python(manuscript, mode="json"),
            sources=[],
            together=packing.together,
            separator=[],  # an answer ends with the student's own end token, or is cut off
            splits=splits,
            counts={},
        )
        write_json(layout.record, asdict(record))
