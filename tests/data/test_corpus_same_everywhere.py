"""Equal rows are equal documents in every format; samples state the share that was read."""

from __future__ import annotations

import gzip
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from coldstill.data.corpus.columns import Columns
from coldstill.data.corpus.formats import read_documents
from coldstill.data.corpus.sample import sample, spread
from coldstill.data.corpus.sources import list_sources

if TYPE_CHECKING:
    from pathlib import Path


def tool(name: str, **properties: str) -> dict[str, Any]:
    kinds = {key: {"type": kind} for key, kind in properties.items()}
    parameters = {"type": "object", "properties": kinds, "required": list(kinds)}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def row(tools: list[Any], *calls: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    called = [{"type": "function", "function": {"name": n, "arguments": a}} for n, a in calls]
    return {
        "messages": [
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": None, "tool_calls": called},
            {"role": "tool", "content": "3", "name": "f"},
            {"role": "assistant", "content": "!", "reasoning_content": "hm"},
        ],
        "tools": tools,
        "system": None,
    }


ROWS = [
    # the second row has the keys of the first in another order, and a number that is no integer
    row([tool("f", zone="string", at="number")], ("f", {"zone": "x", "at": 1})),
    row([tool("g", at="number", who="string", zone="string")], ("g", {"at": 1.5, "zone": "y"})),
    row([], ("h", {"in": {"a": [1, None], "b": None}, "is": True}), ("h", {})),
    {"messages": [{"role": "assistant", "content": "alone"}], "tools": None, "system": "be"},
]


def write_arrow(path: Path, table: pa.Table, new: Any = pa.ipc.new_file) -> None:
    with new(path, table.schema) as writer:
        writer.write_table(table)


def as_json(rows: list[dict[str, Any]], *keys: str) -> list[dict[str, Any]]:
    """The rows with some columns as text."""
    return [r | {key: json.dumps(r[key]) for key in keys} for r in rows]


def with_json_arguments(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    copy: list[dict[str, Any]] = json.loads(json.dumps(rows))
    for message in (m for r in copy for m in r["messages"]):
        for call in message.get("tool_calls", ()):
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
    return copy


@pytest.fixture(scope="module")
def same_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rows in every format."""
    base = tmp_path_factory.mktemp("same")
    texts = as_json(ROWS, "messages", "tools")
    texts[3]["tools"] = None
    for name, rows in {"a": ROWS, "texts": texts, "arguments": with_json_arguments(ROWS)}.items():
        (base / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        (base / f"{name}.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
        table = pa.Table.from_pylist(rows)
        pq.write_table(table, base / f"{name}.parquet")
        write_arrow(base / f"{name}.arrow", table)
        write_arrow(base / f"{name}-stream.arrow", table, pa.ipc.new_stream)
    return base


def documents(folder: Path, name: str) -> list[str]:
    """Every document as text that shows the order of keys."""
    found = list(read_documents(list_sources([name], folder), Columns()))
    assert len({document.digest() for document in found}) == len(found)
    return [json.dumps([d.messages, d.tools, d.documents]) for d in found]


def test_every_format_gives_the_same_documents(same_rows: Path, tmp_path: Path) -> None:
    expected = documents(same_rows, "a.jsonl")
    assert len(expected) == len(ROWS)
    assert '"arguments": {"at": 1, "zone": "x"}' in expected[0]
    assert "null" not in "".join(expected).replace("[1, null]", "")
    for path in sorted(same_rows.iterdir()):
        assert documents(same_rows, path.name) == expected, path.name
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "set")
    assert documents(tmp_path, "set") == expected


def test_a_table_of_maps_gives_the_same_documents(tmp_path: Path) -> None:
    call = {"name": "f", "arguments": {"b": "1", "a": "2"}}
    rows = [{"messages": [{"role": "assistant", "content": "", "tool_calls": [call]}]}]
    (tmp_path / "a.jsonl").write_text(json.dumps(rows[0]))
    arguments = pa.map_(pa.string(), pa.string())
    calls = pa.list_(pa.struct({"name": pa.string(), "arguments": arguments}))
    message = pa.struct({"role": pa.string(), "content": pa.string(), "tool_calls": calls})
    pairs = [{**call, "arguments": list(call["arguments"].items())}]  # type: ignore[attr-defined]
    column = [[{**rows[0]["messages"][0], "tool_calls": pairs}]]
    table = pa.table({"messages": pa.array(column, pa.list_(message))})
    pq.write_table(table, tmp_path / "a.parquet")
    assert documents(tmp_path, "a.jsonl") == documents(tmp_path, "a.parquet")


COUNT = 20_000


@pytest.fixture(scope="module")
def sampled_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same rows in every format; they compress about as text does."""
    base = tmp_path_factory.mktemp("sampled")
    words = np.random.default_rng(0).integers(0, 5000, (COUNT, 12)).tolist()
    rows: list[dict[str, Any]] = [{"text": " ".join(map(str, line))} for line in words]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (base / "a.jsonl").write_bytes(lines)
    (base / "a.txt").write_bytes(lines)
    (base / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    (base / "a.txt.zst").write_bytes(bytes(pa.compress(lines, codec="zstd", asbytes=True)))
    (base / "a.json").write_text(json.dumps(rows, indent=1))
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, base / "a.parquet")
    for name, new in {"a.arrow": pa.ipc.new_file, "s.arrow": pa.ipc.new_stream}.items():
        with new(base / name, table.schema) as writer:
            writer.write_table(table, max_chunksize=1000)
    return base


def test_the_share_predicts_the_number_of_documents(sampled_rows: Path) -> None:
    for path in sampled_rows.iterdir():
        (source,) = list_sources([path.name], sampled_rows)
        found = sample(source, Columns(), 100, 20_000)
        assert found is not None
        if source.format == "text":
            (document,) = found.documents
            size = len((sampled_rows / "a.txt").read_bytes())
            assert document.size / found.share == pytest.approx(size, rel=0.1)
        else:
            assert len(found.documents) == 100
            assert 100 / found.share == pytest.approx(COUNT, rel=0.1), path.name


def test_a_source_that_is_read_completely_has_the_share_1(tmp_path: Path) -> None:
    rows = [{"text": "a"}, {"text": "b"}, {"text": 3}]
    (tmp_path / "a.jsonl").write_text("\r\n".join(map(json.dumps, rows)) + "\n\n")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=2) + "\n")
    pq.write_table(pa.Table.from_pylist(rows[:2]), tmp_path / "a.parquet")
    (tmp_path / "a.txt").write_text("é")
    for source in list_sources(["a.*"], tmp_path):
        found = sample(source, Columns(), 100, 1000)
        assert found is not None
        assert found.share == 1.0
        texts = [document.text for document in found.documents]  # without bad rows
        assert texts == (["é"] if source.name == "a.txt" else ["a", "b"])


