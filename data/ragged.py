"""Rows of different lengths, one after the other in one array."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Self, cast

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, eq=False)
class Ragged:
    """`len(offsets) - 1` rows; row `i` is `values[offsets[i]:offsets[i + 1]]`.

    values  [S]      all rows, one after the other
    offsets [N + 1]  int64, `offsets[0] == 0`, `offsets[-1] == S`
    """

    values: NDArray[Any]
    offsets: NDArray[np.int64]

    @classmethod
    def from_rows(cls, rows: Sequence[Any], dtype: Any) -> Ragged:
        """Lay out a list of array-likes. An empty list gives no rows."""
        offsets = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum([len(row) for row in rows], out=offsets[1:])
        values = np.empty(int(offsets[-1]), dtype=dtype)
        for row, start, end in zip(rows, offsets[:-1], offsets[1:], strict=True):
            values[start:end] = row
        return cls(values, offsets)

    @classmethod
    def concatenate(cls, parts: Sequence[Ragged]) -> Ragged:
        """All rows of all parts, in order."""
        lengths = np.concatenate([part.lengths for part in parts])
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
        return cls(np.concatenate([part.values for part in parts]), offsets)

    @classmethod
    def gather(cls, chosen: Sequence[tuple[Ragged, int]]) -> Ragged:
        """Rows of several parts, each named by its part and its index there, in the order given."""
        rows = [part[index] for part, index in chosen]
        offsets = np.zeros(len(rows) + 1, np.int64)
        np.cumsum([len(row) for row in rows], out=offsets[1:])
        return cls(np.concatenate(rows), offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> NDArray[Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.values[self.offsets[index] : self.offsets[index + 1]]

    def __iter__(self) -> Iterator[NDArray[Any]]:
        return (self[index] for index in range(len(self)))

    @property
    def lengths(self) -> NDArray[np.int64]:
        """[N] length of each row."""
        return np.diff(self.offsets)

    def flat_indices(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Indices of the chosen rows in `values`, row after row."""
        lengths = self.lengths[rows]
        ends = np.cumsum(lengths)
        # one repetition, since every read of a store does this
        shifts = self.offsets[:-1][rows] - (ends - lengths)
        return np.repeat(shifts, lengths) + np.arange(int(ends[-1]) if len(ends) else 0)

    def take(self, rows: NDArray[np.int64]) -> Ragged:
        """The chosen rows in the order given. A row may be chosen more than once."""
        offsets = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum(self.lengths[rows], out=offsets[1:])
        return Ragged(self.values[self.flat_indices(rows)], offsets)


def places_in(lengths: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For each entry of rows of these lengths, row after row: its row, and its place there."""
    rows = np.repeat(np.arange(len(lengths)), lengths)
    return rows, np.arange(len(rows)) - np.repeat(np.cumsum(lengths) - lengths, lengths)


class Rows:
    """Base of dataclasses whose fields all have one row per sequence, or per position."""

    __slots__ = ()

    def take(self, rows: NDArray[np.int64]) -> Self:
        """The chosen rows in the order given."""
        values = {f.name: getattr(self, f.name) for f in fields(cast("Any", self))}
        return type(self)(**{name: _take(value, rows) for name, value in values.items()})

    @classmethod
    def concatenate(cls, parts: Sequence[Self]) -> Self:
        """All rows of all parts, in order."""
        names = [f.name for f in fields(cast("Any", cls))]
        return cls(**{name: join([getattr(part, name) for part in parts]) for name in names})


def _take(value: Any, rows: NDArray[np.int64]) -> Any:
    if value is None or isinstance(value, np.ndarray):
        return value if value is None else value[rows]
    return value.take(rows)


def join(parts: list[Any]) -> Any:
    """The rows of all parts, in order: of arrays or of what has rows; None if the first is."""
    if parts[0] is None or isinstance(parts[0], np.ndarray):
        return None if parts[0] is None else np.concatenate(parts)
    return type(parts[0]).concatenate(parts)
