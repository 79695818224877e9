"""Finds the files of a source and reads their records: local, remote, and of a hub."""

from __future__ import annotations

import contextlib
import glob
import io
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from ..corpus.folders import expect_one_split, walk
from ..corpus.hub import check_hub_entry, load_hub, local_folder
from ..errors import ColdstillError, first_line

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

LINES = tuple(f".{kind}{packed}" for kind in ("jsonl", "ndjson") for packed in ("", ".gz", ".zst"))
"""Endings of files of JSON lines, which may be compressed."""
TABLES = (".parquet", ".arrow", *LINES)
"""Endings of files of records."""
_POINTER = b"version https://git-lfs.github.com/"


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFile:
    """One file of a source, or one data set of a hub."""

    name: str
    """As the user wrote it, or its path below a folder."""
    address: str
    """Path, fsspec address, or `hub:` entry."""
    size: int = 0
    """Bytes; 0 for a data set of a hub."""

    @contextlib.contextmanager
    def open(self) -> Iterator[Any]:
        """The file as a seekable stream of bytes; errors of reading it are one line."""
        with file_errors(self.name):
            if "://" in self.address:
                with fsspec.open(self.address, "rb") as stream:
                    yield stream
            else:
                with Path(self.address).open("rb") as stream:
                    yield stream

    def lines(self) -> Iterator[bytes]:
        """The lines of the file, decompressed."""
        kind = {".gz": "gzip", ".zst": "zstd"}.get(os.path.splitext(self.address)[1])
        with self.open() as stream:
            if kind is not None:  # the stream of Arrow has no lines
                stream = io.BufferedReader(pa.input_stream(stream, compression=kind))
            yield from stream


@contextlib.contextmanager
def file_errors(name: str) -> Iterator[None]:
    """Turn errors of reading a file into one line."""
    try:
        yield
    except ColdstillError:
        raise
    except (OSError, EOFError, UnicodeDecodeError, pa.ArrowException) as error:
        raise ColdstillError(
            f"{name}: cannot be read: {first_line(error)}; it is cut short or damaged, fetch it "
            "again"
        ) from error


def source_files(entries: Sequence[str], suffixes: Sequence[str]) -> list[SourceFile]:
    """The files that a source names, sorted within each entry.

    entries   files, folders, globs, fsspec addresses, or `hub:ORG/NAME?split=...`
    suffixes  endings of the files that are read in folders and globs

    Raises
        ColdstillError: an entry names nothing that can be read, or an empty file
    """
    found: dict[str, SourceFile] = {}
    for entry in entries:
        with file_errors(entry):
            for file in _expand(entry, tuple(suffixes)):
                found.setdefault(file.address, file)
    for file in found.values():
        if file.size == 0 and not file.address.startswith("hub:"):
            raise ColdstillError(f"{file.name}: the file is empty; fetch it again or leave it out")
    return list(found.values())


def _expand(entry: str, suffixes: tuple[str, ...]) -> list[SourceFile]:
    if entry.startswith("hub:"):
        check_hub_entry(entry, Path())
        return [SourceFile(name=entry, address=entry)]
    if "://" in entry:
        return _remote(entry, suffixes)
    path = Path(entry).expanduser()
    if path.is_dir():
        known = list(walk(entry, path, lambda name: _table_suffix(name, suffixes)))
        kept = [each for each in known if each.format]
        expect_one_split(entry, kept)
        files = [(each.name, each.path) for each in kept]
    elif path.is_file():
        files = [(entry, path)]
    else:
        matches = sorted(glob.glob(str(path), recursive=True))
        files = [(match, Path(match)) for match in matches if match.endswith(suffixes)]
    if not files:
        raise ColdstillError(
            f"{entry}: names no file to import; expected files that end in {' '.join(suffixes)}"
        )
    for name, each in files:
        with each.open("rb") as stream:
            if stream.read(len(_POINTER)) == _POINTER:
                raise ColdstillError(f"{name}: is a pointer of Git LFS; fetch it with git lfs pull")
    return [SourceFile(name=n, address=str(p), size=p.stat().st_size) for n, p in files]


