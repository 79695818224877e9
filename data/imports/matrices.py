"""Rows of different lengths as one matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import ColdstillError
from ..ragged import Ragged
from .columns import NO_ID
from .rows import NOTHING

if TYPE_CHECKING:
    from numpy.typing import NDArray


def id_matrix(inner: Ragged) -> NDArray[Any]:
    """[S, K] rows of ids, filled up to the longest; an id below 0 marks a missing entry."""
    if inner.values.min(initial=0) < 0:
        inner = Ragged(np.where(inner.values < 0, NO_ID, inner.values), inner.offsets)
    return padded(inner, NOTHING)


def padded(inner: Ragged, fill: float) -> NDArray[Any]:
    """[S, K] rows of different lengths, filled up to the longest."""
    lengths = inner.lengths
    width = int(lengths.max(initial=0))
    if len(lengths) and (lengths == width).all():
        return inner.values.reshape(-1, width)
    matrix = np.full((len(lengths), width), fill, inner.values.dtype)
    matrix[np.arange(width) < lengths[:, None]] = inner.values
    return matrix


def expect_same_shape(
    name: str,
    first: int,
    one: tuple[str, Ragged, Ragged],
    other: tuple[str, Ragged, Ragged],
) -> None:
    """Refuse two columns of rows with different numbers of rows or of entries."""
    for left, right, what in ((one[1], other[1], "rows"), (one[2], other[2], "entries in a row")):
        if len(left) != len(right):
            break
        wrong = np.flatnonzero(left.lengths != right.lengths)
        if len(wrong):
            where = int(wrong[0])
            record = where
            if what != "rows":
                record = int(np.searchsorted(one[1].offsets, where, side="right")) - 1
            raise ColdstillError(
                f"{name}: record {first + record}: {left.lengths[where]} {what} in {one[0]}, but "
                f"{right.lengths[where]} in {other[0]}"
            )
