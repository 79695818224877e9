"""Which sequences are forwarded together: as many as a number of tokens allows, alike in length."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

_STEPS = 8
"""Lengths within a factor of 2^(1/8) are alike: at most a twelfth of a batch is padding."""


def batches_of(lengths_N: NDArray[np.int64], budget: int) -> Iterator[NDArray[np.int64]]:
    """[B] places of the sequences of each batch, increasing; every place comes once.

    A batch costs its rows times its longest sequence, padding included, and costs at most `budget`
    tokens, unless one sequence alone is longer. Sequences alike in length stay in their order, so
    packed ones (nearly all full) come out as they lie. A function of its arguments alone: a shard
    that is made again is made of the same batches.
    """
    lengths_N = np.maximum(lengths_N, 1)
    longest = lengths_N.max(initial=1)
    kinds_N = np.floor(_STEPS * np.log2(longest / lengths_N)).astype(np.int64)
    for kind in np.unique(kinds_N):
        alike = np.flatnonzero(kinds_N == kind)
        rows = max(1, budget // int(lengths_N[alike].max()))
        for start in range(0, len(alike), rows):
            yield alike[start : start + rows]
