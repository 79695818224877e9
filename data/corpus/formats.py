"""Reads files of every format record by record, with constant memory."""

from __future__ import annotations

import codecs
import contextlib
import io
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import ColdstillError, first_line
from .columns import Columns, PromptColumns
from .document import BadRowError, Document, parse_json, refuse
from .hub import load_hub, read_rows
from .records import Reading, expect_answer, to_document, used_columns
from .sources import expect_plain, open_source, read_python, source_errors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from .sources import Source

Record = tuple[str, Any]
"""The position of a record, for messages, and its value."""
_CHUNK = 1 << 20
_ROWS = 1024
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


def read_documents(
    sources: Iterable[Source],
    columns: Columns,
    skip: Callable[[BadRowError], None] = refuse,
    reading: Reading | None = None,
) -> Iterator[Document]:
    """All documents of all sources, in order. A source is opened when it is reached.

    Records without text become empty documents, which the caller counts.

    skip     called for each bad row; the row is skipped unless this raises
    reading  receives counts of the records and of unused columns

    Raises
        ColdstillError: a source is damaged, a record does not match `columns`, or all rows of all
            sources are bad
    """
    columns.expect_answers()
    reading = Reading() if reading is None else reading
    is_any, first_bad = False, None
    for source in sources:
        is_empty = True
        for item in _READERS[source.format](source, columns, reading):
            is_empty = False
            try:
                document = (
                    item if isinstance(item, Document) else to_document(*item, columns, reading)
                )
                if not isinstance(columns, PromptColumns):
                    expect_answer(document)
            except BadRowError as bad:
                first_bad = first_bad or bad
                skip(bad)
                continue
            is_any = True
            yield document
        if is_empty:
            raise ColdstillError(
                f"{source.name}: holds no records; write it again or leave it out of corpus.files"
            )
    if first_bad is not None and not is_any:
        raise ColdstillError(f"every row is bad, the first of them: {first_bad.fault}")


def _text(source: Source, columns: Columns, reading: Reading) -> Iterator[Document]:
    yield Document(where=source.name, text="".join(_decoded(source)))


def _python(source: Source, columns: Columns, reading: Reading) -> Iterator[Document]:
    assert source.path is not None
    with source_errors(source):
        text = read_python(source.path)
    yield Document(where=source.name, text=text)


def _json_lines(source: Source, columns: Columns, reading: Reading) -> Iterator[Record]:
    for number, line in enumerate(_lines(_decoded(source)), start=1):
        if not line.strip(" \t"):
            continue
        where = f"{source.name}:{number}"
        try:
            record = parse_json(line)
        except (ValueError, RecursionError) as error:
            raise ColdstillError(
                f"{where}: not valid JSON: {first_line(error)}; repair or delete the line"
            ) from error
        yield where, record


def _json_list(source: Source, columns: Columns, reading: Reading) -> Iterator[Record]:
    try:
        records = parse_json("".join(_decoded(source)))
    except (ValueError, RecursionError) as error:
        line = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise ColdstillError(
            f"{source.name}{line}: not valid JSON: {first_line(error)}; if each line is one "
            "record, name the file .jsonl"
        ) from error
    if not isinstance(records, list):
        raise ColdstillError(
            f"{source.name}: one {type(records).__name__}, expected a list of records; put it in "
            "[ ], or write one record per line into a .jsonl"
        )
    for number, record in enumerate(records, start=1):
        yield f"{source.name}: record {number}", record


@dataclass(frozen=True, slots=True)
class OpenTable:
    """An open Parquet or Arrow file."""

    names: list[str]
    used: list[str]
    """The columns that documents can be made of."""
    batches: Callable[[int], Iterator[Any]]
    """Yields record batches; those of Parquet have at most so many rows, and only used columns."""
    rows_after: Callable[[Any], float]
    """Estimates the number of rows in the file, after the first batch (None if there is none)."""


