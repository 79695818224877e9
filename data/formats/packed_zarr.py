"""Columns side by side in two Zarr arrays, for codecs whose columns nothing else can read anyway.

zarr takes about a millisecond for each array of a read, which is more than decompression does. All
columns of a block are therefore one row of the array `bytes`; the array `entries` has the number of
entries of each column. Numbers of several bytes are stored as planes, the lowest byte of all
entries first. The group's attribute `columns` has name, dtype, entry width and borders of each
column, in the order of their bytes. Borders are themselves a column, of the lengths of the lists.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np

from ..columns import list_offsets
from ..ragged import Ragged

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from ..columns import Columns


@dataclass(frozen=True, slots=True)
class PackedColumn:
    """How one column of a block lies in its bytes."""

    name: str
    dtype: str
    width: int | None
    """Numbers of an entry; None for an entry that is one number."""
    borders: str | None
    """The column with the lengths of its lists; None for a column of numbers."""

    def size(self, entries: int) -> int:
        """Bytes of some entries."""
        return entries * (1 if self.width is None else self.width) * np.dtype(self.dtype).itemsize


def described(columns: Columns) -> list[PackedColumn]:
    """The columns of a block. Lists with the same borders array share a column of lengths."""
    found: list[PackedColumn] = []
    known: dict[int, str] = {}
    for name, column in columns.items():
        if not isinstance(column, Ragged):
            found.append(PackedColumn(name, column.dtype.name, None, None))
            continue
        borders = known.get(id(column.offsets))
        if borders is None:
            borders = known[id(column.offsets)] = f"{name}.lengths"
            if borders in columns:
                raise ValueError(f"a column is called '{borders}', as the borders of '{name}'")
            found.append(PackedColumn(borders, "uint32", None, None))
        width = column.values.shape[1] if column.values.ndim == 2 else None
        found.append(PackedColumn(name, column.values.dtype.name, width, borders))
    return found


def pack(columns: Columns, order: list[PackedColumn]) -> tuple[bytes, list[int]]:
    """The bytes of a block, and the entries of each column. Raises ValueError if lists that share
    borders in the first block have others here."""
    parts: list[bytes] = []
    entries: list[int] = []
    offsets: dict[str, NDArray[np.int64]] = {}
    for column in order:
        ragged = columns.get(column.name)
        if column.borders is not None and isinstance(ragged, Ragged):
            offsets.setdefault(column.borders, ragged.offsets)
    for column in order:
        if column.name in offsets:
            array: Any = np.diff(offsets[column.name]).astype(np.uint32)
        else:
            found = columns[column.name]
            array = found
            if isinstance(found, Ragged):
                array = found.values
                if not np.array_equal(found.offsets, offsets[str(column.borders)]):
                    raise ValueError(f"'{column.name}' has lost its borders")
        entries.append(len(array))
        flat = np.ascontiguousarray(array).reshape(-1)
        parts.append(flat.view(np.uint8).reshape(-1, flat.dtype.itemsize).T.tobytes())
    return b"".join(parts), entries


def unpack(row: NDArray[np.uint8], entries: list[int], order: list[PackedColumn]) -> Columns:
    """The columns of a block. Raises ValueError if the sizes do not fit."""
    sizes = [column.size(count) for column, count in zip(order, entries, strict=True)]
    ends = list(accumulate(sizes, initial=0))
    if min(sizes, default=0) < 0 or ends[-1] > len(row) or row[ends[-1] :].any():
        raise ValueError(f"its columns have {sizes} bytes, its row {len(row)}")
    arrays = dict(_arrays(row, entries, order, ends))
    offsets: dict[str, NDArray[np.int64]] = {}
    columns: Columns = {}
    for column in order:
        if column.borders is None:
            columns[column.name] = arrays[column.name]
            continue
        if column.borders not in offsets:
            offsets[column.borders] = list_offsets(arrays[column.borders])
            columns.pop(column.borders, None)
        values = arrays[column.name]
        if offsets[column.borders][-1] != len(values):
            raise ValueError(f"'{column.name}' does not fit its borders")
        columns[column.name] = Ragged(values, offsets[column.borders])
    return columns


def _arrays(
    row: NDArray[np.uint8], entries: list[int], order: list[PackedColumn], ends: list[int]
) -> Iterator[tuple[str, NDArray[Any]]]:
    for column, count, start, end in zip(order, entries, ends, ends[1:], strict=False):
        dtype = np.dtype(column.dtype)
        planes = row[start:end].reshape(dtype.itemsize, -1)
        # a single plane needs no copy
        flat = planes[0] if dtype.itemsize == 1 else np.ascontiguousarray(planes.T).reshape(-1)
        array = flat.view(dtype)
        yield column.name, array if column.width is None else array.reshape(count, column.width)