def test_a_row_longer_than_the_limit_has_no_sample(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "a" * 5000}) + "\n" + "b" * 5000)
    (source,) = list_sources(["a.jsonl"], tmp_path)
    assert sample(source, Columns(), 100, 1000) is None


def test_the_fault_of_the_first_bad_row_is_kept(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": \n{"text": 3}\n')
    (tmp_path / "b.json").write_text('[{"text": "a"}, {"text": 3}]')
    (tmp_path / "c.json").write_text('{"data": [{"text": "a"}]}')
    first, second, third = list_sources(["a.jsonl", "b.json", "c.json"], tmp_path)
    samples = [sample(source, Columns(), 9, 1000) for source in (first, second)]
    assert [s and (len(s.documents), s.fault[:31]) for s in samples] == [
        (1, "a.jsonl: a record is not valid "),
        (1, "b.json: column 'text' holds int"),
    ]
    assert sample(third, Columns(), 9, 1000) is None


def test_sources_are_evenly_spaced(tmp_path: Path) -> None:
    for i in range(10):
        (tmp_path / f"{i}.txt").write_text("a")
    sources = list_sources(["*.txt"], tmp_path)
    assert [source.name for source in spread(sources, 4)] == ["0.txt", "2.txt", "5.txt", "7.txt"]
    assert spread(sources, 99) == sources
