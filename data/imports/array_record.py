"""Reads the records of an ArrayRecord file (chunks of Riegeli's format, without transposition).

Every 65,536 bytes begin with a block header of 24 bytes, which is skipped. A chunk has a header of
40 bytes: hash, size, hash, type and number of records, decoded size. The data of a simple chunk:
kind of compression, size of the packed record sizes as a varint, the packed sizes, the packed
records. The last 64 KiB hold a postscript with the position of the footer, behind the last record.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from ..errors import ColdstillError, first_line

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

_BLOCK, _BLOCK_HEADER, _CHUNK_HEADER = 1 << 16, 24, 40
_SIMPLE, _COMPRESSIONS = b"r", {b"b": "brotli", b"z": "zstd", b"s": "snappy"}
_MAGIC = 0x71930E704FDAE05E


def array_records(stream: Any, size: int, name: str) -> Iterator[bytes]:
    """The records of a file, in order. Raises ColdstillError if it is cut short or damaged."""
    try:
        end = _footer(stream, size)
        position = 0
        while position < end:
            kind, records, data, position = _chunk(stream, position)
            if kind == _SIMPLE:
                found = list(_records(data))
                if len(found) != records:
                    raise ValueError(f"{len(found)} records in a chunk of {records}")
                yield from found
            elif kind not in (b"s", b"m", b"p"):
                raise ValueError(f"chunks of the type {kind!r}, which are not read")
    except (ValueError, IndexError, OverflowError, pa.ArrowException, OSError) as error:
        raise ColdstillError(
            f"{name}: is not an ArrayRecord file, or it is cut short or damaged: "
            f"{first_line(error)}; fetch it again"
        ) from error


def _footer(stream: Any, size: int) -> int:
    if size < 2 * _BLOCK or size % _BLOCK:
        raise ValueError(f"{size:,} bytes, expected a multiple of {_BLOCK:,}")
    kind, _, data, _ = _chunk(stream, size - _BLOCK)
    if kind != _SIMPLE:
        raise ValueError("has no postscript")
    values = {number: value for number, _, value in fields(next(iter(_records(data)), b""))}
    if values.get(2) != _MAGIC or not 0 < values.get(1, 0) < size:
        raise ValueError("has no postscript")
    return int(values[1])


def _chunk(stream: Any, position: int) -> tuple[bytes, int, bytes, int]:
    """Type, number of records, data and end of the chunk at a position."""
    begin = position
    header, position = _read(stream, position, _CHUNK_HEADER)
    length = int.from_bytes(header[8:16], "little")
    if length > 1 << 32:
        raise ValueError(f"a chunk of {length:,} bytes")
    data, position = _read(stream, position, length)
    records = int.from_bytes(header[25:32], "little")
    return header[24:25], records, data, max(position, begin + records)


def _read(stream: Any, position: int, count: int) -> tuple[bytes, int]:
    """Bytes without block headers, and the position behind them."""
    parts = []
    while count:
        if position % _BLOCK == 0:
            position += _BLOCK_HEADER
        length = min(count, _BLOCK - position % _BLOCK)
        stream.seek(position)
        part = stream.read(length)
        if len(part) < length:
            raise ValueError("the file ends inside a chunk")
        parts.append(part)
        position += length
        count -= length
    return b"".join(parts), position


def _records(data: bytes) -> Iterator[bytes]:
    compression = data[:1]
    width, place = _varint(data, 1)
    sizes = varints(_unpacked(data[place : place + width], compression))
    content = _unpacked(data[place + width :], compression)
    if int(sizes.sum()) != len(content):
        raise ValueError("record sizes do not fit their content")
    start = 0
    for length in sizes.tolist():
        yield content[start : start + length]
        start += length


def _unpacked(packed: bytes, compression: bytes) -> bytes:
    if compression == b"\0":
        return packed
    if compression not in _COMPRESSIONS:
        raise ValueError(f"compressed by {compression!r}, which is not known")
    size, place = _varint(packed, 0)
    if size > 1 << 32:
        raise ValueError(f"a record of {size:,} bytes")
    if not size:
        return b""
    content: bytes = pa.decompress(
        packed[place:], decompressed_size=size, codec=_COMPRESSIONS[compression], asbytes=True
    )
    return content


def _varint(data: bytes, place: int) -> tuple[int, int]:
    """A number of 7 bits a byte, and the place behind it."""
    value = shift = 0
    while True:
        byte = data[place]
        value |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return value, place
        if shift > 63:
            raise ValueError("a number of more than 64 bits")


def varints(data: bytes) -> NDArray[np.int64]:
    """All numbers of 7 bits a byte. Raises ValueError if the last one is cut."""
    raw = np.frombuffer(data, np.uint8)
    if not len(raw):
        return np.zeros(0, np.int64)
    last = raw < 128
    if not last[-1]:
        raise ValueError("a number is cut")
    starts = np.concatenate([np.zeros(1, np.int64), np.flatnonzero(last)[:-1] + 1])
    lengths = np.diff(starts, append=len(raw))
    if lengths.max() > 10:
        raise ValueError("a number of more than 64 bits")
    within = np.arange(len(raw)) - np.repeat(starts, lengths)
    parts = (raw & 127).astype(np.uint64) << (7 * within).astype(np.uint64)
    return np.add.reduceat(parts, starts).view(np.int64)


def fields(message: bytes) -> Iterator[tuple[int, int, Any]]:
    """Number, wire type and value of each field of a protobuf message."""
    place = 0
    while place < len(message):
        key, place = _varint(message, place)
        number, kind = key >> 3, key & 7
        if kind == 0:
            value, place = _varint(message, place)
            yield number, kind, value
            continue
        if kind == 2:
            length, place = _varint(message, place)
        elif kind in (1, 5):
            length = 8 if kind == 1 else 4
        else:
            raise ValueError(f"a field of wire type {kind}")
        if place + length > len(message):
            raise ValueError("a field is cut")
        yield number, kind, message[place : place + length]
        place += length
