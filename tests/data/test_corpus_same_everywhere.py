"""Equal rows are equal documents in every format."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from coldstill.data.corpus.columns import Columns
from coldstill.data.corpus.formats import read_documents
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
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
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
    assert len({document.digest() for document in found}) == len(ROWS)
    return [json.dumps([d.messages, d.tools, d.documents]) for d in found]


def test_every_format_gives_the_same_documents(folder: Path) -> None:
    expected = documents(folder, "a.jsonl")
    assert '"arguments": {"at": 1, "zone": "x"}' in expected[0]
    assert "null" not in "".join(expected).replace("[1, null]", "")
    for path in sorted(folder.iterdir()):
        assert documents(folder, path.name) == expected, path.name


def test_a_saved_data_set_gives_the_same_documents(folder: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "set")
    assert documents(tmp_path, "set") == documents(folder, "a.jsonl")


def test_a_table_of_maps_gives_the_same_documents(folder: Path, tmp_path: Path) -> None:
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
    first, second = (
        next(read_documents(list_sources([name], tmp_path), Columns()))
        for name in ("a.jsonl", "a.parquet")
    )
    assert first.messages == second.messages
