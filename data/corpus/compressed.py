"""Opening a file that may be compressed, and what is wrong where that fails."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from ..errors import ColdstillError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from .sources import Source

_MAGIC = {
    b"\x1f\x8b": ("gzip", ".gz"),
    b"\x28\xb5\x2f\xfd": ("zstd", ".zst"),
    b"BZh": ("bzip2", None),
    b"\xfd7zXZ\x00": ("xz", None),
    b"\x04\x22\x4d\x18": ("lz4", None),
    b"PK\x03\x04": ("zip", None),
    b"7z\xbc\xaf\x27\x1c": ("7z", None),
    **{bytes((0x50 + i, 0x2A, 0x4D, 0x18)): ("zstd", ".zst") for i in range(16)},  # without data
}
"""What compressed files begin with, and the suffix of those that are read."""
_LARGEST_WINDOW = 1 << 27


def open_source(source: Source, *, seekable: bool = False) -> Any:
    """A binary file that decompresses as it is read, or at once where it must be seekable."""
    path = str(source.path)
    if source.compression is None:
        return pa.OSFile(path)  # no memory map: some network file systems refuse them
    stream = pa.input_stream(path, compression=source.compression)
    if not seekable:
        return stream
    with stream:
        return pa.BufferReader(stream.read())


def expect_plain(source: Source, begin: bytes) -> None:
    """Refuse text that is compressed although its name does not say so.

    begin  the first bytes of what is to be read as text

    Raises
        ColdstillError: these are no text
    """
    kind, suffix = _kind(begin)
    if kind is None:
        return
    again = " once more" if source.compression else ""
    remedy = f"name it {source.name}{suffix}" if suffix and not again else "unpack it first"
    raise ColdstillError(f"{source.name}: is compressed with {kind}{again}; {remedy}")


@contextlib.contextmanager
def told_where(source: Source) -> Iterator[None]:
    """Turn what the operating system and pyarrow raise into one line that names the source."""
    try:
        yield
    except (FileNotFoundError, PermissionError) as error:
        raise ColdstillError(
            f"{source.name}: cannot be opened: {error.strerror or error}; it was there when the "
            "corpus was listed, run the command again"
        ) from error
    except (OSError, pa.ArrowException) as error:
        told = None
        if source.compression and source.path is not None:
            told = _fault(source.compression, source.path, str(error))
        raise ColdstillError(
            f"{source.name}: cannot be read: "
            + (told or f"{reason(error)}; it is cut short or damaged, fetch or write it again")
        ) from error


def reason(error: BaseException) -> str:
    """The first line of what an exception says, or its class."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _fault(compression: str, path: Path, told: str) -> str | None:
    """What is special about a compressed file that is neither cut short nor damaged."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        begin = file.read(18)
        kind, _ = _kind(begin)
        if begin and kind != compression:
            return f"it is not compressed with {compression} but {_named(kind)}; rename it"
        if "too much memory" in told:
            window = _window(begin)
            size = f" of {window:,} bytes" if window > _LARGEST_WINDOW else ""
            return (
                f"it was compressed with a window{size} (zstd --long=28 or more), larger than the "
                f"{_LARGEST_WINDOW:,} bytes that are read; compress it again with zstd --long=27"
            )
    return None


def _kind(begin: bytes) -> tuple[str | None, str | None]:
    return next((kind for magic, kind in _MAGIC.items() if begin.startswith(magic)), (None, None))


def _named(kind: str | None) -> str:
    return "of another kind or not at all" if kind is None else f"with {kind}"


def _window(frame: bytes) -> int:
    """The window that the first frame of a zstd file needs (RFC 8878, 3.1.1.1)."""
    if not frame.startswith(b"\x28\xb5\x2f\xfd") or len(frame) < 18:
        return 0
    descriptor = frame[4]
    single, flag = descriptor >> 5 & 1, descriptor >> 6
    if not single:
        exponent, mantissa = frame[5] >> 3, frame[5] & 7
        base = 1 << (10 + exponent)
        return base + base // 8 * mantissa
    start = 5 + (0, 1, 2, 4)[descriptor & 3]
    width = (1, 2, 4, 8)[flag]
    return int.from_bytes(frame[start : start + width], "little") + (256 if width == 2 else 0)
