"""Held-out documents, one at a time: what every runtime can be asked about, packing or not."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ...data.errors import ColdstillError
from ..targets.tensors import TargetTensors

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from ...data.schema import Block
    from ...data.store.reader import StoreReader

SAMPLE_TOKENS = 4096
"""About so many tokens of held-out text are compared; all of them, where there are fewer."""
_SEED = 0


@dataclass(frozen=True, slots=True, eq=False)
class Document:
    """One document, or the piece of one that stands in a sequence."""

    tokens_T: NDArray[np.int64]
    positions_M: NDArray[np.int64]
    """Which of its places have a target;"""
    target: TargetTensors
    """the teacher's belief there."""

    def within(self, length: int) -> Document:
        """Its first tokens, no more than these."""
        tokens_T = self.tokens_T[:length]
        # the label of a place is the token after it
        kept = int(np.searchsorted(self.positions_M, len(tokens_T) - 1))
        return Document(
            tokens_T=tokens_T,
            positions_M=self.positions_M[:kept],
            target=self.target.rows(0, kept),
        )


def sampled_documents(store: StoreReader, tokens: int = SAMPLE_TOKENS) -> list[Document]:
    """Whole documents from sequences all over the store, in a fixed order, until there are enough.

    Packed documents never saw one another, so each is the same alone as it was in its sequence.

    Raises
        ColdstillError: nothing is supervised there
    """
    found: list[Document] = []
    left, positions = tokens, 0
    for row in np.random.default_rng(_SEED).permutation(len(store)).tolist():
        for document in _documents(store.read(np.array([row]))):
            found.append(document)
            left -= len(document.tokens_T)
            positions += len(document.positions_M)
        if left <= 0 and positions:
            return found
    if not positions:
        raise ColdstillError(
            f"{store.place}: no supervised position, so there is nothing to compare on; raise "
            "corpus.holdout"
        )
    return found


def _documents(block: Block) -> Iterator[Document]:
    """The documents of one sequence, but those of a single token: nothing follows in them."""
    sequences = block.sequences
    tokens_T, positions_M = sequences.tokens[0], sequences.positions[0]
    borders = [*sequences.document_starts[0].tolist(), len(tokens_T)]
    whole = TargetTensors.from_block(block)
    for start, end in itertools.pairwise(borders):
        if end - start < 2:
            continue
        first, last = np.searchsorted(positions_M, (start, end)).tolist()
        yield Document(
            tokens_T=tokens_T[start:end].astype(np.int64),
            positions_M=positions_M[first:last].astype(np.int64) - start,
            target=whole.rows(first, last),
        )