def _table_suffix(name: str, suffixes: tuple[str, ...]) -> str | None:
    """The kind of a file that is read in a folder, for `walk` and `expect_one_split`."""
    return "records" if name.lower().endswith(suffixes) else None


def _remote(entry: str, suffixes: tuple[str, ...]) -> list[SourceFile]:
    try:
        system, path = fsspec.core.url_to_fs(entry)
        if system.isdir(path):
            paths = sorted(p for p in system.find(path) if p.lower().endswith(suffixes))
        elif any(letter in path for letter in "*?["):
            paths = sorted(p for p in system.glob(path) if p.lower().endswith(suffixes))
        else:
            paths = [path] if system.exists(path) else []
        found = [
            SourceFile(name=system.unstrip_protocol(p), address=system.unstrip_protocol(p),
                       size=int(system.size(p) or 0))
            for p in paths
        ]  # fmt: skip
    except Exception as error:  # each protocol has its own exceptions
        raise ColdstillError(
            f"{entry}: cannot be opened: {first_line(error)}; check the address and your access"
        ) from error
    if not found:
        raise ColdstillError(
            f"{entry}: names no file to import; expected files that end in {' '.join(suffixes)}"
        )
    return found


def columns_of(file: SourceFile) -> list[str]:
    """The names of the columns of a file of records; empty for other files."""
    if file.address.startswith("hub:"):
        return _hub_columns(_hub(file))
    if file.address.lower().endswith(LINES):
        for line in file.lines():
            if line.strip():
                record = _parsed(line, f"{file.name}: record 1")
                return list(record)
        return []
    if file.address.lower().endswith((".parquet", ".arrow")):
        with file.open() as stream, _table(file, stream) as (names, _, _):
            return names
    return []


def batches(
    files: Sequence[SourceFile], start: int, size: int, wanted: Callable[[list[str]], list[str]]
) -> Iterator[tuple[SourceFile, int, Any]]:
    """Records of all files from number `start` on, counted from 0, at most `size` at a time.

    wanted  chooses the columns that are read, and raises ColdstillError if one is missing

    Yields the file, the number of the first record in it, counted from 1, and a record batch of
    Arrow, or a list of objects from a file of JSON lines.
    """
    left = start
    for file in files:
        if file.address.lower().endswith(LINES):
            reader = _json_batches(file, left, size, wanted)
        else:
            reader = _table_batches(file, left, size, wanted)
        any_read = False
        for number, batch in reader:
            if batch is None:  # all records of the file were skipped
                left -= number
                break
            any_read, left = True, 0
            yield file, number, batch
        else:
            if not any_read and left == 0:
                raise ColdstillError(
                    f"{file.name}: holds no records; fetch it again or leave it out"
                )


def _json_batches(
    file: SourceFile, skip: int, size: int, wanted: Callable[[list[str]], list[str]]
) -> Iterator[tuple[int, Any]]:
    number, kept = 0, []
    for line in file.lines():
        if not line.strip():
            continue
        number += 1
        if number <= skip:
            continue
        record = _parsed(line, f"{file.name}: record {number}")
        if number == 1 or number == skip + 1:
            wanted(list(record))
        kept.append(record)
        if len(kept) == size:
            yield number - len(kept) + 1, kept
            kept = []
    if kept:
        yield number - len(kept) + 1, kept
    elif number <= skip and number:
        yield number, None


