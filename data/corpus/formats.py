"""Reading every format record by record, so that memory stays flat however large a file is."""

from __future__ import annotations

import codecs
import io
import json
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import ColdstillError
from .bad_rows import BadRowError, refuse
from .columns import Columns, PromptColumns
from .compressed import expect_plain, open_source, reason, told_where
from .document import Document
from .hub import load_hub, read_rows
from .records import Reading, expect_answer, to_document, used_columns
from .stdlib import read_python
from .values import parse_json

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from .sources import Source

Record = tuple[str, Any]
"""Where a record stands, and what stands there."""
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
    """Every document of every source, in order; a source is opened when its turn comes.

    Nothing is left out: what holds no text is an empty document, for the caller to count.

    skip     told of each bad row, which is left out unless this raises
    reading  filled with what is found out about the records

    Raises
        ColdstillError: a source is damaged, a record is not what `columns` says, or every row of
            all sources is bad
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
    with told_where(source):
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
                f"{where}: not valid JSON: {reason(error)}; repair or delete the line"
            ) from error
        yield where, record


def _json_list(source: Source, columns: Columns, reading: Reading) -> Iterator[Record]:
    try:
        records = parse_json("".join(_decoded(source)))
    except (ValueError, RecursionError) as error:
        line = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise ColdstillError(
            f"{source.name}{line}: not valid JSON: {reason(error)}; if every line is a record of "
            "its own, name the file .jsonl"
        ) from error
    if not isinstance(records, list):
        raise ColdstillError(
            f"{source.name}: one {type(records).__name__}, expected a list of records; put it in "
            "[ ], or write one record per line into a .jsonl"
        )
    for number, record in enumerate(records, start=1):
        yield f"{source.name}: record {number}", record


def _parquet(source: Source, columns: Columns, reading: Reading) -> Iterator[Record]:
    with (
        told_where(source),
        open_source(source, seekable=True) as file,
        pq.ParquetFile(file) as table,
    ):
        names = table.schema_arrow.names
        used = used_columns(source.name, names, columns)
        batches = table.iter_batches(_ROWS, columns=used)
        yield from _rows(source, batches, used, _unread(names, used, reading))


def _arrow(source: Source, columns: Columns, reading: Reading) -> Iterator[Record]:
    with told_where(source):
        with open_source(source) as file:
            is_file = file.read(6) == b"ARROW1"  # otherwise a stream, which has no magic bytes
        with open_source(source, seekable=is_file) as file:
            reader = pa.ipc.open_file(file) if is_file else pa.ipc.open_stream(file)
            used = used_columns(source.name, reader.schema.names, columns)
            batches = reader
            if is_file:
                batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
            yield from _rows(source, batches, used, _unread(reader.schema.names, used, reading))


def _hub(source: Source, columns: Columns, reading: Reading) -> Iterator[Record]:
    dataset = load_hub(source.name, source.path)
    used = used_columns(source.name, dataset.column_names, columns)
    _unread(dataset.column_names, used, reading)(len(dataset))
    # Read through `datasets`, because some of its types are not what Arrow shows.
    for number, row in enumerate(read_rows(source.name, dataset, used), start=1):
        yield f"{source.name}: record {number}", row


def _unread(names: Iterable[str], used: list[str], reading: Reading) -> Callable[[int], None]:
    """What counts rows whose other columns are not even read."""
    unread = [name for name in names if name not in used]
    return lambda rows: reading.unused.update(dict.fromkeys(unread, rows))


_READERS: Mapping[
    str, Callable[[Source, Columns, Reading], Iterator[Document] | Iterator[Record]]
] = {
    "text": _text,
    "python": _python,
    "json lines": _json_lines,
    "json list": _json_list,
    "parquet": _parquet,
    "arrow": _arrow,
    "hub": _hub,
}


def _rows(
    source: Source, batches: Iterable[Any], used: list[str], count_unread: Callable[[int], None]
) -> Iterator[Record]:
    number = 0
    for batch in batches:
        count_unread(batch.num_rows)
        for start in range(0, batch.num_rows, _ROWS):
            try:
                rows = batch.select(used).slice(start, _ROWS).to_pylist(maps_as_pydicts="strict")
            except Exception as error:  # bytes that are no text, a column or key named twice, times
                raise ColdstillError(
                    f"{source.name}: record {number + 1} or one of the {_ROWS} from there cannot "
                    f"be read: {reason(error)}; write the file again"
                ) from error
            for row in rows:
                number += 1
                yield f"{source.name}: record {number}", row


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
    """The byte order mark with which text begins, and its encoding."""
    known = (pair for pair in _BYTE_ORDER_MARKS if begin.startswith(pair[0]))
    return next(known, (b"", "utf-8"))


def _decoded(source: Source) -> Iterator[str]:
    r"""The text of a file in pieces, with `\n` for any line ending.

    UTF-8 with or without a byte order mark, or UTF-16 with one.
    """
    # Universal newlines by hand, because `TextIOWrapper` cannot say where a byte is wrong.
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    line = 1
    with told_where(source), open_source(source) as file:
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
