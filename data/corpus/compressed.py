"""Opens files that may be compressed, with errors that name the fault."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from ..errors import ColdstillError, first_line

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
"""The first bytes of compressed files: name and, if coldstill reads the kind, suffix."""
_LARGEST_WINDOW = 1 << 27


def open_source(source: Source, *, seekable: bool = False) -> Any:
    """A binary file, decompressed while it is read, or at once if it must be seekable."""
    path = str(source.path)
    if source.compression is None:
        return pa.OSFile(path)  # no memory map: some network file systems refuse them
    stream = pa.input_stream(path, compression=source.compression)
    if not seekable:
        return stream
    with stream:
        return pa.BufferReader(stream.read())


def expect_plain(source: Source, begin: bytes) -> None:
    """Refuse a compressed file whose name has no suffix for it.

    begin  the first bytes of the text

    Raises
        ColdstillError: the bytes are those of a compressed file
    """
    kind, suffix = _kind(begin)
    if kind is None:
        return
    again = " once more" if source.compression else ""
    remedy = f"name it {source.name}{suffix}" if suffix and not again else "unpack it first"
    raise ColdstillError(f"{source.name}: is compressed with {kind}{again}; {remedy}")


@contextlib.contextmanager
def source_errors(source: Source) -> Iterator[None]:
    """Turn errors of the operating system and of pyarrow into one line that names the source."""
    try:
        yield
    except (FileNotFoundError, PermissionError) as error:
        raise ColdstillError(
            f"{source.name}: cannot be opened: {error.strerror or error}; it existed when the "
            "corpus was listed, run the command again"
        ) from error
    except (OSError, pa.ArrowException) as error:
        fault = None
        if source.compression and source.path is not None:
            fault = _fault(source.compression, source.path, str(error))
        raise ColdstillError(
            f"{source.name}: cannot be read: "
            + (fault or f"{first_line(error)}; it is cut short or damaged, fetch or write it again")
        ) from error


def _fault(compression: str, path: Path, message: str) -> str | None:
    """The fault of a compressed file that is neither truncated nor damaged; None if unknown."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        begin = file.read(18)
        kind, _ = _kind(begin)
        if begin and kind != compression:
            return f"it is not compressed with {compression} but {_named(kind)}; rename it"
        if "too much memory" in message:
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
    """The window in bytes that the first frame of a zstd file needs (RFC 8878, 3.1.1.1)."""
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
