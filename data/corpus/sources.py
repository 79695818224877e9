"""Expands the entries of a recipe's `files` to a stable list of sources, and opens them."""

from __future__ import annotations

import contextlib
import glob
import os
import sysconfig
import tokenize
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from ..errors import ColdstillError, first_line
from ..packaged import packaged
from .folders import Candidate, choose_documents, expect_one_split, walk
from .hub import check_hub_entry, local_folder

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

SUFFIXES = {
    ".txt": "text",
    ".md": "text",
    ".rst": "text",
    ".py": "text",
    ".jsonl": "json lines",
    ".ndjson": "json lines",
    ".json": "json list",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_POINTER, _LARGEST_POINTER = b"version https://git-lfs.github.com/", 1024
"""The beginning and the largest size of a file of Git LFS that was not downloaded."""
KNOWN = f"{' '.join(SUFFIXES)}, each also with .gz or .zst"


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One file, or one dataset of a hub, and its format."""

    name: str
    """The entry as the user wrote it, and the path below a folder; equal on all machines."""
    path: Path | None
    """The path of the file or folder; None for a dataset on a hub."""
    format: str
    """A value of `SUFFIXES`, `python` or `hub`."""
    compression: str | None = None
    """`gzip` or `zstd`, by the last suffix; None if uncompressed."""
    bytes: int = 0
    """Size on disk; 0 if that is unknown."""
    modified_ns: int = 0
    """Modification time in nanoseconds; 0 if that is unknown."""
    changed_ns: int = 0
    """Time of the last change of the inode, which no program can set; 0 if that is unknown."""

    @property
    def identity(self) -> str:
        """Identifies the file, independent of its name; splits of a dataset differ."""
        if self.path is None or self.format == "hub":
            return self.name
        return str(self.path.resolve())


def list_sources(
    files: Sequence[str], base: Path, left_out: list[str] | None = None
) -> list[Source]:
    """The sources of `files`: in their order, sorted within each entry, without repetition.

    An entry is a path relative to `base`, a glob, a folder (searched whole; hidden names are
    skipped), a dataset saved with `save_to_disk`, `stdlib:`, `package:NAME/PATH` for a file or
    folder inside an installed Python package, or `hub:ORG/NAME?split=...`.

    left_out  receives the names of files in folders and globs that are not documents

    Raises
        ColdstillError: an entry names nothing, or something that cannot be read
    """
    if not files:
        raise ColdstillError("corpus.files: empty; name at least one file, folder or dataset")
    found: dict[str, Source] = {}
    unread: list[str] = []
    for entry in files:
        with _entry_errors(entry):
            for source in _expand(entry, base, unread):
                found.setdefault(source.identity, source)
    if left_out is not None:  # another entry may name such a file
        names = {source.name for source in found.values()}
        left_out += [name for name in dict.fromkeys(unread) if name not in names]
    return list(found.values())


def format_of(name: str) -> tuple[str, str | None] | None:
    """The format and the compression by a file's name; None if its suffix is unknown."""
    stem, suffix = os.path.splitext(name.lower())
    compression = COMPRESSIONS.get(suffix)
    if compression:
        suffix = os.path.splitext(stem)[1]
    return (SUFFIXES[suffix], compression) if suffix in SUFFIXES else None


def _expand(entry: str, base: Path, left_out: list[str]) -> list[Source]:
    if entry == "stdlib:":
        return [_source(f"stdlib:{name}", path, "python") for name, path in stdlib_files()]
    if entry.startswith("stdlib:"):
        raise ColdstillError(f"{entry}: names nothing; write stdlib: alone")
    if entry.startswith("hub:"):
        check_hub_entry(entry, base)
        return [Source(name=entry, path=local_folder(entry, base), format="hub")]
    path = packaged(entry, "corpus.files") or base / Path(entry).expanduser()
    if entry and path.is_dir():
        return _folder(entry, path, left_out)
    if path.is_file():
        return [_file(entry, path, named=True)]
    if any(character in entry for character in "*?["):
        return _glob(entry, base, left_out)
    raise ColdstillError(f"{entry!r}: no such file or folder in {base}; check corpus.files")


def _glob(pattern: str, base: Path, left_out: list[str]) -> list[Source]:
    matches = sorted(glob.glob(os.path.expanduser(pattern), root_dir=base, recursive=True))
    found: list[Candidate] = []
    for match in matches:
        path = base / match
        if path.is_dir():
            # A folder may have no documents if other matches have some.
            found.extend(walk(match, path, _format))
        else:
            found.append(Candidate(match, path, _format(match), path.name))
    found = list({candidate.path.resolve(): candidate for candidate in reversed(found)}.values())
    if chosen := choose_documents(found[::-1], left_out):
        return [_file(c.name, c.path, named=False, kind=c.format) for c in chosen]
    if files := [match for match in matches if (base / match).is_file()]:
        raise _unknown_suffix(files[0])
    raise ColdstillError(f"{pattern}: nothing matches in {base}; check corpus.files")


def _folder(name: str, path: Path, left_out: list[str]) -> list[Source]:
    found = choose_documents(list(walk(name, path, _format)), left_out)
    expect_one_split(name, found)
    if not found:
        raise ColdstillError(f"{name}: nothing to read in the folder {path}; known are {KNOWN}")
    return [_file(c.name, c.path, named=False, kind=c.format) for c in found]


def _format(name: str) -> str | None:
    known = format_of(name)
    return known and known[0]


def _file(name: str, path: Path, *, named: bool, kind: str | None = None) -> Source:
    known = format_of(path.name) or (kind and (kind, None))
    if known is None:
        raise _unknown_suffix(name)
    source = _source(name, path, *known)
    # Folders of source code hold empty files such as `__init__.py`, which become empty documents.
    # An empty file that was named, or that should hold records, is an error.
    if source.bytes == 0 and (named or source.format != "text"):
        raise ColdstillError(f"{name}: the file is empty; write it again or leave it out")
    return source


def _source(name: str, path: Path, kind: str, compression: str | None = None) -> Source:
    if os.fsencode(name) != name.encode(errors="replace"):
        raise ColdstillError(f"{name!a}: its file name is not valid UTF-8; rename the file")
    if not os.access(path, os.R_OK):
        raise ColdstillError(f"{name}: no permission to read the file; change its mode or owner")
    stat = path.stat()
    if stat.st_size < _LARGEST_POINTER and path.read_bytes().startswith(_POINTER):
        raise ColdstillError(
            f"{name}: is a pointer of Git LFS, not the file itself; fetch that with git lfs pull"
        )
    return Source(
        name=name,
        path=path,
        format=kind,
        compression=compression,
        bytes=stat.st_size,
        modified_ns=stat.st_mtime_ns,
        changed_ns=stat.st_ctime_ns,
    )


def _unknown_suffix(name: str) -> ColdstillError:
    suffix = "".join(Path(name).suffixes[-2:]) or "none"
    return ColdstillError(f"{name}: unknown suffix {suffix!r}; known are {KNOWN}")


@contextlib.contextmanager
def _entry_errors(entry: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        place = f" at {error.filename}" if error.filename else ""
        raise ColdstillError(
            f"{entry}: cannot be read{place}: {error.strerror or error}; check corpus.files"
        ) from error


_MAGIC = {
    b"\x1f\x8b": ("gzip", ".gz"),
    b"\x28\xb5\x2f\xfd": ("zstd", ".zst"),
    b"BZh": ("bzip2", None),
    b"\xfd7zXZ\x00": ("xz", None),
    b"\x04\x22\x4d\x18": ("lz4", None),
    b"PK\x03\x04": ("zip", None),
    b"7z\xbc\xaf\x27\x1c": ("7z", None),
    **{bytes((0x50 + i, 0x2A, 0x4D, 0x18)): ("zstd", ".zst") for i in range(16)},  # empty frames
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


# Tests are mostly tables of literals, and installed packages differ between machines.
_SKIPPED = frozenset(
    ("test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__")
)


def stdlib_files() -> list[tuple[str, Path]]:
    """Name and path of every module of the standard library, such as `json/decoder.py`, sorted.
    Raises ColdstillError if this Python was installed without its sources."""
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in _SKIPPED]
        paths = (Path(folder, name) for name in files if name.endswith(".py"))
        found += [(path.relative_to(root).as_posix(), path) for path in paths]
    if not found:
        raise ColdstillError(f"stdlib: no Python sources in {root}; name other files instead")
    return sorted(found)


def read_python(path: Path) -> str:
    r"""A module's text with `\n` line endings; empty if its encoding is invalid.

    Such files exist on purpose, as tests of the compiler.
    """
    try:
        with tokenize.open(path) as file:
            return file.read()
    except (SyntaxError, UnicodeDecodeError):
        return ""