def _parsed(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ColdstillError(
            f"{where}: not valid JSON: {first_line(error)}; the file is cut short or damaged"
        ) from error
    if not isinstance(record, dict):
        raise ColdstillError(f"{where}: a {type(record).__name__}, expected an object")
    return record


def _table_batches(
    file: SourceFile, skip: int, size: int, wanted: Callable[[list[str]], list[str]]
) -> Iterator[tuple[int, Any]]:
    if file.address.startswith("hub:"):
        yield from _hub_batches(file, skip, size, wanted)
        return
    with file.open() as stream, _table(file, stream) as (names, count, read):
        if 0 < count <= skip:
            yield count, None
            return
        number = 0
        for batch in read(skip, size, wanted(names)):
            if number == 0:
                number = skip
            for begin in range(0, batch.num_rows, size):
                part = batch.slice(begin, size)
                yield number + 1, part
                number += part.num_rows


@contextlib.contextmanager
def _table(
    file: SourceFile, stream: Any
) -> Iterator[tuple[list[str], int, Callable[[int, int, list[str]], Iterator[Any]]]]:
    """The columns of a file, its number of rows, and a reader of batches after some rows."""
    if file.address.lower().endswith(".parquet"):
        with pq.ParquetFile(stream) as parquet:
            yield parquet.schema_arrow.names, parquet.metadata.num_rows, _parquet_reader(parquet)
        return
    is_file = stream.read(6) == b"ARROW1"
    stream.seek(0)
    if not is_file:
        if "://" not in file.address:  # a map, so that the batches of a stream stay on disk
            stream = pa.memory_map(file.address)
        table = pa.ipc.open_stream(stream)
        parts: list[Any] = list(table)  # a stream has no index of its batches
        names, sizes = table.schema.names, [part.num_rows for part in parts]
        yield names, sum(sizes), _ipc_reader(parts.__getitem__, sizes)
        return
    reader = pa.ipc.open_file(stream)
    sizes = [reader.get_batch(i).num_rows for i in range(reader.num_record_batches)]
    yield reader.schema.names, sum(sizes), _ipc_reader(reader.get_batch, sizes)


def _parquet_reader(parquet: Any) -> Callable[[int, int, list[str]], Iterator[Any]]:
    def read(skip: int, size: int, columns: list[str]) -> Iterator[Any]:
        groups = [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]
        first = 0
        while first < len(groups) - 1 and skip >= groups[first]:
            skip -= groups[first]
            first += 1
        chosen = list(range(first, len(groups)))
        for batch in parquet.iter_batches(size, row_groups=chosen, columns=columns):
            if skip < batch.num_rows:
                yield batch.slice(skip)
            skip = max(0, skip - batch.num_rows)

    return read


def _ipc_reader(
    get: Callable[[int], Any], sizes: list[int]
) -> Callable[[int, int, list[str]], Iterator[Any]]:
    def read(skip: int, size: int, columns: list[str]) -> Iterator[Any]:
        for index, count in enumerate(sizes):
            if skip < count:
                yield get(index).select(columns).slice(skip)
            skip = max(0, skip - count)

    return read


def _hub(file: SourceFile) -> Any:
    return load_hub(file.address, local_folder(file.address, Path()), streaming=True)


def _hub_columns(dataset: Any) -> list[str]:
    names = dataset.column_names or list(next(iter(dataset)))
    return list(names)


def _hub_batches(
    file: SourceFile, skip: int, size: int, wanted: Callable[[list[str]], list[str]]
) -> Iterator[tuple[int, Any]]:
    """Batches of a data set of a hub, which is downloaded while it is read."""
    try:
        dataset = _hub(file)
        chosen = dataset.select_columns(wanted(_hub_columns(dataset))).with_format("arrow")
        number = 0
        for table in chosen.iter(batch_size=size):
            count = table.num_rows
            if number + count > skip:
                part = table.slice(max(0, skip - number)).combine_chunks()
                for batch in part.to_batches():
                    yield max(number, skip) + 1, batch
            number += count
        if number <= skip:
            yield number, None
    except ColdstillError:
        raise
    except Exception as error:  # of the network, the hub, a decoder
        raise ColdstillError(
            f"{file.name}: cannot be read: {first_line(error)}; run the command again to continue"
        ) from error
