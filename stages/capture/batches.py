"""Which sequences share a batch of the teacher."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

_STEPS = 8
"""Lengths within a factor of 2^(1/8) share a batch: at most a twelfth of a batch is padding."""


def batches_of(lengths_N: NDArray[np.int64], budget: int) -> Iterator[NDArray[np.int64]]:
    """[B] row numbers of the sequences of each batch, increasing; every row comes once.

    A batch costs its rows times its longest sequence, padding included, and at most `budget`
    tokens, unless a single sequence is longer. Sequences of similar length keep their order, so
    packed sequences (nearly all full) keep theirs. The result depends on the arguments only: a
    shard that is captured again has the same batches.
    """
    lengths_N = np.maximum(lengths_N, 1)
    longest = lengths_N.max(initial=1)
    kinds_N = np.floor(_STEPS * np.log2(longest / lengths_N)).astype(np.int64)
    for kind in np.unique(kinds_N):
        similar = np.flatnonzero(kinds_N == kind)
        rows = max(1, budget // int(lengths_N[similar].max()))
        for start in range(0, len(similar), rows):
            yield similar[start : start + rows]


def consecutive_batches(lengths_N: NDArray[np.int64], budget: int) -> Iterator[NDArray[np.int64]]:
    """[B] row numbers of the prompts of each batch, in their order; every row comes once.

    The limit is that of `batches_of`. Lengths are mixed, since a generated token of a few prompts
    takes about as long as one of many.
    """
    start, longest = 0, 1
    for row, length in enumerate(lengths_N.tolist()):
        longest = max(longest, length)
        if row > start and longest * (row + 1 - start) > budget:
            yield np.arange(start, row)
            start, longest = row, length
    if len(lengths_N):
        yield np.arange(start, len(lengths_N))
