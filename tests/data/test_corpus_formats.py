"""Files of every format, encoding and compression; some are damaged."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import itertools
import json
import os
import tracemalloc
import zipfile
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import refusals
from coldstill.data.corpus.columns import Columns
from coldstill.data.corpus.document import BadRowError, Document, refuse
from coldstill.data.corpus.formats import read_documents
from coldstill.data.corpus.records import Reading
from coldstill.data.corpus.sources import list_sources
from coldstill.data.errors import ColdstillError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": lambda data: bytes(pa.compress(data, codec="zstd", asbytes=True)),
}
ENCODE: dict[str, Callable[[str], bytes]] = {
    "utf-8": str.encode,
    "utf-8 with a mark": lambda text: codecs.BOM_UTF8 + text.encode(),
    "utf-16 little": lambda text: codecs.BOM_UTF16_LE + text.encode("utf-16-le"),
    "utf-16 big": lambda text: codecs.BOM_UTF16_BE + text.encode("utf-16-be"),
}
TEXTS = ["plain", "", "é\u2028\x0b\x85\x00 \U0001f600\u010a\u0a0d", "line\nbreak\r\n"]


def read(base: Path, *files: str, **columns: Any) -> list[Document]:
    return list(read_documents(list_sources(files, base), Columns(**columns)))


def refusal(base: Path, *files: str) -> str:
    return refusals.refusal(read, base, *files)


def table_bytes(suffix: str, table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    if suffix == ".parquet":
        pq.write_table(table, sink, row_group_size=2000)
    else:
        new = pa.ipc.new_file if suffix == ".arrow" else pa.ipc.new_stream
        with new(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=2000)
    return bytes(sink.getvalue())


@pytest.fixture(params=itertools.product(COMPRESS, ENCODE, ["\n", "\r\n", "\r"]), ids=repr)
def form(request: pytest.FixtureRequest) -> tuple[str, Callable[[str], bytes]]:
    """A suffix, and how its file is made of a text: compression, encoding, line ends."""
    compression, encoding, ending = request.param
    made = ENCODE[encoding]
    return compression, lambda text: COMPRESS[compression](made(text.replace("\n", ending)))


@pytest.mark.slow
def test_texts_and_records_are_read_from_every_form(
    tmp_path: Path, form: tuple[str, Callable[[str], bytes]]
) -> None:
    compression, encoded = form

    def documents(suffix: str, text: str) -> list[Document]:
        (tmp_path / f"a{suffix}{compression}").write_bytes(encoded(text))
        return read(tmp_path, f"a{suffix}{compression}")

    text = f"\n\té one\n\n two\u2028\x0b\x00 \u010a\n{'long ' * 250_000}\n last \n\n"
    for suffix in (".txt", ".md", ".py", ".rst"):
        expected = Document(where=f"a{suffix}{compression}", text=text)
        assert documents(suffix, text) == [expected]
        text = text[-9:]  # one long text is enough
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in TEXTS]
    lines = ["", *lines[:2], " \t", *lines[2:], "", ""]
    for suffix in (".jsonl", ".ndjson"):
        found = documents(suffix, "\n".join(lines))
        assert [document.text for document in found] == TEXTS
        places = [document.where.rpartition(":")[2] for document in found]
        assert places == ["2", "3", "5", "6"]
    rows = json.dumps([{"text": text} for text in TEXTS], ensure_ascii=False, indent=1)
    found = documents(".json", rows)
    assert [document.text for document in found] == TEXTS
    assert found[3].where == f"a.json{compression}: record 4"


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("kind", [".parquet", ".arrow", ".arrow stream"])
def test_a_table_is_one_document_per_row(tmp_path: Path, kind: str, compression: str) -> None:
    texts = [*TEXTS, None, *(str(i) for i in range(3000))]
    pixels = pa.array([b"\xff"] * len(texts))
    table = pa.table({"pixels": pixels, "text": pa.array(texts, pa.large_string())})
    name = kind.split(maxsplit=1)[0]
    path = tmp_path / f"a{name}{compression}"
    path.write_bytes(COMPRESS[compression](table_bytes(kind, table)))
    documents = read(tmp_path, path.name)
    assert [document.text for document in documents] == [text or "" for text in texts]
    assert documents[4].is_empty
    assert documents[1030].where == f"{path.name}: record 1031"


def test_lines_and_line_ends_that_cross_a_chunk_are_whole(tmp_path: Path) -> None:
    texts = ["é" * 2_000_000, "short", "\u20ac" * 1_000_000]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    (tmp_path / "a.jsonl").write_text("\r\n".join(lines), encoding="utf-8", newline="")
    assert [document.text for document in read(tmp_path, "a.jsonl")] == texts
    text = "a" * ((1 << 20) - 1) + "\n\nb"
    (tmp_path / "a.txt").write_bytes(text.replace("\n", "\r\n").encode())
    assert read(tmp_path, "a.txt")[0].text == text


def test_columns_are_mapped_and_counted_in_every_format(tmp_path: Path) -> None:
    rows = [{"q": "ask", "a": "say", "text": "no"}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.jsonl").write_text(json.dumps(rows[0]))
    for kind in (".parquet", ".arrow"):
        (tmp_path / f"a{kind}").write_bytes(table_bytes(kind, pa.Table.from_pylist(rows)))
    for source in list_sources(["a.*"], tmp_path):
        reading, columns = Reading(), Columns(prompt="q", completion="a")
        (document,) = read_documents([source], columns, refuse, reading)
        assert (document.prompt, document.text) == ("ask", "say")
        reading = Reading()
        assert len(list(read_documents([source], Columns(), refuse, reading))) == 1
        assert reading.note() == "columns not used: a, q"


def test_files_and_lines_are_not_read_before_their_turn(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "1"}\n{"text": "2"}\n')
    (tmp_path / "b.jsonl").write_text('{"text": "3"}\nbroken\n')
    sources = list_sources(["a.jsonl", "b.jsonl"], tmp_path)
    documents = read_documents(sources, Columns())
    assert [next(documents).text for _ in range(3)] == ["1", "2", "3"]
    with pytest.raises(ColdstillError, match=r"^b\.jsonl:2: not valid JSON"):
        next(documents)
    documents = read_documents(sources, Columns())
    assert [next(documents).text, next(documents).text] == ["1", "2"]
    (tmp_path / "b.jsonl").unlink()
    with pytest.raises(ColdstillError, match=r"^b\.jsonl: cannot be opened: .*; it existed"):
        next(documents)


@pytest.mark.slow
@pytest.mark.parametrize("compression", COMPRESS)
def test_memory_stays_flat_over_json_lines(tmp_path: Path, compression: str) -> None:
    data = (json.dumps({"text": "x" * 10_000}) + "\n").encode() * 2_000
    (tmp_path / f"a.jsonl{compression}").write_bytes(COMPRESS[compression](data))
    sources = list_sources([f"a.jsonl{compression}"], tmp_path)
    tracemalloc.start()
    try:
        assert sum(len(d.text) for d in read_documents(sources, Columns())) == 20_000_000
        assert tracemalloc.get_traced_memory()[1] < 8_000_000
    finally:
        tracemalloc.stop()


BROKEN = {
    "{'text': 1}": "not valid JSON: Expecting property name",
    '{"text": "a"': "not valid JSON: Expecting ',' delimiter",
    '{"text": "a"}{"text": "b"}': "not valid JSON: Extra data",
    "[" * 100_000: "not valid JSON: ",
    "3": "int 3 is not a record, expected an object",
    '{"body": "a"}': "missing column 'text' (have: body); map it in the recipe",
    '{"text": 3}': "column 'text' holds int 3, expected a string",
    '{"messages": [{"role": "user"}]}': "messages[0]: no 'content' (have: role)",
    '{"text": "a", "text": "b"}': "an object with the key 'text' twice is not a record",
    '{"text": {"b": 1, "b": 2}}': "column 'text' holds an object with the key 'b' twice, ",
    '{"messages": [{"role": "user", "content": "b"}]}': "this chat has no answer of the",
    '{"text": ' + "9" * 5000 + "}": "not valid JSON: Exceeds the limit",
}
"""Lines and their errors."""


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    good = '{"text": "a"}'
    for line, expected in BROKEN.items():
        (tmp_path / "data.jsonl").write_text("\r\n".join([good] * 16 + [line, good]))
        message = refusal(tmp_path, "data.jsonl")
        assert message.startswith("data.jsonl:17: ")
        assert expected in message


def test_json_that_is_not_a_list_of_records_is_refused(tmp_path: Path) -> None:
    cases = {
        '{"text": "a"}': "a.json: one dict, expected a list of records; put it in [ ]",
        '"a"': "a.json: one str, expected a list of records",
        "[]": "a.json: holds no records; write it again or leave it out",
        '[{"text": "a"},\n3]': "a.json: record 2: int 3 is not a record",
        '[{"text": "a"},\n{"b": 1}]': "a.json: record 2: missing column 'text' (have: b)",
        '{"text": "a"}\n{"text": "b"}': "a.json:2: not valid JSON: Extra data",
        '[\n{"text": \n': "a.json:3: not valid JSON: Expecting value",
    }
    for text, expected in cases.items():
        (tmp_path / "a.json").write_text(text)
        message = refusal(tmp_path, "a.json")
        assert message.startswith(expected)
        assert message.endswith("name the file .jsonl") or "Extra data" not in expected
    (tmp_path / "a.jsonl").write_text("\n \n\n")
    assert refusal(tmp_path, "a.jsonl").startswith("a.jsonl: holds no records;")
    for suffix in (".gz", ".zst"):
        (tmp_path / f"a.jsonl{suffix}").write_bytes(COMPRESS[suffix](b""))
        assert "holds no records;" in refusal(tmp_path, f"a.jsonl{suffix}")


@pytest.mark.slow
@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json"])
def test_a_byte_that_is_not_utf_8_is_named_by_line_and_offset(
    tmp_path: Path, suffix: str, compression: str
) -> None:
    lines = [b'{"text": "%060d"}' % i for i in range(20_000)]
    for at in (7, 19_999):
        data = b"\r\n".join([*lines[:at], b'{"text": "caf\xe9"}', *lines[at + 1 :]])
        (tmp_path / f"a{suffix}{compression}").write_bytes(COMPRESS[compression](data))
        assert refusal(tmp_path, f"a{suffix}{compression}") == (
            f"a{suffix}{compression}:{at + 1}: byte {data.index(0xE9)} (0xe9) is not valid UTF-8; "
            "save the file as UTF-8"
        )


def test_a_character_cut_at_the_end_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(codecs.BOM_UTF8 + "a\né".encode()[:-1])
    assert refusal(tmp_path, "a.txt").startswith("a.txt:2: byte 5 (0xc3) is not valid UTF-8;")
    (tmp_path / "a.txt").write_bytes("a\nb".encode("utf-16")[:-1])
    assert refusal(tmp_path, "a.txt").startswith("a.txt:2: byte 6 (0x62) is not valid UTF-16;")


def test_a_file_cut_short_is_refused(tmp_path: Path) -> None:
    for suffix, ending in itertools.product((".txt", ".jsonl", ".parquet"), (".gz", ".zst")):
        name = f"a{suffix}{ending}"
        data = COMPRESS[ending](os.urandom(1_000_000).hex().encode())
        for cut in (len(data) - 5, len(data) // 2, 30):
            (tmp_path / name).write_bytes(data[:cut])
            message = refusal(tmp_path, name)
            assert message.startswith(f"{name}: cannot be read: ")
            assert message.endswith("it is cut short or damaged, fetch or write it again")
        (tmp_path / name).write_bytes(b"plain text all the way")
        assert refusal(tmp_path, name).startswith(f"{name}: cannot be read")
    for kind in (".parquet", ".arrow", ".arrow stream"):
        data = table_bytes(kind, pa.table({"text": [str(i) for i in range(5000)]}))
        name = f"a{kind.split()[0]}"
        for cut in (len(data) - 200, len(data) // 2, 3):
            (tmp_path / name).write_bytes(data[:cut])
            assert refusal(tmp_path, name).startswith(f"{name}: cannot be read: ")


@pytest.mark.parametrize("kind", [".parquet", ".arrow", ".arrow stream"])
def test_a_table_that_does_not_fit_is_refused(tmp_path: Path, kind: str) -> None:
    name = f"a{kind.split()[0]}"
    bad_utf8 = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\x01\0\0\0"), pa.py_buffer(b"\xff")]
    )
    cases: list[tuple[pa.Table, str]] = [
        (pa.table({"id": [1], "body": ["b"]}), ": missing column 'text' (have: id, body); map it"),
        (pa.table({"text": ["a", "b"]}).slice(0, 0), ": holds no records;"),
        (pa.table({"text": [1]}), ": record 1: column 'text' holds int 1, expected a string"),
        (pa.table({"text": [b"a"]}), ": record 1: column 'text' holds bytes b'a'"),
        (pa.table({"text": bad_utf8}), ": record 1 or one of the 1024 from there cannot be read:"),
    ]
    if kind != ".parquet":
        twice = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
        cases.append((twice, ": record 1 or one of the 1024"))
    for table, expected in cases:
        (tmp_path / name).write_bytes(table_bytes(kind, table))
        assert refusal(tmp_path, name).startswith(f"{name}{expected}")


def test_a_fault_in_an_unused_column_is_ignored(tmp_path: Path) -> None:
    line = '{"text": "a", "score": NaN, "meta": {"x": 1, "x": 2}, "half": "\\ud83d"}'
    (tmp_path / "a.jsonl").write_text(line)
    assert [d.text for d in read(tmp_path, "a.jsonl")] == ["a"]


def test_bad_rows_may_be_left_out_one_by_one(tmp_path: Path) -> None:
    lines = ['{"text": "a"}', '{"text": 1}', '{"b": ""}', '{"text": "\\ud83d"}', '{"text": "b"}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "b.json").write_text('[{"text": "c"}, {"text": "d", "text": "e"}]')
    sources, bad = list_sources(["a.jsonl", "b.json"], tmp_path), list[BadRowError]()
    assert [d.text for d in read_documents(sources, Columns(), bad.append)] == ["a", "b", "c"]
    kinds = ["wrong_values", "incomplete_rows", "broken_text", "wrong_values"]
    assert [error.kind for error in bad] == kinds
    assert str(bad[0]).startswith("a.jsonl:2: column 'text' holds int 1")
    assert str(bad[3]).startswith("b.json: record 2: an object with the key 'text' twice")


def test_files_without_a_good_row_and_damaged_ones_are_refused_all_the_same(tmp_path: Path) -> None:
    for text, expected in (
        (
            '{"body": "a"}\n{"body": "b"}',
            "every row is bad, the first of them: a.jsonl:1: missing column 'text' (have: body); "
            'map it in the recipe: [corpus.columns] text = "..."',
        ),
        ('{"text": "a"}\n{"text": ', "a.jsonl:2: not valid JSON"),
    ):
        (tmp_path / "a.jsonl").write_text(text)
        documents = read_documents(list_sources(["a.jsonl"], tmp_path), Columns(), lambda bad: None)
        assert refusals.refusal(list, documents).startswith(expected)


LINE = b'{"text": "a"}\n'
MAGIC = b"\x28\xb5\x2f\xfd"
LARGE_WINDOW = (
    MAGIC
    + b"\x00"  # no checksum, nor the size of the content
    + bytes([(31 - 10) << 3])  # a window of 2 ** 31 bytes
    + (len(LINE) << 3 | 1).to_bytes(3, "little")  # one last block, not compressed
    + LINE
)
"""What `zstd --ultra --long=31` makes of a stream (RFC 8878)."""


def refusal_of(base: Path, name: str, data: bytes) -> str:
    (base / name).write_bytes(data)
    return refusal(base, name)


def test_a_window_that_is_too_large_is_reported(tmp_path: Path) -> None:
    for name in ("a.jsonl.zst", "a.txt.zst", "a.parquet.zst", "a.arrow.zst"):
        assert refusal_of(tmp_path, name, LARGE_WINDOW) == (
            f"{name}: cannot be read: it was compressed with a window of 2,147,483,648 bytes (zstd "
            "--long=28 or more), larger than the 134,217,728 bytes that are read; compress it "
            "again with zstd --long=27"
        )
    message = refusal_of(tmp_path, "a.jsonl.zst", COMPRESS[".zst"](LINE) + LARGE_WINDOW)
    assert "it was compressed with a window (zstd --long=28 or more), larger than" in message
    largest = LARGE_WINDOW[:5] + bytes([(27 - 10) << 3]) + LARGE_WINDOW[6:]
    (tmp_path / "a.jsonl.zst").write_bytes(largest)
    assert read(tmp_path, "a.jsonl.zst")[0].text == "a"


def test_all_members_are_read_and_frames_without_data_skipped(tmp_path: Path) -> None:
    skipped = b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"
    for suffix, between in ((".gz", b""), (".zst", skipped)):
        parts = [COMPRESS[suffix](b'{"text": "%d"}\n' % i) for i in range(3)]
        (tmp_path / f"a.jsonl{suffix}").write_bytes(between + between.join(parts) + between)
        assert [d.text for d in read(tmp_path, f"a.jsonl{suffix}")] == ["0", "1", "2"]
    line = COMPRESS[".zst"](LINE)
    for data in (line + b"more", skipped + line[:-3]):
        message = refusal_of(tmp_path, "a.jsonl.zst", data)
        assert message.endswith("it is cut short or damaged, fetch or write it again")


def test_a_wrong_compression_suffix_is_reported(tmp_path: Path) -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("a.jsonl", LINE)
    for data, kind in [
        (bz2.compress(LINE), "with bzip2"),
        (packed.getvalue(), "with zip"),
        (COMPRESS[".zst"](LINE), "with zstd"),
        (LINE * 9, "of another kind or not at all"),
    ]:
        assert refusal_of(tmp_path, "a.jsonl.gz", data) == (
            f"a.jsonl.gz: cannot be read: it is not compressed with gzip but {kind}; rename it"
        )


def test_compressed_text_without_a_suffix_is_reported(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.json", "a.txt"):
        message = refusal_of(tmp_path, name, COMPRESS[".gz"](LINE))
        assert message == f"{name}: is compressed with gzip; name it {name}.gz"
        message = refusal_of(tmp_path, name, bz2.compress(LINE))
        assert message == f"{name}: is compressed with bzip2; unpack it first"
    message = refusal_of(tmp_path, "a.jsonl.gz", COMPRESS[".gz"](COMPRESS[".zst"](LINE)))
    assert message == "a.jsonl.gz: is compressed with zstd once more; unpack it first"
