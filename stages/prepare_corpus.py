"""Read the corpus once, tokenise it, pack it, and split off what evaluation will use."""

from __future__ import annotations

import hashlib
from collections import Counter
from contextlib import ExitStack
from dataclasses import asdict
from itertools import islice
from typing import TYPE_CHECKING, Any

from ..data.corpus import (
    REASONS,
    Reading,
    is_held_out,
    list_sources,
    note_left_out,
    read_documents,
    refuse,
)
from ..data.errors import ColdstillError
from ..data.files import whole_folder, write_json
from ..data.formats.arrow import ArrowStore
from ..data.packing import Packer
from ..data.prepared import (
    SKIPPED_ROWS,
    SPLITS,
    CorpusLayout,
    CorpusRecord,
    SequenceWriter,
    SplitRecord,
)
from .corpus.chat_template import TODAY
from .corpus.origin import corpus_settings, expect_unchanged, source_listing
from .corpus.tokenize_documents import DocumentTokenizer
from .corpus.tokenize_prompts import PromptTokenizer
from .report import Report, Reporter, silent

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

    from ..data.corpus import BadRowError, Document
    from ..data.packing import TokenizedDocument
    from ..data.prepared import Split
    from .config import CorpusConfig

STAGE = "corpus"
_SAID = {
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
"""What is said of a record's counts."""

_BATCH = 256
"""Documents tokenised at a time: enough to keep every processor busy."""


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
    """Make the corpus folder anew, whole or not at all.

    base      the folder that relative paths of the recipe start from
    together  whether documents may share a sequence
    prompts   keep only what the teacher is to answer, one prompt a sequence

    Raises
        ColdstillError: sources that cannot be read, rows that cannot be learned from (unless they
            are to be skipped), or nothing to learn
    """
    left_out: list[str] = []
    report(Report(stage=STAGE, doing="look the sources up"))
    sources = list_sources(config.files, base, left_out)
    tokenize = (PromptTokenizer if prompts else DocumentTokenizer)(tokenizer, config)
    together = together and not prompts
    with whole_folder(folder) as scratch:
        layout = CorpusLayout(scratch)
        store = ArrowStore()
        counts: Counter[str] = Counter()
        with ExitStack() as open_files:
            writers = {
                split: _SplitWriter(
                    SequenceWriter(open_files.enter_context(store.create(layout.split(split)))),
                    None if prompts else Packer(config.sequence_length, together=together),
                )
                for split in SPLITS
            }
            columns = config.columns.for_prompts() if prompts else config.columns
            skip = _counter(counts) if config.bad_rows == "skip" else refuse
            read = added = 0
            reading = Reading()
            stream = read_documents(sources, columns, skip, reading)
            report(Report(stage=STAGE, unit="documents"))
            for documents in _batches(stream, counts, prompts=prompts):
                tokenized = tokenize(documents, added, skip)
                _add(tokenized, writers, config.holdout)
                added += len(tokenized)
                read += len(documents)
                report(Report(stage=STAGE, done=read, unit="documents"))
            splits = {name: writer.finish() for name, writer in writers.items()}
            _expect_something(splits, config, counts)
        counts.update(+tokenize.counts)
        for writer in writers.values():
            counts.update(writer.counts)
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
        without_effect = "corpus.as_chat = true changes nothing: no row is a prompt of its own"
    for note in (reading.note(), note_left_out(left_out), without_effect):
        if note is not None:
            report(Report(stage=STAGE, note=note))
    return record


def summary(record: CorpusRecord) -> str:
    """One sentence about a prepared corpus, with everything that was left out."""
    kind = "prompts" if record.prompts else "documents"
    parts = [
        f"{split}: {r.documents:,} {kind}, {r.tokens:,} tokens in {r.sequences:,} sequences"
        for split, r in ((split, record.splits[split]) for split in SPLITS)
    ]
    parts += [
        f"{record.counts[name]:,} {text}" for name, text in _SAID.items() if record.counts.get(name)
    ]
    return "; ".join(parts)


class _SplitWriter:
    """One split on its way to disk."""

    def __init__(self, writer: SequenceWriter, packer: Packer | None) -> None:
        """Pack documents with `packer`; without one each is a sequence, learned from or not."""
        self._writer, self._packer = writer, packer
        self._content = hashlib.sha256()
        self._documents = self._bytes = 0

    def add(self, document: Document, tokenized: TokenizedDocument) -> None:
        self._content.update(document.digest())
        self._documents += 1
        self._bytes += document.size
        for pieces in [[tokenized]] if self._packer is None else self._packer.add(tokenized):
            self._writer.add(pieces)

    @property
    def counts(self) -> dict[str, int]:
        """What packing did to the documents."""
        names = ("cut_documents", "unlearnable_pieces")
        return {name: self._packer.counts[name] if self._packer else 0 for name in names}

    def finish(self) -> SplitRecord:
        for pieces in () if self._packer is None else self._packer.finish():
            self._writer.add(pieces)
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
        # a prompt to be answered is something, whether or not anything follows it
        full = [d for d in batch if not d.is_empty or (prompts and d.prompt)]
        counts["empty_documents"] += len(batch) - len(full)
        if full:
            yield full


def _counter(counts: Counter[str]) -> Callable[[BadRowError], None]:
    def count(bad: BadRowError) -> None:
        counts[bad.kind] += 1

    return count


def _add(
    documents: Sequence[tuple[Document, TokenizedDocument]],
    writers: dict[Split, _SplitWriter],
    holdout: float,
) -> None:
    for document, tokenized in documents:
        held_out = is_held_out(document.digest(), holdout)
        writers["heldout" if held_out else "train"].add(document, tokenized)


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
            "not held out, and none of these has a token to predict"
        )
    if splits["heldout"].sequences == 0:
        raise ColdstillError(
            f"{where}: none of {sum(counts.values())} documents fell into the held-out share of "
            f"{config.holdout}; raise corpus.holdout so that there is something to evaluate on"
        )
