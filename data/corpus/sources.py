"""What the entries of a recipe's `files` stand for: a stable list of readable sources."""

from __future__ import annotations

import contextlib
import glob
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ColdstillError
from .folders import Candidate, choose_documents, expect_one_split, walk
from .hub import check_hub_entry, local_folder
from .stdlib import stdlib_files

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
"""What a clone without Git LFS has in the place of large files."""
KNOWN = f"{' '.join(SUFFIXES)}, each also with .gz or .zst"


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One file, or one dataset of a hub, and how it is to be read."""

    name: str
    """As the user wrote it, with the part that a folder or a glob adds; the same on any machine."""
    path: Path | None
    """Where it lies, or None for what only a hub has."""
    format: str
    """A value of `SUFFIXES`, or `python` or `hub`."""
    compression: str | None = None
    """`gzip` or `zstd`, by the last suffix."""
    bytes: int = 0
    """Its size on disk; 0 where that is not known before it is fetched."""
    modified_ns: int = 0
    """When it was last written; 0 where that is not known."""
    changed_ns: int = 0
    """When the file system last touched it, which no program can set back; 0 likewise."""

    @property
    def identity(self) -> str:
        """The same for one file however it was named; splits of one dataset differ."""
        if self.path is None or self.format == "hub":
            return self.name
        return str(self.path.resolve())


def list_sources(
    files: Sequence[str], base: Path, left_out: list[str] | None = None
) -> list[Source]:
    """Everything `files` stands for: in its order, sorted within each entry, nothing twice.

    An entry is a path relative to `base`, a glob, a folder (searched whole; hidden names are
    skipped), a dataset saved with `save_to_disk`, `stdlib:` or `hub:ORG/NAME?split=...`.

    left_out  filled with the names of those files of folders and globs that are not documents

    Raises
        ColdstillError: an entry stands for nothing, or for something that cannot be read
    """
    if not files:
        raise ColdstillError("corpus.files: empty; name at least one file, folder or dataset")
    found: dict[str, Source] = {}
    unread: list[str] = []
    for entry in files:
        with _told_where(entry):
            for source in _expand(entry, base, unread):
                found.setdefault(source.identity, source)
    if left_out is not None:  # another entry may name such a file itself
        names = {source.name for source in found.values()}
        left_out += [name for name in dict.fromkeys(unread) if name not in names]
    return list(found.values())


def format_of(name: str) -> tuple[str, str | None] | None:
    """The format and the compression that a file name tells, or None."""
    stem, suffix = os.path.splitext(name.lower())
    compression = COMPRESSIONS.get(suffix)
    if compression:
        suffix = os.path.splitext(stem)[1]
    return (SUFFIXES[suffix], compression) if suffix in SUFFIXES else None


def _expand(entry: str, base: Path, left_out: list[str]) -> list[Source]:
    if entry == "stdlib:":
        return [_source(f"stdlib:{name}", path, "python") for name, path in stdlib_files()]
    if entry.startswith("stdlib:"):
        raise ColdstillError(f"{entry}: stands for nothing; write stdlib: alone")
    if entry.startswith("hub:"):
        check_hub_entry(entry, base)
        return [Source(name=entry, path=local_folder(entry, base), format="hub")]
    path = base / Path(entry).expanduser()
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
            # A folder is taken whole; one without any text is no mistake among other matches.
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
    # A folder of sources is full of empty `__init__.py`; those become empty documents, which the
    # caller counts. A file asked for by name, or one that should hold records, is a mistake.
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
def _told_where(entry: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        place = f" at {error.filename}" if error.filename else ""
        raise ColdstillError(
            f"{entry}: cannot be read{place}: {error.strerror or error}; check corpus.files"
        ) from error
