"""Supervised positions as runs of consecutive positions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ...ragged import Ragged

if TYPE_CHECKING:
    from numpy.typing import NDArray

_MOST_POSITIONS = 1 << 31
"""Arrow lists have 32-bit offsets."""


def to_runs(positions: Ragged) -> tuple[Ragged, Ragged]:
    """Start and length of each run."""
    values = positions.values
    begins = np.diff(values, prepend=-2) != 1
    begins[positions.offsets[:-1][positions.lengths > 0]] = True
    places = np.flatnonzero(begins)
    offsets = np.searchsorted(places, positions.offsets)
    lengths: NDArray[np.int32] = np.diff(places, append=len(values)).astype(np.int32)
    return Ragged(values[places], offsets), Ragged(lengths, offsets)


def from_runs(starts: Ragged, lengths: Ragged) -> Ragged:
    """The positions. Raises ValueError if starts and lengths do not fit together."""
    if not np.array_equal(starts.offsets, lengths.offsets) or (lengths.values < 1).any():
        raise ValueError("the runs of supervised positions have no starts, or no lengths")
    ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths.values, dtype=np.int64)])
    if ends[-1] > _MOST_POSITIONS:
        raise ValueError(f"a block of {ends[-1]} supervised positions")
    shift = starts.values - ends[:-1]
    values = np.arange(ends[-1]) + np.repeat(shift, lengths.values)
    return Ragged(values.astype(np.int32), ends[starts.offsets])
