"""One memory-mapped Arrow IPC file per shard. A block of sequences is one record batch."""

from __future__ import annotations

import contextlib
import json
import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa

from ..errors import ColdstillError
from ..ragged import Ragged

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from ..columns import Columns


_DAMAGE = (pa.ArrowException, OSError, ValueError, KeyError, TypeError, AttributeError)
"""Errors that pyarrow and this file raise on damaged bytes."""
_PLANES = b"byte_planes"


@dataclass(frozen=True, slots=True)
class ArrowStore:
    """Arrow files, uncompressed (a read is a view of the mapped file) or as byte planes under zstd.

    With compression, numbers of two or more bytes in a list are split into one field per byte
    (`head_ids.0`, `head_ids.1`, lowest byte first). High bytes are mostly equal, and zstd sees it
    only if they are adjacent. Lists with shared borders become one list of structs, because the
    start of zstd for each buffer costs as much as decompressing 10,000 bytes.
    """

    name: ClassVar[str] = "arrow"
    suffix: ClassVar[str] = ".arrow"
    is_folder: ClassVar[bool] = False

    zstd: int = 0
    """Compression level, 1 to 22, or 0 for none."""

    def __post_init__(self) -> None:
        if not 0 <= operator.index(self.zstd) <= 22:
            raise ValueError(f"zstd {self.zstd}: a level from 1 to 22, or 0 for none")

    @classmethod
    def fitting(cls, *, compress: bool) -> ArrowStore:
        """Level 1 or none. On the columns of `compact`, levels 3 to 12 made larger files than
        level 1, since their longer matches cost more than the codes of single bytes; level 19 saved
        2.5 % and was 20 times slower to write."""
        return cls(zstd=1 if compress else 0)

    @contextlib.contextmanager
    def create(self, path: Path) -> Iterator[Callable[[Columns], None]]:
        writer: Any = None
        codec = pa.Codec("zstd", compression_level=self.zstd) if self.zstd else None

        def add(columns: Columns) -> None:
            nonlocal writer
            if self.zstd:
                arrays = _grouped(_split(columns))
            else:
                arrays = {name: _to_arrow(column) for name, column in columns.items()}
            batch = pa.RecordBatch.from_arrays(list(arrays.values()), names=list(arrays))
            if writer is None:
                schema = batch.schema
                if self.zstd:
                    schema = schema.with_metadata({_PLANES: json.dumps(_types(columns))})
                options = pa.ipc.IpcWriteOptions(compression=codec)
                writer = pa.ipc.new_file(sink, schema, options=options)
            writer.write_batch(batch)

        with pa.OSFile(str(path), "wb") as sink:
            yield add
            if writer is None:
                raise ValueError(f"{path}: a shard needs at least one block")
            writer.close()

    def open(self, path: Path) -> ArrowShard:
        try:
            reader = pa.ipc.open_file(pa.memory_map(str(path)))
            planes = json.loads((reader.schema.metadata or {}).get(_PLANES, b"{}"))
            return ArrowShard(path, reader, {name: np.dtype(t) for name, t in planes.items()})
        except _DAMAGE as error:
            raise ColdstillError(f"{path}: not a whole Arrow file: {error}") from error


class ArrowShard:
    """An open, memory-mapped Arrow file."""

    def __init__(self, path: Path, reader: Any, planes: dict[str, np.dtype[Any]]) -> None:
        self._path = path
        self._reader = reader
        self._planes = planes

    @property
    def blocks(self) -> int:
        return int(self._reader.num_record_batches)

    def read(self, block: int) -> Columns:
        try:
            batch = self._reader.get_batch(block)
            columns: Columns = {}
            for name, column in zip(batch.schema.names, batch.columns, strict=True):
                columns |= _from_arrow(name, column)
            for name, dtype in self._planes.items():
                _join(columns, name, dtype)
        except _DAMAGE as error:
            raise ColdstillError(f"{self._path}: block {block} is damaged: {error}") from error
        return columns


