"""Packs documents of any length into sequences of at most `length` tokens, without losing tokens.

A document that fits is never cut: it goes into the open sequence with the least room that is
enough. A longer document is cut into pieces of `length` tokens. Each piece begins with the last
token of the piece before, so that every token of a document except its first is the label of
exactly one position.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from .alignment import supervised_positions
from .ragged import Ragged
from .schema import Sequences, sequence_hash

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

OPEN_SEQUENCES = 64
"""How many partly filled sequences wait for documents that fit. A larger number leaves less padding
but mixes documents from further apart. With 64, real corpora have about one per cent padding."""


@dataclass(frozen=True, slots=True, eq=False)
class TokenizedDocument:
    """One document, or a piece of one, as token ids."""

    index: int
    """Index of the document in the corpus."""
    tokens_T: NDArray[np.int32]
    learned_T: NDArray[np.bool_]
    """[T] whether a token is learned."""


@dataclass(slots=True, eq=False)
class _OpenSequence:
    length: int = 0
    pieces: list[TokenizedDocument] = field(default_factory=list)


class Packer:
    """Turns a stream of documents into a stream of sequences, deterministically."""

    def __init__(self, length: int, *, together: bool) -> None:
        """Pack into sequences of `length` tokens; without `together` each holds one piece."""
        if length < 2:
            raise ValueError(f"a sequence needs at least 2 tokens, got {length}")
        self._length = length
        self._together = together
        self._open: list[_OpenSequence] = []
        self.counts: Counter[str] = Counter()
        """Counts: documents, cut_documents, unlearnable_pieces."""

    def add(self, document: TokenizedDocument) -> Iterator[list[TokenizedDocument]]:
        """Add a document; yields the sequences that are full now, as lists of pieces."""
        self.counts["documents"] += 1
        pieces = list(self._cut(document))
        self.counts["cut_documents"] += len(pieces) > 1
        for piece in pieces:
            if not piece.learned_T[1:].any():  # none of its tokens would be a label
                self.counts["unlearnable_pieces"] += 1
            elif not self._together or len(piece.tokens_T) == self._length:
                yield [piece]
            else:
                yield from self._place(piece)

    def finish(self) -> Iterator[list[TokenizedDocument]]:
        """Yield the sequences that are still open."""
        for sequence in self._open:
            yield sequence.pieces
        self._open = []

    def _cut(self, document: TokenizedDocument) -> Iterator[TokenizedDocument]:
        step = self._length - 1
        for start in range(0, max(1, len(document.tokens_T) - 1), step):
            part = slice(start, start + self._length)
            yield TokenizedDocument(
                document.index, document.tokens_T[part], document.learned_T[part]
            )

    def _place(self, piece: TokenizedDocument) -> Iterator[list[TokenizedDocument]]:
        size = len(piece.tokens_T)
        fitting = [s for s in self._open if s.length + size <= self._length]
        # `max` takes the first, oldest of equals: the order is the same on every machine.
        target = max(fitting, key=lambda s: s.length, default=None)
        if target is None:
            target = _OpenSequence()
            self._open.append(target)
        target.length += size
        target.pieces.append(piece)
        # A document of one token has no label.
        if target.length >= self._length - 1:
            self._open.remove(target)
            yield target.pieces
        elif len(self._open) > OPEN_SEQUENCES:
            fullest = max(self._open, key=lambda s: s.length)
            self._open.remove(fullest)
            yield fullest.pieces


def build_sequences(first_id: int, packed: list[list[TokenizedDocument]]) -> Sequences:
    """Packed pieces as `Sequences`, with ids from `first_id` on."""
    tokens, starts, documents, positions, hashes = [], [], [], [], []
    for pieces in packed:
        lengths = [len(piece.tokens_T) for piece in pieces]
        starts_D = np.concatenate([[0], np.cumsum(lengths[:-1])]).astype(np.int32)
        tokens_T = np.concatenate([piece.tokens_T for piece in pieces])
        learned_T = np.concatenate([piece.learned_T for piece in pieces])
        positions_M = supervised_positions(learned_T, starts_D)
        tokens.append(tokens_T)
        starts.append(starts_D)
        documents.append([piece.index for piece in pieces])
        positions.append(positions_M)
        hashes.append(sequence_hash(tokens_T, starts_D, positions_M))
    return Sequences(
        ids=np.arange(first_id, first_id + len(packed), dtype=np.int64),
        tokens=Ragged.from_rows(tokens, np.int32),
        document_starts=Ragged.from_rows(starts, np.int32),
        document_ids=Ragged.from_rows(documents, np.int64),
        positions=Ragged.from_rows(positions, np.int32),
        hashes=np.array(hashes, dtype=np.uint64),
    )
