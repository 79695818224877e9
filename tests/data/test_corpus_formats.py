from __future__ import annotations

import codecs
import gzip
import itertools
import json
import os
import tracemalloc
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
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
    with pytest.raises(ColdstillError) as caught:
        read(base, *files)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def table_bytes(suffix: str, table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    if suffix == ".parquet":
        pq.write_table(table, sink, row_group_size=2000)
    else:
        new = pa.ipc.new_file if suffix == ".arrow" else pa.ipc.new_stream
        with new(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=2000)
    return bytes(sink.getvalue())


formats = pytest.mark.parametrize(
    ("compression", "encoding", "ending"),
    list(itertools.product(COMPRESS, ENCODE, ["\n", "\r\n", "\r"])),
)


@formats
def test_a_text_file_is_one_document_with_plain_line_ends(
    tmp_path: Path, compression: str, encoding: str, ending: str
) -> None:
    text = f"\n\té one\n\n two\u2028\x0b\x00 \u010a\n{'long ' * 250_000}\n last \n\n"
    data = COMPRESS[compression](ENCODE[encoding](text.replace("\n", ending)))
    for suffix in (".txt", ".md", ".py", ".rst"):
        (tmp_path / f"a{suffix}{compression}").write_bytes(data)
        (document,) = read(tmp_path, f"a{suffix}{compression}")
        assert document == Document(where=f"a{suffix}{compression}", text=text)


@formats
def test_json_lines_are_one_document_each(
    tmp_path: Path, compression: str, encoding: str, ending: str
) -> None:
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in TEXTS]
    lines = ["", *lines[:2], " \t", *lines[2:], "", ""]
    data = COMPRESS[compression](ENCODE[encoding](ending.join(lines)))
    for name in (f"a.jsonl{compression}", f"a.ndjson{compression}"):
        (tmp_path / name).write_bytes(data)
        documents = read(tmp_path, name)
        assert [document.text for document in documents] == TEXTS
        assert [document.where for document in documents] == [f"{name}:{n}" for n in (2, 3, 5, 6)]


@formats
def test_a_json_list_is_one_document_per_record(
    tmp_path: Path, compression: str, encoding: str, ending: str
) -> None:
    text = json.dumps([{"text": text} for text in TEXTS], ensure_ascii=False, indent=1)
    name = f"a.json{compression}"
    data = ENCODE[encoding](text.replace("\n", ending))
    (tmp_path / name).write_bytes(COMPRESS[compression](data))
    documents = read(tmp_path, name)
    assert [document.text for document in documents] == TEXTS
    assert documents[3].where == f"{name}: record 4"


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


def test_all_members_of_a_compressed_file_are_read(tmp_path: Path) -> None:
    for suffix in (".gz", ".zst"):
        parts = [COMPRESS[suffix](f'{{"text": "{i}"}}\n'.encode()) for i in range(3)]
        (tmp_path / f"a.jsonl{suffix}").write_bytes(b"".join(parts))
        assert [d.text for d in read(tmp_path, f"a.jsonl{suffix}")] == ["0", "1", "2"]


def test_lines_longer_than_a_chunk_are_whole(tmp_path: Path) -> None:
    texts = ["é" * 2_000_000, "short", "\u20ac" * 1_000_000]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    (tmp_path / "a.jsonl").write_text("\r\n".join(lines), encoding="utf-8", newline="")
    assert [document.text for document in read(tmp_path, "a.jsonl")] == texts


def test_a_line_end_cut_by_a_chunk_is_one_line_end(tmp_path: Path) -> None:
    text = "a" * ((1 << 20) - 1) + "\n\nb"
    (tmp_path / "a.txt").write_bytes(text.replace("\n", "\r\n").encode())
    assert read(tmp_path, "a.txt")[0].text == text