def _types(columns: Columns) -> dict[str, str]:
    """The columns to split, with their dtypes: lists of numbers of several bytes."""
    return {
        name: column.values.dtype.name
        for name, column in columns.items()
        if isinstance(column, Ragged) and column.values.dtype.itemsize > 1
    }


def _split(columns: Columns) -> Columns:
    """Split each list of several-byte numbers into one list per byte."""
    stored: Columns = {}
    split = _types(columns)
    for name, column in columns.items():
        if name not in split:
            stored[name] = column
            continue
        assert isinstance(column, Ragged)
        values = np.ascontiguousarray(column.values)
        size = values.dtype.itemsize
        bytes_ = values.view(np.uint8).reshape(*values.shape, size)
        for place in range(size):
            stored[f"{name}.{place}"] = Ragged(bytes_[..., place], column.offsets)
    return stored


def _join(columns: Columns, name: str, dtype: np.dtype[Any]) -> None:
    planes = [columns.pop(f"{name}.{place}") for place in range(dtype.itemsize)]
    first = planes[0]
    if not isinstance(first, Ragged):
        raise ValueError(f"the byte planes of '{name}' are not lists")
    values = np.empty(first.values.shape, dtype)
    bytes_ = values.view(np.uint8).reshape(*values.shape, dtype.itemsize)
    for place, plane in enumerate(planes):
        if not isinstance(plane, Ragged) or plane.values.shape != values.shape:
            raise ValueError(f"the byte planes of '{name}' differ in shape")
        bytes_[..., place] = plane.values
    columns[name] = Ragged(values, first.offsets)


def _grouped(columns: Columns) -> dict[str, Any]:
    """Lists with shared borders as one list of structs, with the name of the first.

    Borders are shared if they are the same array object. Equal borders could be a coincidence of
    one block.
    """
    arrays: dict[str, Any] = {}
    groups: dict[int, dict[str, Ragged]] = {}
    for name, column in columns.items():
        if isinstance(column, Ragged):
            groups.setdefault(id(column.offsets), {})[name] = column
        else:
            arrays[name] = _to_arrow(column)
    for group in groups.values():
        fields = pa.StructArray.from_arrays([_values(c) for c in group.values()], list(group))
        first = next(iter(group))
        arrays[first] = _list(fields, group[first].offsets)
    return arrays


def _to_arrow(column: NDArray[Any] | Ragged) -> Any:
    return (
        _list(_values(column), column.offsets) if isinstance(column, Ragged) else pa.array(column)
    )


def _values(column: Ragged) -> Any:
    flat = pa.array(np.ascontiguousarray(column.values).reshape(-1))
    if column.values.ndim == 2:
        return pa.FixedSizeListArray.from_arrays(flat, column.values.shape[1])
    return flat


def _list(values: Any, offsets: NDArray[np.int64]) -> Any:
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), values)


def _from_arrow(name: str, column: Any) -> Columns:
    """One column, or all columns of a list of structs."""
    if not pa.types.is_list(column.type):
        return {name: column.to_numpy(zero_copy_only=True)}
    offsets = column.offsets.to_numpy(zero_copy_only=True).astype(np.int64)
    values = column.values
    # Arrow does not check these; one damaged bit would allocate gigabytes
    if offsets[0] != 0 or offsets[-1] != len(values) or (np.diff(offsets) < 0).any():
        raise ValueError("the borders of its lists do not fit their values")
    if not pa.types.is_struct(values.type):
        return {name: Ragged(_to_numpy(values), offsets)}
    fields = [field.name for field in values.type]
    return {inner: Ragged(_to_numpy(values.field(inner)), offsets) for inner in fields}


def _to_numpy(values: Any) -> NDArray[Any]:
    array: NDArray[Any]
    if pa.types.is_fixed_size_list(values.type):
        width = values.type.list_size
        array = values.values.to_numpy(zero_copy_only=True).reshape(-1, width)
    else:
        array = values.to_numpy(zero_copy_only=True)
    return array
