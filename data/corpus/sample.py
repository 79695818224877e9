"""Reads the first documents of a source, to estimate a corpus before it is prepared."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from .columns import Columns, PromptColumns
from .document import BadRowError, Document, parse_json
from .formats import encoding_of, open_table
from .records import expect_answer, to_document
from .sources import open_source, read_python, source_errors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from .sources import Source

_LINE = re.compile(r"[^\r\n]*\S[^\r\n]*(?:\r\n|\r|\n|$)")
_NEXT = re.compile(r"[\s,]*(?=[^\s,\]])")
_PIECE = 1 << 14
_ENOUGH = 1 << 19
"""Compressed bytes that must be read before the ratio is known: a decompressor buffers some."""
_MOST_READ = 1 << 24
"""The most bytes that are decompressed to learn the ratio."""


@dataclass(frozen=True, slots=True)
class Sample:
    """The first documents of a source."""

    documents: tuple[Document, ...]
    share: float
    """The share of the source that was read; bad rows count as read."""
    fault: str = ""
    """The fault of the first bad row; empty if there is none."""


def sample(source: Source, columns: Columns, count: int, limit: int) -> Sample | None:
    """The first documents of a source; None if their share is unknown.

    count  largest number of documents
    limit  approximate number of bytes to read; at least one document of a table is read

    Raises
        ColdstillError: the source is damaged, or a necessary column is missing
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
    lines = (
        lines[:count] if whole or len(lines) > count else lines[:-1]
    )  # the last line is incomplete
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
            break  # the end of the bytes that were read
        records.append(record)
    whole = len(data) >= total and text[end:].strip() == "]"
    share = 1.0 if whole else len(text[:end].encode()) / total
    return _sample(source, records, columns, share)


def _table(source: Source, columns: Columns, count: int, limit: int) -> Sample | None:
    with open_table(source, columns) as table:
        batch = next(iter(table.batches(count)), None)
        rows = table.rows_after(batch)
        if batch is None or batch.num_rows == 0 or rows == 0:
            return None
        batch = batch.select(table.used).slice(0, count)
        most = max(1, int(limit / max(1.0, batch.nbytes / batch.num_rows)))
        records = batch.slice(0, most).to_pylist(maps_as_pydicts="strict")
        return _sample(source, records, columns, len(records) / rows)


_READERS: Mapping[str, Callable[[Source, Columns, int, int], Sample | None]] = {
    "text": _text,
    "python": _python,
    "json lines": _json_lines,
    "json list": _json_list,
    "parquet": _table,
    "arrow": _table,
}


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
        except BadRowError as bad:  # handled when the corpus is prepared
            fault = fault or bad.fault
    return Sample(tuple(found), min(1.0, share), fault) if seen and share else None


def _value(text: str) -> Any:
    """The value of JSON text; None if it is invalid."""
    try:
        return parse_json(text)
    except (ValueError, RecursionError):
        return None


def _decoded(data: bytes) -> str:
    mark, encoding = encoding_of(data)
    return data[len(mark) :].decode(encoding, errors="ignore")


def _beginning(source: Source, limit: int) -> tuple[bytes, float]:
    """The first bytes of a source, decompressed, and an estimate of its total size."""
    with source_errors(source):
        if source.compression is None:
            with open_source(source) as file:
                return file.read(limit), float(source.bytes)
        with pa.OSFile(str(source.path)) as raw:
            stream = pa.CompressedInputStream(raw, source.compression)
            begin, read, before = bytearray(), 0, 0
            while piece := stream.read(_PIECE):
                taken = raw.tell()
                # When it reads more of the file, it has used all bytes that it read before.
                if read >= limit and taken > before >= _ENOUGH:
                    return bytes(begin), source.bytes * read / before
                begin += piece[: limit - len(begin)]
                read, before = read + len(piece), taken
                if read >= _MOST_READ:
                    return bytes(begin), source.bytes * read / taken
            return bytes(begin), float(read)


def spread(sources: Sequence[Source], most: int) -> list[Source]:
    """At most `most` sources, evenly spaced."""
    count = min(len(sources), most)
    return [sources[i * len(sources) // count] for i in range(count)]
