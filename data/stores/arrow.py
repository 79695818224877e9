"""One Arrow IPC file per shard, memory-mapped. A block of sequences is one record batch."""

from __future__ import annotations

import contextlib
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


_DAMAGE = (pa.ArrowException, OSError, ValueError)
"""What pyarrow raises on bytes that are not what they should be."""


@dataclass(frozen=True, slots=True)
class ArrowStore:
    """Uncompressed, so that a read is a view of the mapped file."""

    name: ClassVar[str] = "arrow"
    suffix: ClassVar[str] = ".arrow"

    @contextlib.contextmanager
    def create(self, path: Path) -> Iterator[Callable[[Columns], None]]:
        """Give a function that adds one block, as a record batch."""
        writer: Any = None

        def add(columns: Columns) -> None:
            nonlocal writer
            arrays = {name: _to_arrow(column) for name, column in columns.items()}
            batch = pa.RecordBatch.from_arrays(list(arrays.values()), names=list(arrays))
            writer = writer or pa.ipc.new_file(sink, batch.schema)
            writer.write_batch(batch)

        with pa.OSFile(str(path), "wb") as sink:
            yield add
            if writer is None:
                raise ValueError(f"{path}: a shard needs at least one block")
            writer.close()

    def open(self, path: Path) -> ArrowShard:
        """Map the file and read its footer."""
        try:
            return ArrowShard(path, pa.ipc.open_file(pa.memory_map(str(path))))
        except _DAMAGE as error:
            raise ColdstillError(f"{path}: not a whole Arrow file: {error}") from error


class ArrowShard:
    """A mapped Arrow file."""

    def __init__(self, path: Path, reader: Any) -> None:
        """Wrap an open IPC file reader."""
        self._path = path
        self._reader = reader

    @property
    def blocks(self) -> int:
        """How many record batches it holds."""
        return int(self._reader.num_record_batches)

    def read(self, block: int) -> Columns:
        """One record batch as views of the file."""
        try:
            batch = self._reader.get_batch(block)
            return {
                name: _from_arrow(column)
                for name, column in zip(batch.schema.names, batch.columns, strict=True)
            }
        except _DAMAGE as error:
            raise ColdstillError(f"{self._path}: block {block} is damaged: {error}") from error


def _to_arrow(column: NDArray[Any] | Ragged) -> Any:
    if not isinstance(column, Ragged):
        return pa.array(column)
    values = column.values
    flat = pa.array(np.ascontiguousarray(values).reshape(-1))
    if values.ndim == 2:
        flat = pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
    return pa.ListArray.from_arrays(pa.array(column.offsets.astype(np.int32)), flat)


def _from_arrow(column: Any) -> NDArray[Any] | Ragged:
    if not pa.types.is_list(column.type):
        flat_column: NDArray[Any] = column.to_numpy(zero_copy_only=True)
        return flat_column
    offsets = column.offsets.to_numpy(zero_copy_only=True).astype(np.int64)
    values = column.values
    # Arrow trusts these; unchecked, one damaged bit asks for gigabytes
    if offsets[0] != 0 or offsets[-1] != len(values) or (np.diff(offsets) < 0).any():
        raise ValueError("the borders of its lists do not fit their values")
    if pa.types.is_fixed_size_list(values.type):
        width = values.type.list_size
        return Ragged(values.values.to_numpy(zero_copy_only=True).reshape(-1, width), offsets)
    return Ragged(values.to_numpy(zero_copy_only=True), offsets)