@contextlib.contextmanager
def open_table(source: Source, columns: Columns) -> Iterator[OpenTable]:
    """Open a Parquet file, an Arrow file or an Arrow stream. Raises ColdstillError if the file is
    damaged, or a necessary column is missing."""
    with source_errors(source), contextlib.ExitStack() as stack:
        if source.format == "parquet":
            file = stack.enter_context(open_source(source, seekable=True))
            parquet = stack.enter_context(pq.ParquetFile(file))
            names = parquet.schema_arrow.names
            used = used_columns(source.name, names, columns)
            yield OpenTable(
                names,
                used,
                lambda size: parquet.iter_batches(size, columns=used),
                lambda first: float(parquet.metadata.num_rows),
            )
            return
        with open_source(source) as begin:
            is_file = begin.read(6) == b"ARROW1"  # otherwise a stream, which has no magic bytes
        file = stack.enter_context(open_source(source, seekable=is_file))
        reader = pa.ipc.open_file(file) if is_file else pa.ipc.open_stream(file)
        names = reader.schema.names
        used = used_columns(source.name, names, columns)

        def batches(size: int) -> Iterator[Any]:
            if not is_file:
                return iter(reader)
            return (reader.get_batch(i) for i in range(reader.num_record_batches))

        def rows_after(first: Any) -> float:
            rows = 0 if first is None else first.num_rows
            if is_file:
                return float(rows * reader.num_record_batches)
            return float(rows * max(1.0, source.bytes / max(1, file.tell())))

        yield OpenTable(names, used, batches, rows_after)


def _table(source: Source, columns: Columns, reading: Reading) -> Iterator[Record]:
    with open_table(source, columns) as table:
        count_unread = _unread(table.names, table.used, reading)
        number = 0
        for batch in table.batches(_ROWS):
            count_unread(batch.num_rows)
            for start in range(0, batch.num_rows, _ROWS):
                try:
                    rows = batch.select(table.used).slice(start, _ROWS)
                    rows = rows.to_pylist(maps_as_pydicts="strict")
                except Exception as error:  # bytes that are not text, repeated names, times
                    raise ColdstillError(
                        f"{source.name}: record {number + 1} or one of the {_ROWS} from there "
                        f"cannot be read: {first_line(error)}; write the file again"
                    ) from error
                for row in rows:
                    number += 1
                    yield f"{source.name}: record {number}", row


def _hub(source: Source, columns: Columns, reading: Reading) -> Iterator[Record]:
    dataset = load_hub(source.name, source.path)
    used = used_columns(source.name, dataset.column_names, columns)
    _unread(dataset.column_names, used, reading)(len(dataset))
    # Read through `datasets`: some of its types differ from those of Arrow.
    for number, row in enumerate(read_rows(source.name, dataset, used), start=1):
        yield f"{source.name}: record {number}", row


def _unread(names: Iterable[str], used: list[str], reading: Reading) -> Callable[[int], None]:
    """A function that counts rows in which the other columns were not read."""
    unread = [name for name in names if name not in used]
    return lambda rows: reading.unused.update(dict.fromkeys(unread, rows))


_READERS: Mapping[
    str, Callable[[Source, Columns, Reading], Iterator[Document] | Iterator[Record]]
] = {
    "text": _text,
    "python": _python,
    "json lines": _json_lines,
    "json list": _json_list,
    "parquet": _table,
    "arrow": _table,
    "hub": _hub,
}


def _lines(chunks: Iterable[str]) -> Iterator[str]:
    r"""Split at `\n` alone: `str.splitlines` also splits at U+2028, which JSON may hold."""
    pending: list[str] = []
    for chunk in chunks:
        first, *others = chunk.split("\n")
        pending.append(first)
        if others:
            yield "".join(pending)
            yield from others[:-1]
            pending = others[-1:]
    yield "".join(pending)


def encoding_of(begin: bytes) -> tuple[bytes, str]:
    """The byte order mark at the beginning of a text, and the encoding."""
    known = (pair for pair in _BYTE_ORDER_MARKS if begin.startswith(pair[0]))
    return next(known, (b"", "utf-8"))


def _decoded(source: Source) -> Iterator[str]:
    r"""The text of a file in pieces, with `\n` for any line ending.

    UTF-8 with or without a byte order mark, or UTF-16 with one.
    """
    # `TextIOWrapper` does not report the position of an invalid byte.
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    line = 1
    with source_errors(source), open_source(source) as file:
        data = file.read(_CHUNK)
        mark, encoding = encoding_of(data)
        decoder = codecs.getincrementaldecoder(encoding)()
        read = len(data)
        piece = data[len(mark) :]
        expect_plain(source, data)
        while True:
            try:
                text = newlines.decode(decoder.decode(piece, not data), not data)
            except UnicodeDecodeError as error:
                before = error.object[: error.start].decode(encoding)
                line += newlines.decode(before, True).count("\n")
                raise ColdstillError(
                    f"{source.name}:{line}: byte {read - len(error.object) + error.start} "
                    f"(0x{error.object[error.start]:02x}) is not valid {encoding[:6].upper()}; "
                    "save the file as UTF-8"
                ) from error
            line += text.count("\n")
            yield text
            if not data:
                return
            data = piece = file.read(_CHUNK)
            read += len(data)
