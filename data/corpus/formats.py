"""Reading every format record by record, so that memory stays flat however large a file is."""

from __future__ import annotations

import codecs
import contextlib
import io
import json
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import ColdstillError
from .document import Document
from .hub import load_hub
from .records import to_document, used_columns
from .stdlib import read_python

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from .columns import Columns
    from .sources import Source

_CHUNK = 1 << 20
_ROWS = 1024
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


def read_documents(sources: Iterable[Source], columns: Columns) -> Iterator[Document]:
    """Every document of every source, in order; a source is opened when its turn comes.

    Nothing is left out: what holds no text is an empty document, for the caller to count.

    Raises
        ColdstillError: a source is damaged, or a record is not what `columns` says
    """
    columns.expect_answers()
    for source in sources:
        is_empty = True
        for document in _READERS[source.format](source, columns):
            is_empty = False
            yield document
        if is_empty:
            raise ColdstillError(
                f"{source.name}: holds no records; write it again or leave it out of corpus.files"
            )


def _text(source: Source, columns: Columns) -> Iterator[Document]:
    yield Document(where=source.name, text="".join(_decoded(source)))


def _python(source: Source, columns: Columns) -> Iterator[Document]:
    assert source.path is not None
    with _told_where(source):
        text = read_python(source.path)
    yield Document(where=source.name, text=text)


def _json_lines(source: Source, columns: Columns) -> Iterator[Document]:
    for number, line in enumerate(_lines(_decoded(source)), start=1):
        if not line.strip(" \t"):
            continue
        where = f"{source.name}:{number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ColdstillError(
                f"{where}: not valid JSON: {_reason(error)}; repair or delete the line"
            ) from error
        yield to_document(where, record, columns)


def _json_list(source: Source, columns: Columns) -> Iterator[Document]:
    try:
        records = json.loads("".join(_decoded(source)))
    except (ValueError, RecursionError) as error:
        line = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise ColdstillError(
            f"{source.name}{line}: not valid JSON: {_reason(error)}; if every line is a record of "
            "its own, name the file .jsonl"
        ) from error
    if not isinstance(records, list):
        raise ColdstillError(
            f"{source.name}: one {type(records).__name__}, expected a list of records; put it in "
            "[ ], or write one record per line into a .jsonl"
        )
    for number, record in enumerate(records, start=1):
        yield to_document(f"{source.name}: record {number}", record, columns)


def _parquet(source: Source, columns: Columns) -> Iterator[Document]:
    with (
        _told_where(source),
        _opened(source, seekable=True) as file,
        pq.ParquetFile(file) as table,
    ):
        used = used_columns(source.name, table.schema_arrow.names, columns)
        yield from _rows(source, table.iter_batches(_ROWS, columns=used), used, columns)


def _arrow(source: Source, columns: Columns) -> Iterator[Document]:
    with _told_where(source):
        with _opened(source) as file:
            is_file = file.read(6) == b"ARROW1"  # otherwise a stream, which has no magic bytes
        with _opened(source, seekable=is_file) as file:
            reader = pa.ipc.open_file(file) if is_file else pa.ipc.open_stream(file)
            used = used_columns(source.name, reader.schema.names, columns)
            batches = reader
            if is_file:
                batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
            yield from _rows(source, batches, used, columns)


def _hub(source: Source, columns: Columns) -> Iterator[Document]:
    dataset = load_hub(source.name, source.path)
    used = used_columns(source.name, dataset.column_names, columns)
    with _told_where(source):
        # Read through `datasets`, because some of its types are not what Arrow shows.
        for number, row in enumerate(dataset.select_columns(used), start=1):
            yield to_document(f"{source.name}: record {number}", row, columns)


_READERS: Mapping[str, Callable[[Source, Columns], Iterator[Document]]] = {
    "text": _text,
    "python": _python,
    "json lines": _json_lines,
    "json list": _json_list,
    "parquet": _parquet,
    "arrow": _arrow,
    "hub": _hub,
}


def _rows(
    source: Source, batches: Iterable[Any], used: list[str], columns: Columns
) -> Iterator[Document]:
    number = 0
    for batch in batches:
        for start in range(0, batch.num_rows, _ROWS):
            try:
                rows = batch.select(used).slice(start, _ROWS).to_pylist()
            except (ValueError, KeyError) as error:  # bytes that are no text, a column named twice
                raise ColdstillError(
                    f"{source.name}: record {number + 1} or one of the {_ROWS} from there cannot "
                    f"be read: {_reason(error)}; write the file again"
                ) from error
            for row in rows:
                number += 1
                yield to_document(f"{source.name}: record {number}", row, columns)


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


def _decoded(source: Source) -> Iterator[str]:
    r"""The text of a file in pieces, with `\n` for any line ending.

    UTF-8 with or without a byte order mark, or UTF-16 with one.
    """
    # Universal newlines by hand, because `TextIOWrapper` cannot say where a byte is wrong.
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    line = 1
    with _told_where(source), _opened(source) as file:
        data = file.read(_CHUNK)
        known = (pair for pair in _BYTE_ORDER_MARKS if data.startswith(pair[0]))
        mark, encoding = next(known, (b"", "utf-8"))
        decoder = codecs.getincrementaldecoder(encoding)()
        read = len(data)
        piece = data[len(mark) :]
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


def _opened(source: Source, *, seekable: bool = False) -> Any:
    """A binary file that decompresses as it is read, or at once where it must be seekable."""
    path = str(source.path)
    if source.compression is None:
        return pa.OSFile(path)  # no memory map: some network file systems refuse them
    stream = pa.input_stream(path, compression=source.compression)
    if not seekable:
        return stream
    with stream:
        return pa.BufferReader(stream.read())


@contextlib.contextmanager
def _told_where(source: Source) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, PermissionError) as error:
        raise ColdstillError(
            f"{source.name}: cannot be opened: {error.strerror or error}; it was there when the "
            "corpus was listed, run the command again"
        ) from error
    except (OSError, pa.ArrowException) as error:
        raise ColdstillError(
            f"{source.name}: cannot be read: {_reason(error)}; it is cut short or damaged, fetch "
            "or write it again"
        ) from error


def _reason(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
