"""Prepares a corpus: reads, tokenises and packs its documents, and splits off the held-out ones.

Its record holds settings and sources, so that a later run sees whether they have changed.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from contextlib import ExitStack
from dataclasses import asdict
from itertools import islice
from typing import TYPE_CHECKING, Any

from ..data.corpus.columns import Columns
from ..data.corpus.document import REASONS, refuse
from ..data.corpus.folders import note_left_out
from ..data.corpus.formats import read_documents
from ..data.corpus.records import Reading
from ..data.corpus.sources import list_sources
from ..data.errors import ColdstillError
from ..data.files import file_sha256, whole_folder, write_json
from ..data.formats.arrow import ArrowStore
from ..data.prepared import (
    SKIPPED_ROWS,
    SPLITS,
    CorpusLayout,
    CorpusRecord,
    SequenceWriter,
    SplitRecord,
)
from .corpus.chat_template import TODAY
from .corpus.tokenize_documents import SplitPacker, document_tokenizer, is_kept
from .models.vocabulary import tokenizer_identity
from .report import Report, Reporter, silent

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from ..data.corpus.document import BadRowError, Document
    from ..data.corpus.sources import Source
    from ..data.prepared import Split
    from .config import CorpusConfig
    from .corpus.tokenize_documents import Pieces

STAGE = "corpus"
_COUNTED = {
    "empty_documents": "empty documents skipped",
    "unlearnable_pieces": "pieces without anything to learn skipped",
    "unrenderable_chats": "chats that the template cannot render skipped",
    "unrendered_messages": "chats with messages that the template does not write skipped",
    "unlocated_turns": "chats whose answers cannot be located skipped",
    "too_long_prompts": "prompts that leave no room for an answer skipped",
    "rowless_tokens": "rows with a token that the model has no row for skipped",
    "empty_prompts": "prompts without any token skipped",
    **{kind: f"{rows} skipped" for kind, rows in REASONS.items()},
    "dropped_thoughts": "messages without their thoughts, which the chat template leaves out",
    "unrendered_tools": "chats without their tools, which the chat template does not write",
    "unrendered_documents": "chats without their documents, which the chat template does not write",
    "unended_turns": "answers without a token that ends them, since the chat template writes none",
    "masked_turns": "answers not learned, as their rows say (weight, train or loss is 0 or false)",
    "dated_chats": f"chats that say it is {TODAY:%Y-%m-%d}, where the template writes today's date",
    "templated_pairs": "prompts written with the tokenizer's chat template",
    "untemplated_pairs": "prompts without the tokenizer's chat template (corpus.as_chat = true "
    "writes them with it)",
}
"""Name of a count in the record -> its text in the summary."""

_BATCH = 256
"""Documents per batch, enough to keep every processor busy."""


def prepare_corpus(
    folder: Path,
    config: CorpusConfig,
    base: Path,
    tokenizer: Any,
    *,
    together: bool,
    prompts: bool = False,
    report: Reporter = silent,
) -> CorpusRecord:
    """Write the corpus folder; an interrupted or failed call leaves no folder.

    base      folder that relative paths of the recipe start from
    together  whether documents may share a sequence
    prompts   whether to keep only prompts for the teacher, one per sequence

    Raises
        ColdstillError: a source cannot be read, a row cannot be learned from (unless the recipe
            skips such rows), or there is nothing to learn
    """
    left_out: list[str] = []
    report(Report(stage=STAGE, doing="look the sources up"))
    sources = list_sources(config.files, base, left_out)
    tokenize = document_tokenizer(tokenizer, config, prompts=prompts)
    together = together and not prompts
    packer = SplitPacker(config, together=together, prompts=prompts)
    counts: Counter[str] = Counter()

    def count(bad: BadRowError) -> None:
        counts[bad.kind] += 1

    with whole_folder(folder) as scratch:
        layout, store = CorpusLayout(scratch), ArrowStore()
        with ExitStack() as open_files:
            writers = {
                split: _SplitWriter(
                    SequenceWriter(open_files.enter_context(store.create(layout.split(split))))
                )
                for split in SPLITS
            }
            columns = config.columns.for_prompts() if prompts else config.columns
            skip = count if config.bad_rows == "skip" else refuse
            read = added = 0
            reading = Reading()
            stream = read_documents(sources, columns, skip, reading)
            report(Report(stage=STAGE, unit="documents"))
            for documents in _batches(stream, counts, prompts=prompts):
                tokenized = tokenize(documents, added, skip)
                for document, one in tokenized:
                    split, packed = packer.add(document, one)
                    writers[split].add(document, packed)
                added += len(tokenized)
                read += len(documents)
                report(Report(stage=STAGE, done=read, unit="documents"))
            for split, rest in packer.finish():
                writers[split].write(rest)
            splits = {name: writer.finish() for name, writer in writers.items()}
            _expect_something(splits, config, counts)
        counts.update(+tokenize.counts)
        counts.update(packer.counts)
        report(Report(stage=STAGE, doing="take the digests of the sources"))
        record = CorpusRecord(
            settings=corpus_settings(config, tokenizer),
            sources=source_listing(sources),
            together=together,
            separator=list(tokenize.separator),
            splits=splits,
            counts=dict(counts),
            prompts=prompts,
        )
        expect_unchanged(sources, config, base)
        write_json(layout.record, asdict(record))
    report(Report(stage=STAGE, note=summary(record)))
    without_effect = None
    if config.as_chat and not record.counts.get("templated_pairs"):
        without_effect = "corpus.as_chat = true has no effect: no row has a prompt"
    for note in (reading.note(), note_left_out(left_out), without_effect):
        if note is not None:
            report(Report(stage=STAGE, note=note))
    return record


def summary(record: CorpusRecord) -> str:
    """One line about a prepared corpus and everything that was skipped or changed."""
    kind = "prompts" if record.prompts else "documents"
    parts = [
        f"{split}: {r.documents:,} {kind}, {r.tokens:,} tokens in {r.sequences:,} sequences"
        for split, r in ((split, record.splits[split]) for split in SPLITS)
    ]
    parts += [
        f"{record.counts[name]:,} {text}"
        for name, text in _COUNTED.items()
        if record.counts.get(name)
    ]
    return "; ".join(parts)


class _SplitWriter:
    """Writes one split and computes its record."""

    def __init__(self, writer: SequenceWriter) -> None:
        self._writer = writer
        self._content = hashlib.sha256()
        self._documents = self._bytes = 0

    def add(self, document: Document, packed: Iterable[Pieces]) -> None:
        self._content.update(document.digest())
        self._documents += 1
        self._bytes += document.size
        self.write(packed)

    def write(self, packed: Iterable[Pieces]) -> None:
        for pieces in packed:
            self._writer.add(pieces)

    def finish(self) -> SplitRecord:
        packing = self._writer.finish()
        return SplitRecord(
            documents=self._documents,
            bytes=self._bytes,
            sequences=self._writer.sequences,
            tokens=self._writer.tokens,
            positions=self._writer.positions,
            content=self._content.hexdigest(),
            packing=packing,
        )


def _batches(
    documents: Iterable[Document], counts: Counter[str], *, prompts: bool
) -> Iterator[Sequence[Document]]:
    stream = iter(documents)
    while batch := list(islice(stream, _BATCH)):
        kept = [document for document in batch if is_kept(document, prompts=prompts)]
        counts["empty_documents"] += len(batch) - len(kept)
        if kept:
            yield kept


def _expect_something(
    splits: dict[Split, SplitRecord], config: CorpusConfig, left_out: Counter[str]
) -> None:
    where = ", ".join(config.files)
    if skipped := sum(left_out[name] for name in SKIPPED_ROWS):
        where += f" without the {skipped} rows skipped"
    counts = {name: split.documents for name, split in splits.items()}
    if sum(counts.values()) == 1:
        raise ColdstillError(
            f"{where}: holds one document, expected several: some to learn from, others to "
            "evaluate on; divide it into more files or JSON lines"
        )
    if splits["train"].sequences == 0:
        raise ColdstillError(
            f"{where}: nothing to learn: of {sum(counts.values())} documents {counts['train']} are "
            "not held out, and these have no token to predict"
        )
    if splits["heldout"].sequences == 0:
        raise ColdstillError(
            f"{where}: holdout = {config.holdout} selected 0 of {sum(counts.values())} documents; "
            "raise corpus.holdout so that there is something to evaluate on"
        )


_FORMERLY = {"as_chat": False}
"""Values of keys that older records lack."""

_CLOCK_NS = 2_000_000_000
"""Resolution of the coarsest file system clock: changes within it may have the same time."""


def corpus_settings(config: CorpusConfig, tokenizer: Any) -> dict[str, Any]:
    """The settings that decide how a corpus is read, as its record stores them."""
    settings = asdict(config)
    settings["files"] = list(config.files)
    settings["tokenizer"] = tokenizer_identity(tokenizer).fingerprint
    template = str(tokenizer.chat_template or "")
    settings["chat_template"] = hashlib.sha256(template.encode()).hexdigest()
    return settings


def source_listing(sources: Sequence[Source]) -> list[list[Any]]:
    """Name, bytes, time of change and SHA-256 of each source (empty for a data set on a hub)."""
    return [[s.name, s.bytes, _changed_ns(s), _digest(s)] for s in sources]


def expect_unchanged(sources: Sequence[Source], config: CorpusConfig, base: Path) -> None:
    """Check that no source was changed while it was read."""
    now = {source.name: source for source in list_sources(config.files, base)}
    for source in sources:
        if now.get(source.name) != source:
            raise ColdstillError(
                f"{source.name}: was changed while the corpus was read; run the command again when "
                "nothing writes to it"
            )


def _changed_ns(source: Source) -> int:
    # `changed_ns` cannot be set back, so it shows that `modified_ns` was
    return max(source.modified_ns, source.changed_ns)


def _digest(source: Source) -> str:
    return "" if source.path is None or source.path.is_dir() else file_sha256(source.path)


def difference_in_corpus(
    record: CorpusRecord,
    config: CorpusConfig,
    base: Path,
    tokenizer: Any,
    *,
    prompts: bool = False,
    written_ns: int = 0,
) -> str | None:
    """The first difference that preparing the corpus again would make; None if there is none.

    Sources are compared by name, size and time of change. The content is read again only if the
    size is the same and the time differs, or is too close to `written_ns` to be trusted.

    written_ns  time at which the record was written
    """
    if record.prompts != prompts:
        if prompts:
            return "it holds texts to learn from, teacher.generate needs prompts"
        return "it holds prompts for teacher.generate, which the recipe no longer has"
    now = corpus_settings(config, tokenizer)
    for key, value in now.items():
        before = record.settings.get(key, _FORMERLY.get(key))
        if key == "columns" and isinstance(before, dict):  # older records lack newer columns
            before = {**asdict(Columns()), **before}
        if before == value or (key == "bad_rows" and not record.skipped):
            continue
        if key in ("tokenizer", "chat_template"):  # only their digests are known
            return f"the {key.replace('_', ' ')} has changed"
        return f"corpus.{key} was {before!r}, is {value!r}"
    old = {str(name): rest for name, *rest in record.sources}
    new = {source.name: source for source in list_sources(config.files, base)}
    for name in sorted(old.keys() | new.keys()):
        if name not in old:
            return f"the file {name} is new"
        if name not in new:
            return f"the file {name} is gone"
        if _has_changed(new[name], old[name], written_ns):
            return f"the file {name} has changed"
    return None


def outdated_labels(record: CorpusRecord, tokenizer: Any) -> str | None:
    """The fault of the labels of chats that version 0.1.0 prepared; None if there is none.

    That version learned the white space after each answer, and sometimes a header.
    """
    is_older = "as_chat" not in record.settings
    if not is_older or record.prompts or not tokenizer.chat_template:
        return None
    # in a plain text every token except the first of each piece is learned
    partly = any(
        split.positions < split.tokens - split.documents - split.sequences
        for split in record.splits.values()
    )
    if not partly:
        return None
    return (
        "prepared by an older version, which learned the white space after each answer of a chat "
        "and sometimes a header; give the run another name to prepare the corpus again"
    )


def _has_changed(source: Source, before: list[Any], written_ns: int) -> bool:
    size, changed_ns, digest = before
    settled = changed_ns < written_ns - _CLOCK_NS
    if settled and (source.bytes, _changed_ns(source)) == (size, changed_ns):
        return False
    # copies and checkouts change the time without changing the content
    return bool(source.bytes != size or _digest(source) != digest)
