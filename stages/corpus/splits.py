"""Assigning documents to the training and held-out splits and packing each split."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from ...data.corpus.document import is_held_out
from ...data.prepared import SPLITS, Packer

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from ...data.corpus.document import Document
    from ...data.prepared import Split, TokenizedDocument
    from ..config import CorpusConfig

    Pieces = list[TokenizedDocument]
    """The pieces of documents in one sequence."""


def split_of(document: Document, holdout: float) -> Split:
    """The split of a document, which depends on its content alone."""
    return "heldout" if is_held_out(document.digest(), holdout) else "train"


def is_kept(document: Document, *, prompts: bool) -> bool:
    """Whether a document is used; a prompt for the teacher needs no completion."""
    return not document.is_empty or (prompts and bool(document.prompt))


class SplitPacker:
    """Packs the documents of each split into sequences; a prompt stays a separate sequence."""

    def __init__(self, config: CorpusConfig, *, together: bool, prompts: bool) -> None:
        """Start two empty splits; `together` allows several documents per sequence."""
        self._holdout = config.holdout
        self._packers = {
            split: Packer(config.sequence_length, together=together)
            for split in (() if prompts else SPLITS)
        }

    def add(self, document: Document, tokenized: TokenizedDocument) -> tuple[Split, list[Pieces]]:
        """Add a document; returns its split and the sequences that are now full."""
        split = split_of(document, self._holdout)
        if not self._packers:
            return split, [[tokenized]]
        return split, list(self._packers[split].add(tokenized))

    def finish(self) -> Iterable[tuple[Split, Iterator[Pieces]]]:
        """The sequences that are not full, by split."""
        return ((split, packer.finish()) for split, packer in self._packers.items())

    @property
    def counts(self) -> Counter[str]:
        """Numbers of cut documents and of pieces without a supervised token."""
        names = ("cut_documents", "unlearnable_pieces")
        return Counter({n: sum(p.counts[n] for p in self._packers.values()) for n in names})
