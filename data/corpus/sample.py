"""The beginning of a source, and which share of it that is: enough to foretell a corpus."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from .bad_rows import BadRowError
from .columns import Columns, PromptColumns
from .compressed import open_source, told_where
from .document import Document
from .formats import encoding_of
from .records import expect_answer, to_document, used_columns
from .stdlib import read_python
from .values import parse_json

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from .sources import Source

_LINE = re.compile(r"[^\r\n]*\S[^\r\n]*(?:\r\n|\r|\n|$)")
_NEXT = re.compile(r"[\s,]*(?=[^\s,\]])")
_PIECE = 1 << 14
_ENOUGH = 1 << 19
"""Compressed bytes from which on it is known how well they compress; a decompressor holds some."""
_MOST_READ = 1 << 24
"""Bytes that are decompressed at most to learn how well a source compresses."""


@dataclass(frozen=True, slots=True)
class Sample:
    """Some documents of a source."""

    documents: tuple[Document, ...]
    share: float
    """Of the source, rows that are bad included; of one text that was cut, how much is here."""
    fault: str = ""
    """What is wrong with the first bad row."""


def sample(source: Source, columns: Columns, count: int, limit: int) -> Sample | None:
    """The first documents of a source; None where their share cannot be told.

    count  documents at most
    limit  bytes that are looked at, about; at least one document of a table is read

    Raises
        ColdstillError: the source is damaged, or has not the columns that are needed
    """
    reader = _READERS.get(source.format)
    return None if reader is None else reader(source, columns, count, limit)


def _text(source: Source, columns: Columns, count: int, limit: int) -> Sample:
    data, total = _beginning(source, limit)
    document = Document(where=source.name, text=_decoded(data))
    return Sample((document,), min(1.0, len(data) / max(1.0, total)))


def _python(source: Source, columns: Columns, count: int, limit: int) -> Sample:
    assert source.path is not None
    return Sample((Document(where=source.name, text=read_python(source.path)),), 1.0)


def _json_lines(source: Source, columns: Columns, count: int, limit: int) -> Sample | None:
    data, total = _beginning(source, limit)
    lines = _LINE.findall(_decoded(data))
    whole = len(data) >= total and len(lines) <= count
    lines = lines[:count] if whole or len(lines) > count else lines[:-1]  # the last one is cut
    share = 1.0 if whole else sum(len(line.encode()) for line in lines) / total
    return _sample(source, map(_value, lines), columns, share)


def _json_list(source: Source, columns: Columns, count: int, limit: int) -> Sample | None:
    data, total = _beginning(source, limit)
    text = _decoded(data)
    records: list[Any] = []
    if not text.lstrip().startswith("["):
        return None
    decoder, end = json.JSONDecoder(), text.find("[") + 1
    while len(records) < count and (more := _NEXT.match(text, end)):
        try:
            record, end = decoder.raw_decode(text, more.end())
        except (ValueError, RecursionError):
            break  # the end of what was read
        records.append(record)
    whole = len(data) >= total and text[end:].strip() == "]"
    share = 1.0 if whole else len(text[:end].encode()) / total
    return _sample(source, records, columns, share)


def _parquet(source: Source, columns: Columns, count: int, limit: int) -> Sample | None:
    with (
        told_where(source),
        open_source(source, seekable=True) as file,
        pq.ParquetFile(file) as table,
    ):
        used = used_columns(source.name, table.schema_arrow.names, columns)
        batch = next(table.iter_batches(count, columns=used), None)
        return _of_batch(source, batch, table.metadata.num_rows, columns, limit)


def _arrow(source: Source, columns: Columns, count: int, limit: int) -> Sample | None:
    with told_where(source):
        with open_source(source) as file:
            is_file = file.read(6) == b"ARROW1"
        with open_source(source, seekable=is_file) as file:
            reader = pa.ipc.open_file(file) if is_file else pa.ipc.open_stream(file)
            used = used_columns(source.name, reader.schema.names, columns)
            if is_file:
                batch = reader.get_batch(0) if reader.num_record_batches else None
                rows = batch.num_rows * reader.num_record_batches if batch else 0
            else:
                batch = next(iter(reader), None)
                read = max(1, file.tell())
                rows = batch.num_rows * max(1.0, source.bytes / read) if batch else 0
            if batch is not None:
                batch = batch.select(used).slice(0, count)
            return _of_batch(source, batch, rows, columns, limit)


_READERS: Mapping[str, Callable[[Source, Columns, int, int], Sample | None]] = {
    "text": _text,
    "python": _python,
    "json lines": _json_lines,
    "json list": _json_list,
    "parquet": _parquet,
    "arrow": _arrow,
}


def _of_batch(
    source: Source, batch: Any, rows: float, columns: Columns, limit: int
) -> Sample | None:
    if batch is None or batch.num_rows == 0 or rows == 0:
        return None
    wanted = min(batch.num_rows, max(1, int(limit / max(1.0, batch.nbytes / batch.num_rows))))
    records = batch.slice(0, wanted).to_pylist(maps_as_pydicts="strict")
    return _sample(source, records, columns, len(records) / rows)


def _sample(
    source: Source, records: Iterable[Any], columns: Columns, share: float
) -> Sample | None:
    found, seen, fault = [], 0, ""
    for record in records:
        seen += 1
        if record is None:
            fault = fault or f"{source.name}: a record is not valid JSON"
            continue
        try:
            document = to_document(source.name, record, columns)
            if not isinstance(columns, PromptColumns):
                expect_answer(document)
            found.append(document)
        except BadRowError as bad:  # refused or counted when the corpus is prepared
            fault = fault or bad.fault
    return Sample(tuple(found), min(1.0, share), fault) if seen and share else None


def _value(text: str) -> Any:
    """What JSON stands for, None where it is not valid."""
    try:
        return parse_json(text)
    except (ValueError, RecursionError):
        return None


def _decoded(data: bytes) -> str:
    mark, encoding = encoding_of(data)
    return data[len(mark) :].decode(encoding, errors="ignore")


def _beginning(source: Source, limit: int) -> tuple[bytes, float]:
    """The first bytes of a source, decompressed, and how many there are in all, about."""
    with told_where(source):
        if source.compression is None:
            with open_source(source) as file:
                return file.read(limit), float(source.bytes)
        with pa.OSFile(str(source.path)) as raw:
            stream = pa.CompressedInputStream(raw, source.compression)
            begin, read, before = bytearray(), 0, 0
            while piece := stream.read(_PIECE):
                taken = raw.tell()
                # when it takes more of the file, it has used up all that it took before
                if read >= limit and taken > before >= _ENOUGH:
                    return bytes(begin), source.bytes * read / before
                begin += piece[: limit - len(begin)]
                read, before = read + len(piece), taken
                if read >= _MOST_READ:
                    return bytes(begin), source.bytes * read / taken
            return bytes(begin), float(read)


def spread(sources: Sequence[Source], most: int) -> list[Source]:
    """At most so many sources, evenly spaced."""
    count = min(len(sources), most)
    return [sources[i * len(sources) // count] for i in range(count)]
