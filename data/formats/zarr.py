"""One Zarr version 3 group per shard: a folder that zarr and tensorstore can read.

A flat column `[N]` is an array with the column's name. A list column is the array of its values
`[S]` or `[S, W]`, whose attribute `offsets` names the array `[N + 1]` of its borders; columns with
equal borders name the same array. With `packed`, all columns are in two arrays (`packed_zarr.py`).

The chunks of an array are in a single Zarr shard, so that each array is one data object. Metadata
are not consolidated: the specification does not define it, and opening 12 columns takes 10 ms.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ..errors import ColdstillError
from ..ragged import Ragged
from .packed_zarr import PackedColumn, described, pack, unpack

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from ..columns import Columns


_DAMAGE: tuple[type[Exception], ...] = (OSError, RuntimeError, MemoryError, ArithmeticError)
_DAMAGE += (LookupError, TypeError, ValueError, AttributeError, AssertionError)
"""Errors that zarr and numcodecs raise on damaged metadata and bytes."""

_DTYPES = [f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)]
_DTYPES += ["float32", "float64"]

_BLOSC_BLOCK = 2**20
"""Bytes that Blosc compresses together. Measured at level 3 on 16,384 positions x 50, its smaller
default compressed ids to 35 %, log-probabilities to 73 % and uint8 deltas to 48 %; this value gave
32, 66 and 41 %, and decoding was 1.1 to 1.9 times as fast."""

_PACKED_BLOCK = 2**16
"""The same for packed columns, whose kinds of bytes change every few ten thousand."""

_PACKED = "columns"
"""The attribute of a group whose columns are packed."""

_LARGEST_CHUNK = 2**30  # bytes; the limit of Blosc is below 2 GiB
_LARGEST_ROW = 2**31 - 2**10
"""Bytes of a packed block, which is one chunk."""


@dataclass(frozen=True, slots=True)
class ZarrStore:
    """Zarr groups, compressed, with a checksum per chunk. A read decodes the chunks of a block."""

    name: ClassVar[str] = "zarr"
    suffix: ClassVar[str] = ".zarr"
    is_folder: ClassVar[bool] = True
    zstd: int = 3
    """Compression level, 0 (none) to 22. Blosc has 1, 3, 5 ... 15, 22; others are rounded down."""
    packed: bool = False
    """Whether all columns are in two arrays (`packed_zarr.py`), or each in an array of its own."""

    def __post_init__(self) -> None:
        if self.zstd not in range(23):
            raise ValueError(f"zstd is a level from 0 to 22, got {self.zstd!r}")
        if not isinstance(self.packed, bool):
            raise ValueError(f"packed is true or false, got {self.packed!r}")

    @classmethod
    def fitting(cls, *, compress: bool) -> ZarrStore:
        """Columns to compress are packed. Those that other tools read have an array each; they are
        never mapped, so compression always pays.

        Uncompressed, a block of 14,000 positions x 50 took 18 ms to read instead of 25, but 2.2
        times the bytes. Level 7 saved another 2 to 4 % and was half as fast.
        """
        return cls(zstd=1, packed=True) if compress else cls()

    @contextlib.contextmanager
    def create(self, path: Path) -> Iterator[Callable[[Columns], None]]:
        """Give a function that adds one block. All are written when the context ends."""
        blocks: list[Columns] = []
        yield blocks.append
        if not blocks:
            raise ValueError(f"{path}: a shard needs at least one block")
        (_write_packed if self.packed else _write)(path, blocks, self.zstd)

    def open(self, path: Path) -> ZarrShard | PackedShard:
        import zarr

        try:
            group = zarr.open_group(path, mode="r", zarr_format=3)
            # the group says itself how it is laid out, so that a shard alone can be read
            return (PackedShard if _PACKED in group.attrs else ZarrShard)(path, group)
        except _DAMAGE as error:
            raise ColdstillError(f"{path}: not a whole Zarr group: {_one_line(error)}") from error


class ZarrShard:
    """An open group. Forked processes, and others by pickle, can read it too."""

    def __init__(self, path: Path, group: Any) -> None:
        """Open every array. Raises one of `_DAMAGE` if the arrays do not fit together."""
        self._path = path
        self._rows = [int(row) for row in group.attrs["block_rows"]]
        self._bytes = {str(name): int(size) for name, size in group.attrs["bytes"].items()}
        self._arrays = {name: group[name] for name in self._bytes}
        named = {name: array.attrs.get("offsets") for name, array in self._arrays.items()}
        self._columns = {n: offsets for n, offsets in named.items() if n not in named.values()}
        self._offsets: dict[str, NDArray[np.int64]] = {}
        if self._rows[0] != 0 or self._rows != sorted(self._rows):
            raise ValueError(f"its blocks cannot have the borders {self._rows}")
        for name, array in self._arrays.items():
            _check_layout(name, array)
            self._check_data(name)
            flat = (self._rows[-1] + (name not in self._columns),)
            if named[name] is None and array.shape != flat:
                raise ValueError(f"'{name}' is {array.shape}, expected {flat}")
            if named[name] is not None and named[name] not in self._arrays:
                raise ValueError(f"'{name}' lacks its borders '{named[name]}'")

    @property
    def blocks(self) -> int:
        return len(self._rows) - 1

    def read(self, block: int) -> Columns:
        try:
            if not 0 <= block < self.blocks:
                raise IndexError(f"there are {self.blocks}")
            rows = slice(self._rows[block], self._rows[block + 1])
            return {name: self._column(name, rows) for name in self._columns}
        except _DAMAGE as error:
            where = f"{self._path}: block {block} is damaged"
            raise ColdstillError(f"{where}: {_one_line(error)}") from error

    def _column(self, name: str, rows: slice) -> NDArray[Any] | Ragged:
        self._check_data(name)
        values, borders = self._arrays[name], self._columns[name]
        if borders is None:
            return np.asarray(values[rows])
        offsets = self._borders(borders)
        if offsets[-1] != values.shape[0]:
            raise ValueError(f"'{name}' has {values.shape[0]} values, expected {offsets[-1]}")
        offsets = offsets[rows.start : rows.stop + 1]
        inside = slice(int(offsets[0]), int(offsets[-1]))
        return Ragged(np.asarray(values[inside]), offsets - offsets[0])

    def _borders(self, name: str) -> NDArray[np.int64]:
        """[N + 1] all borders, checked and read once, since every block needs some of them."""
        if name not in self._offsets:
            self._check_data(name)
            offsets = np.asarray(self._arrays[name][:])
            if offsets.dtype != np.int64 or offsets[0] != 0 or (np.diff(offsets) < 0).any():
                raise ValueError(f"'{name}' cannot be the borders of lists")
            self._offsets[name] = offsets
        return self._offsets[name]

    def _check_data(self, name: str) -> None:
        # zarr reads missing data as zeros
        size = _data_bytes(self._path, name, self._arrays[name])
        if size != self._bytes[name]:
            raise ValueError(f"'{name}' has {size} bytes of data, expected {self._bytes[name]}")


class PackedShard:
    """An open group of packed columns."""

    def __init__(self, path: Path, group: Any) -> None:
        """Open both arrays. Raises one of `_DAMAGE` if they do not fit together."""
        self._path = path
        self._bytes = {str(name): int(size) for name, size in group.attrs["bytes"].items()}
        self._order = [PackedColumn(*column) for column in group.attrs[_PACKED]]
        self._rows, entries = group["bytes"], group["entries"]
        for name, array in (("bytes", self._rows), ("entries", entries)):
            _check_layout(name, array)
            self._check_data(name, array)
        self._entries = np.asarray(entries[:]).tolist()
        expected = (len(self._entries), len(self._order))
        if entries.shape != expected or self._rows.shape[:1] != expected[:1]:
            raise ValueError(f"'bytes' is {self._rows.shape}, 'entries' is {entries.shape}")

    @property
    def blocks(self) -> int:
        return len(self._entries)

    def read(self, block: int) -> Columns:
        try:
            if not 0 <= block < self.blocks:
                raise IndexError(f"there are {self.blocks}")
            self._check_data("bytes", self._rows)
            row = np.asarray(self._rows[block : block + 1])[0]
            return unpack(row, self._entries[block], self._order)
        except _DAMAGE as error:
            where = f"{self._path}: block {block} is damaged"
            raise ColdstillError(f"{where}: {_one_line(error)}") from error

    def _check_data(self, name: str, array: Any) -> None:
        # zarr reads missing data as zeros
        size = _data_bytes(self._path, name, array)
        if size != self._bytes[name]:
            raise ValueError(f"'{name}' has {size} bytes of data, expected {self._bytes[name]}")


def _write_packed(path: Path, blocks: list[Columns], level: int) -> None:
    import zarr

    _expect_alike(blocks)
    order = described(blocks[0])
    packed = [pack(block, order) for block in blocks]
    widest = max(len(row) for row, _ in packed)
    if widest > _LARGEST_ROW:
        raise ColdstillError(
            f"{path}: a block of {widest:,} bytes is more than Blosc compresses; expected at most "
            f'{_LARGEST_ROW:,}: set store = "arrow", or a shorter sequence_length'
        )
    rows = np.zeros((len(packed), widest), np.uint8)
    for place, (row, _) in enumerate(packed):
        rows[place, : len(row)] = np.frombuffer(row, np.uint8)
    entries = np.array([counts for _, counts in packed], np.int64)
    arrays: dict[str, NDArray[Any]] = {"bytes": rows, "entries": entries}
    group = zarr.create_group(path, zarr_format=3)
    sizes = {}
    for name, values in arrays.items():
        extent = 1 if name == "bytes" else len(values)
        array = group.create_array(
            name,
            data=values,
            fill_value=0,
            config={"write_empty_chunks": True},
            **_layout(values, extent, level, _PACKED_BLOCK),
        )
        sizes[name] = _data_bytes(path, name, array)
    columns = [[c.name, c.dtype, c.width, c.borders] for c in order]
    group.attrs.put({_PACKED: columns, "bytes": sizes})  # written last


def _write(path: Path, blocks: list[Columns], level: int) -> None:
    import zarr

    rows = list(accumulate(_expect_alike(blocks), initial=0))
    group = zarr.create_group(path, zarr_format=3)
    sizes = {}
    for name, values, extent, attributes in _flat(blocks):
        array = group.create_array(
            name,
            data=values,
            fill_value=0,
            attributes=attributes,
            config={"write_empty_chunks": True},  # an array of zeros is data too
            **_layout(values, extent, level),
        )
        sizes[name] = _data_bytes(path, name, array)
    group.attrs.put(
        {"block_rows": rows, "bytes": sizes}
    )  # written last: without these attributes the group is not whole


def _flat(blocks: list[Columns]) -> Iterator[tuple[str, NDArray[Any], int, dict[str, str]]]:
    """Each array of a shard: name, values, rows of the largest block, and attributes."""
    known: dict[bytes, str] = {}
    for name in blocks[0]:
        parts: list[Any] = [block[name] for block in blocks]
        if not isinstance(parts[0], Ragged):
            yield name, np.concatenate(parts), max(map(len, parts)), {}
            continue
        whole = Ragged.concatenate(parts)
        borders = whole.offsets.tobytes()
        if borders not in known:
            known[borders] = f"{name}.offsets"
            yield known[borders], whole.offsets, len(whole.offsets), {}
        extent = max(len(part.values) for part in parts)
        yield name, whole.values, extent, {"offsets": known[borders]}


def _layout(
    values: NDArray[Any], extent: int, level: int, block: int = _BLOSC_BLOCK
) -> dict[str, Any]:
    """Chunks as large as the largest block, so that every block touches one or two chunks.

    The overhead of zarr per chunk exceeds decoding: with 2, 4 or 8 chunks per block, a read took
    1.1, 1.5 and 1.8 times as long. Bytes of equal significance are stored together, which
    compressed 32-bit ids to 32 % (by bits 33 %, unshuffled 37 %) and log-probabilities to 66 % (68,
    84).
    """
    from zarr.codecs import BloscCodec, Crc32cCodec

    size = values.dtype.itemsize
    width = tuple(max(1, axis) for axis in values.shape[1:])
    rows = max(1, min(extent, _LARGEST_CHUNK // (size * math.prod(width))))
    packing = {"cname": "zstd", "shuffle": "shuffle", "typesize": size, "blocksize": block}
    clevel = 9 if level == 22 else min(8, (level + 1) // 2)
    compressors: list[Any] = [BloscCodec(clevel=clevel, **packing), Crc32cCodec()]
    return {
        "chunks": (rows, *width),
        "shards": (-(-max(1, len(values)) // rows) * rows, *width),
        "compressors": compressors if level else compressors[1:],
    }


def _expect_alike(blocks: list[Columns]) -> list[int]:
    """Rows of each block, which must have the same columns."""
    kinds = [{name: _kind(column) for name, column in block.items()} for block in blocks]
    if any(kind != kinds[0] for kind in kinds):
        raise ValueError("the blocks of a shard differ in their columns")
    if wrong := [f"{n}: {dtype}" for n, (dtype, *_) in kinds[0].items() if dtype not in _DTYPES]:
        raise ValueError(f"columns that are not plain numbers: {', '.join(wrong)}")
    rows = [{len(column) for column in block.values()} for block in blocks]
    if any(len(lengths) != 1 for lengths in rows):
        raise ValueError("the columns of a block differ in their rows")
    return [lengths.pop() for lengths in rows]


def _kind(column: NDArray[Any] | Ragged) -> tuple[str, type, tuple[int, ...]]:
    values = column.values if isinstance(column, Ragged) else column
    return values.dtype.name, type(column), values.shape[1:]


def _check_layout(name: str, array: Any) -> None:
    # one Zarr shard of whole chunks; a damaged shape would allocate gigabytes
    rows, *width = (max(1, axis) for axis in array.shape)
    expected = (-(-rows // array.chunks[0]) * array.chunks[0], *width)
    if array.dtype.name not in _DTYPES or array.shards != expected:
        raise ValueError(f"'{name}' cannot be {array.dtype} {array.shape} in {array.shards}")


def _data_bytes(path: Path, name: str, array: Any) -> int:
    """Size of the data object of an array, which does not exist without values."""
    file = path.joinpath(name, "c", *"0" * array.ndim)
    return file.stat().st_size if file.exists() else 0


def _one_line(error: Exception) -> str:
    text = repr(error) if isinstance(error, KeyError) else str(error)
    return " ".join(text.split())