def test_mapped_columns_reach_every_format(tmp_path: Path) -> None:
    rows = [{"q": "ask", "a": "say", "text": "no"}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.jsonl").write_text(json.dumps(rows[0]))
    for kind in (".parquet", ".arrow"):
        (tmp_path / f"a{kind}").write_bytes(table_bytes(kind, pa.Table.from_pylist(rows)))
    documents = read(tmp_path, "a.*", prompt="q", completion="a")
    assert [(d.prompt, d.text) for d in documents] == [("ask", "say")] * 4


def test_a_file_is_not_opened_before_its_turn(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "1"}\n{"text": "2"}\n')
    (tmp_path / "b.jsonl").write_text('{"text": "3"}\n')
    documents = read_documents(list_sources(["a.jsonl", "b.jsonl"], tmp_path), Columns())
    assert [next(documents).text, next(documents).text] == ["1", "2"]
    (tmp_path / "b.jsonl").unlink()
    with pytest.raises(ColdstillError, match=r"^b\.jsonl: cannot be opened: .*; it existed"):
        next(documents)


def test_an_early_line_is_given_before_a_later_one_is_looked_at(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "1"}\nbroken\n')
    documents = read_documents(list_sources(["a.jsonl"], tmp_path), Columns())
    assert next(documents).text == "1"
    with pytest.raises(ColdstillError, match=r"^a\.jsonl:2: not valid JSON"):
        next(documents)


@pytest.mark.parametrize("compression", COMPRESS)
def test_memory_stays_flat_over_json_lines(tmp_path: Path, compression: str) -> None:
    data = (json.dumps({"text": "x" * 1000}) + "\n").encode() * 20_000
    (tmp_path / f"a.jsonl{compression}").write_bytes(COMPRESS[compression](data))
    sources = list_sources([f"a.jsonl{compression}"], tmp_path)
    tracemalloc.start()
    try:
        assert sum(len(d.text) for d in read_documents(sources, Columns())) == 20_000_000
        assert tracemalloc.get_traced_memory()[1] < 8_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{'text': 1}", "not valid JSON: Expecting property name"),
        ('{"text": "a"', "not valid JSON: Expecting ',' delimiter"),
        ('{"text": "a"}{"text": "b"}', "not valid JSON: Extra data"),
        ("[" * 100_000, "not valid JSON: "),
        ("3", "int 3 is not a record, expected an object"),
        ('{"body": "a"}', "missing column 'text' (have: body); map it in the recipe"),
        ('{"text": 3}', "column 'text' holds int 3, expected a string"),
        ('{"messages": [{"role": "user"}]}', "messages[0]: no 'content' (have: role)"),
        ('{"text": "a", "text": "b"}', "an object with the key 'text' twice is not a record"),
        ('{"text": {"b": 1, "b": 2}}', "column 'text' holds an object with the key 'b' twice, "),
        (
            '{"messages": [{"role": "user", "content": "b"}]}',
            "this chat has no answer of the",
        ),
        ('{"text": ' + "9" * 5000 + "}", "not valid JSON: Exceeds the limit"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: str, told: str) -> None:
    good = '{"text": "a"}'
    (tmp_path / "data.jsonl").write_text("\r\n".join([good] * 16 + [line, good]))
    message = refusal(tmp_path, "data.jsonl")
    assert message.startswith("data.jsonl:17: ")
    assert told in message


def test_json_that_is_no_list_of_records_is_refused(tmp_path: Path) -> None:
    cases = {
        '{"text": "a"}': "a.json: one dict, expected a list of records; put it in [ ]",
        '"a"': "a.json: one str, expected a list of records",
        "[]": "a.json: holds no records; write it again or leave it out",
        '[{"text": "a"},\n3]': "a.json: record 2: int 3 is not a record",
        '[{"text": "a"},\n{"b": 1}]': "a.json: record 2: missing column 'text' (have: b)",
        '{"text": "a"}\n{"text": "b"}': "a.json:2: not valid JSON: Extra data",
        '[\n{"text": \n': "a.json:3: not valid JSON: Expecting value",
    }
    for text, told in cases.items():
        (tmp_path / "a.json").write_text(text)
        assert refusal(tmp_path, "a.json").startswith(told)
    (tmp_path / "a.json").write_text('{"text": "a"}\n{"text": "b"}')
    assert refusal(tmp_path, "a.json").endswith("name the file .jsonl")


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json"])
def test_a_byte_that_is_no_utf_8_is_named_by_line_and_offset(
    tmp_path: Path, suffix: str, compression: str
) -> None:
    lines = [b'{"text": "%06d"}' % i for i in range(100_000)]
    for at in (7, 99_999):
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


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json", ".parquet", ".arrow"])
@pytest.mark.parametrize("compression", [".gz", ".zst"])
def test_a_compressed_file_cut_short_is_refused(
    tmp_path: Path, suffix: str, compression: str
) -> None:
    name = f"a{suffix}{compression}"
    data = COMPRESS[compression](os.urandom(3_000_000).hex().encode())
    for cut in (len(data) - 5, len(data) // 2, 30):
        (tmp_path / name).write_bytes(data[:cut])
        message = refusal(tmp_path, name)
        assert message.startswith(f"{name}: cannot be read: ")
        assert message.endswith("it is cut short or damaged, fetch or write it again")


@pytest.mark.parametrize("compression", [".gz", ".zst"])
def test_what_was_never_compressed_is_refused(tmp_path: Path, compression: str) -> None:
    (tmp_path / f"a.txt{compression}").write_bytes(b"plain text all the way")
    assert refusal(tmp_path, f"a.txt{compression}").startswith(
        f"a.txt{compression}: cannot be read"
    )


@pytest.mark.parametrize("kind", [".parquet", ".arrow", ".arrow stream"])
def test_a_table_cut_short_is_refused(tmp_path: Path, kind: str) -> None:
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
    for table, told in cases:
        (tmp_path / name).write_bytes(table_bytes(kind, table))
        assert refusal(tmp_path, name).startswith(f"{name}{told}")


def test_an_arrow_column_named_twice_is_refused(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    (tmp_path / "a.arrow").write_bytes(table_bytes(".arrow", table))
    assert refusal(tmp_path, "a.arrow").startswith("a.arrow: record 1 or one of the 1024")


def test_lines_that_are_all_blank_hold_no_records(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n \n\n")
    assert refusal(tmp_path, "a.jsonl").startswith("a.jsonl: holds no records;")


def test_what_is_wrong_with_an_unused_column_does_not_matter(tmp_path: Path) -> None:
    line = '{"text": "a", "score": NaN, "meta": {"x": 1, "x": 2}, "half": "\\ud83d"}'
    (tmp_path / "a.jsonl").write_text(line)
    assert [d.text for d in read(tmp_path, "a.jsonl")] == ["a"]


def test_columns_used_for_nothing_are_named_in_every_format(tmp_path: Path) -> None:
    rows = [{"id": i, "source": "s", "text": f"{i}"} for i in range(3)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    for kind in (".parquet", ".arrow"):
        (tmp_path / f"a{kind}").write_bytes(table_bytes(kind, pa.Table.from_pylist(rows)))
    for name in ("a.jsonl", "a.json", "a.parquet", "a.arrow"):
        reading = Reading()
        assert len(list(read_documents(list_sources([name], tmp_path), Columns(), refuse, reading)))
        assert reading.note() == "columns not used: id, source"


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


def test_a_corpus_of_bad_rows_alone_tells_of_the_first(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "a"}\n{"body": "b"}')
    with pytest.raises(ColdstillError) as caught:
        list(read_documents(list_sources(["a.jsonl"], tmp_path), Columns(), lambda bad: None))
    assert str(caught.value) == (
        "every row is bad, the first of them: a.jsonl:1: missing column 'text' (have: body); map "
        'it in the recipe: [corpus.columns] text = "..."'
    )


def test_a_damaged_file_is_no_bad_row(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": ')
    with pytest.raises(ColdstillError, match=r"^a\.jsonl:2: not valid JSON"):
        list(read_documents(list_sources(["a.jsonl"], tmp_path), Columns(), lambda bad: None))
