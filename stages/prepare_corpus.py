"""Read the corpus once, tokenise it, pack it, and split off what evaluation will use."""

from __future__ import annotations

import hashlib
from collections import Counter
from contextlib import ExitStack
from dataclasses import asdict
from itertools import islice
from typing import TYPE_CHECKING, Any

from ..data.corpus import is_held_out, list_sources, read_documents
from ..data.errors import ColdstillError
from ..data.files import whole_folder, write_json
from ..data.fingerprint import file_sha256
from ..data.packing import Packer
from ..data.prepared import SPLITS, CorpusLayout, CorpusRecord, SequenceWriter, SplitRecord
from ..data.stores.arrow import ArrowStore
from .models import tokenizer_identity
from .report import Report, Reporter, silent
from .tokenize_documents import DocumentTokenizer

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from ..data.corpus import Document, Source
    from ..data.packing import TokenizedDocument
    from ..data.prepared import Split
    from .config import CorpusConfig

STAGE = "corpus"
_BATCH = 256
"""Documents tokenised at a time: enough to keep every processor busy."""


def difference_in_corpus(
    record: CorpusRecord, config: CorpusConfig, base: Path, tokenizer: Any
) -> str | None:
    """What preparing the corpus again would do differently, or None.

    Sources are compared by name, size and time of change; the content of one is read again only
    where its size has stayed and its time has not.
    """
    now = _settings(config, tokenizer)
    for key, value in now.items():
        if record.settings.get(key) == value:
            continue
        if key in ("tokenizer", "chat_template"):  # known by their digests
            return f"the {key.replace('_', ' ')} is another"
        return f"corpus.{key} was {record.settings.get(key)!r}, is {value!r}"
    old = {str(name): rest for name, *rest in record.sources}
    new = {source.name: source for source in list_sources(config.files, base)}
    for name in sorted(old.keys() | new.keys()):
        if name not in old:
            return f"the file {name} is new"
        if name not in new:
            return f"the file {name} is gone"
        if _has_changed(new[name], *old[name]):
            return f"the file {name} has changed"
    return None


def _has_changed(source: Source, size: int, modified_ns: int, digest: str) -> bool:
    if (source.bytes, source.modified_ns) == (size, modified_ns):
        return False
    # a copy or a checkout touches files without changing them
    return source.bytes != size or _digest(source) != digest


def prepare_corpus(
    folder: Path,
    config: CorpusConfig,
    base: Path,
    tokenizer: Any,
    *,
    together: bool,
    report: Reporter = silent,
) -> CorpusRecord:
    """Make the corpus folder anew, whole or not at all.

    base      the folder that relative paths of the recipe start from
    together  whether documents may share a sequence

    Raises
        ColdstillError: sources that cannot be read, or nothing to learn in them
    """
    sources = list_sources(config.files, base)
    tokenize = DocumentTokenizer(tokenizer, config.separator, "corpus.separator")
    with whole_folder(folder) as scratch:
        layout = CorpusLayout(scratch)
        store = ArrowStore()
        counts: Counter[str] = Counter()
        with ExitStack() as open_files:
            writers = {
                split: _SplitWriter(
                    SequenceWriter(open_files.enter_context(store.create(layout.split(split)))),
                    Packer(config.sequence_length, together=together),
                )
                for split in SPLITS
            }
            for documents in _batches(read_documents(sources, config.columns), counts):
                _add(documents, tokenize, writers, config.holdout)
                counts["read"] += len(documents)
                report(Report(stage=STAGE, done=counts["read"], unit="documents"))
            splits = {name: writer.finish() for name, writer in writers.items()}
            _expect_something(splits, config)
        for name in ("cut_documents", "unlearnable_pieces"):
            counts[name] = sum(writer.packer.counts[name] for writer in writers.values())
        del counts["read"]
        record = CorpusRecord(
            settings=_settings(config, tokenizer),
            sources=_listing(sources),
            together=together,
            separator=list(tokenize.separator),
            splits=splits,
            counts=dict(counts),
        )
        write_json(layout.record, asdict(record))
    report(Report(stage=STAGE, note=summary(record)))
    return record


def summary(record: CorpusRecord) -> str:
    """One sentence about a prepared corpus, with everything that was left out."""
    parts = [
        f"{split}: {r.documents:,} documents, {r.tokens:,} tokens in {r.sequences:,} sequences"
        for split, r in ((split, record.splits[split]) for split in SPLITS)
    ]
    names = {
        "empty_documents": "empty documents skipped",
        "unlearnable_pieces": "pieces without anything to learn skipped",
    }
    parts += [f"{record.counts[n]:,} {text}" for n, text in names.items() if record.counts.get(n)]
    return "; ".join(parts)


class _SplitWriter:
    """One split on its way to disk."""

    def __init__(self, writer: SequenceWriter, packer: Packer) -> None:
        self._writer, self.packer = writer, packer
        self._content = hashlib.sha256()
        self._documents = self._bytes = 0

    def add(self, document: Document, tokenized: TokenizedDocument) -> None:
        self._content.update(document.digest())
        self._documents += 1
        self._bytes += document.size
        for pieces in self.packer.add(tokenized):
            self._writer.add(pieces)

    def finish(self) -> SplitRecord:
        for pieces in self.packer.finish():
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


def _batches(documents: Iterable[Document], counts: Counter[str]) -> Iterator[Sequence[Document]]:
    stream = iter(documents)
    while batch := list(islice(stream, _BATCH)):
        full = [document for document in batch if not document.is_empty]
        counts["empty_documents"] += len(batch) - len(full)
        if full:
            yield full


def _add(
    documents: Sequence[Document],
    tokenize: DocumentTokenizer,
    writers: dict[Split, _SplitWriter],
    holdout: float,
) -> None:
    first = sum(writer.packer.counts["documents"] for writer in writers.values())
    for document, tokenized in zip(documents, tokenize(documents, first), strict=True):
        held_out = is_held_out(document.digest(), holdout)
        writers["heldout" if held_out else "train"].add(document, tokenized)


def _expect_something(splits: dict[Split, SplitRecord], config: CorpusConfig) -> None:
    where = ", ".join(config.files)
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


def _settings(config: CorpusConfig, tokenizer: Any) -> dict[str, Any]:
    settings = asdict(config)
    settings["files"] = list(config.files)
    settings["tokenizer"] = tokenizer_identity(tokenizer).fingerprint
    template = str(tokenizer.chat_template or "")
    settings["chat_template"] = hashlib.sha256(template.encode()).hexdigest()
    return settings


def _listing(sources: Sequence[Source]) -> list[list[Any]]:
    return [[s.name, s.bytes, s.modified_ns, _digest(s)] for s in sources]


def _digest(source: Source) -> str:
    return "" if source.path is None or source.path.is_dir() else file_sha256(source.path)
