"""What the entries of a recipe's `files` stand for: a stable list of readable sources."""

from __future__ import annotations

import contextlib
import glob
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ColdstillError
from ..files import read_json
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
KNOWN = f"{' '.join(SUFFIXES)}, each also with .gz or .zst"

_SAVED_MARKERS = ("dataset_dict.json", "state.json", "dataset_info.json")


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


def list_sources(files: Sequence[str], base: Path) -> list[Source]:
    """Everything `files` stands for: in its order, sorted within each entry, nothing twice.

    An entry is a path relative to `base`, a glob, a folder (searched whole; hidden names are
    skipped), a dataset saved with `save_to_disk`, `stdlib:` or `hub:ORG/NAME?split=...`.

    Raises
        ColdstillError: an entry stands for nothing, or for something that cannot be read
    """
    if not files:
        raise ColdstillError("corpus.files: empty; name at least one file, folder or dataset")
    found: dict[str, Source] = {}
    for entry in files:
        with _told_where(entry):
            for source in _expand(entry, base):
                found.setdefault(source.identity, source)
    return list(found.values())


def format_of(name: str) -> tuple[str, str | None] | None:
    """The format and the compression that a file name tells, or None."""
    stem, suffix = os.path.splitext(name.lower())
    compression = COMPRESSIONS.get(suffix)
    if compression:
        suffix = os.path.splitext(stem)[1]
    return (SUFFIXES[suffix], compression) if suffix in SUFFIXES else None


def _expand(entry: str, base: Path) -> list[Source]:
    if entry == "stdlib:":
        return [_source(f"stdlib:{name}", path, "python") for name, path in stdlib_files()]
    if entry.startswith("stdlib:"):
        raise ColdstillError(f"{entry}: stands for nothing; write stdlib: alone")
    if entry.startswith("hub:"):
        check_hub_entry(entry, base)
        return [Source(name=entry, path=local_folder(entry, base), format="hub")]
    path = base / Path(entry).expanduser()
    if entry and path.is_dir():
        return _folder(entry, path)
    if path.is_file():
        return [_file(entry, path, named=True)]
    if any(character in entry for character in "*?["):
        return _glob(entry, base)
    raise ColdstillError(f"{entry!r}: no such file or folder in {base}; check corpus.files")


def _glob(pattern: str, base: Path) -> list[Source]:
    matches = sorted(glob.glob(os.path.expanduser(pattern), root_dir=base, recursive=True))
    found: list[Source] = []
    for match in matches:
        path = base / match
        if path.is_dir():
            # A folder is taken whole; one without any text is no mistake among other matches.
            found.extend(_walk(match.rstrip("/"), path, set()))
        elif path.name not in _SAVED_MARKERS and format_of(match):
            found.append(_file(match, path, named=False))
    if found:
        return found
    if files := [match for match in matches if (base / match).is_file()]:
        raise _unknown_suffix(files[0])
    raise ColdstillError(f"{pattern}: nothing matches in {base}; check corpus.files")


def _folder(name: str, path: Path) -> list[Source]:
    found = list(_walk(name.rstrip("/"), path, set()))
    if not found:
        raise ColdstillError(f"{name}: nothing to read in the folder {path}; known are {KNOWN}")
    return found


def _walk(name: str, folder: Path, seen: set[Path]) -> Iterator[Source]:
    if folder.resolve() in seen:  # a link back up
        return
    seen.add(folder.resolve())
    saved = _saved_dataset(name, folder)
    if saved is not None:
        yield from saved
        return
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from _walk(f"{name}/{path.name}", path, seen)
        elif path.is_file() and format_of(path.name):
            yield _file(f"{name}/{path.name}", path, named=False)


def _saved_dataset(name: str, folder: Path) -> list[Source] | None:
    """The Arrow files of a folder written by `datasets`' `save_to_disk`; None for any other."""
    splits_marker, state_marker, info_marker = (folder / marker for marker in _SAVED_MARKERS)
    try:
        if splits_marker.is_file():
            splits = list(read_json(splits_marker)["splits"])
            if len(splits) > 1:
                first = "train" if "train" in splits else splits[0]
                raise ColdstillError(
                    f"{name}: a saved dataset of several splits ({', '.join(splits)}); name the "
                    f"one to read: {name}/{first}"
                )
            return _saved_dataset(f"{name}/{splits[0]}", folder / splits[0])
        if not (state_marker.is_file() and info_marker.is_file()):
            return None
        state = read_json(state_marker)
        names = [str(file["filename"]) for file in state["_data_files"]]
        reordered = bool(state.get("_indices_data_files"))
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise ColdstillError(
            f"{name}: its {splits_marker.name} or {state_marker.name} is not what save_to_disk "
            "writes; save the dataset again"
        ) from error
    if reordered or not names:
        fault = "keeps its row order apart from its rows" if reordered else "has no rows"
        raise ColdstillError(f"{name}: the saved dataset {fault}; save it again")
    if missing := [file for file in names if not (folder / file).is_file()]:
        raise ColdstillError(f"{name}: {missing[0]} is missing; save or copy the dataset again")
    return [_source(f"{name}/{file}", folder / file, "arrow") for file in names]


def _file(name: str, path: Path, *, named: bool) -> Source:
    known = format_of(path.name)
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
