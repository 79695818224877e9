"""Rows of every kind through the command line: what is learned, and what is said of the rest."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
from chats import TEMPLATE
from conftest import sentences
from transformers import AutoTokenizer

if TYPE_CHECKING:
    from pathlib import Path

    from desk import Desk

pytest_plugins = ("desk",)

LOGITS = ("teacher-logits", "r.toml")


@pytest.fixture
def chatting(desk: Desk, teacher_folder: Path) -> Desk:
    """A desk whose teacher has a chat template that writes tools and calls."""
    shutil.copytree(teacher_folder, desk.root / "teacher")
    tokenizer: Any = AutoTokenizer.from_pretrained(teacher_folder)
    calls = "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c | tojson }}{% endfor %}"
    tokenizer.chat_template = "{% if tools %}{{ tools | tojson }}{% endif %}" + TEMPLATE.replace(
        "{{ m['content'] }}", calls
    )
    tokenizer.save_pretrained(desk.root / "teacher")
    desk.edit(f'model = "{teacher_folder}"', 'model = "teacher"')
    desk.edit("files = [", 'files = ["data"] # ')
    desk.edit("sequence_length = 32", "sequence_length = 128")
    return desk


def chats(count: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for i, text in enumerate(sentences(count)):
        turns = [{"from": "human", "value": text[:9]}, {"from": "gpt", "value": text[9:30]}]
        rows.append({"id": i, "conversations": turns})
    return rows


def write(desk: Desk, name: str, rows: list[dict[str, Any]]) -> None:
    desk.write(name, "\n".join(map(json.dumps, rows)))


BAD: dict[str, dict[str, Any]] = {
    "chats with an unknown role": {"conversations": [{"from": "narrator", "value": "x"}]},
    "chats without an answer of the assistant": {
        "conversations": [{"from": "human", "value": "x"}]
    },
    "rows with half a surrogate pair": {"text": "\ud83d"},
    "rows with a value of the wrong type": {"text": 3},
    "rows without a column that is needed": {"body": "x"},
    "rows with a tool call or tool that cannot be read": {
        "conversations": [{"from": "function_call", "value": "{'name': 'f'}"}]
    },
}


def test_bad_rows_are_refused_with_their_line(chatting: Desk) -> None:
    good = chats(30)
    for row in BAD.values():
        write(chatting, "data/train.jsonl", [*good[:4], row, *good[4:]])
        line = chatting.refused(*LOGITS)
        assert line.startswith("error: data/train.jsonl:5: ")
        assert line.endswith(', or skip such rows with corpus.bad_rows = "skip"')


KINDS = {
    "unknown_roles", "unanswered_chats", "broken_text", "wrong_values", "incomplete_rows",
    "broken_tool_calls",
}  # fmt: skip


def test_what_is_left_out_and_what_is_not_used_is_said_once(chatting: Desk) -> None:
    rows = chats(30)
    rows[4]["score"] = 1
    bad = [*BAD.values(), BAD["chats with an unknown role"]]
    write(chatting, "data/train.jsonl", [*rows[:4], *bad, *rows[4:]])
    chatting.write("data/README.md", "---\nlicense: mit\n---\n# Chats\n")
    chatting.write("data/dataset_infos.json", "{}")
    said = chatting.done(*LOGITS, "--set", "corpus.bad_rows=skip").stderr
    for place, reason in enumerate(BAD):
        assert f"; {1 if place else 2} {reason} skipped" in said
    record = chatting.json("corpus", "corpus.json")
    assert sum(record["counts"].get(name, 0) for name in KINDS) == len(bad)
    assert [name for name, *_ in record["sources"]] == ["data/train.jsonl"]
    lines = said.splitlines()
    (unused,) = [line for line in lines if "columns not used: " in line]
    assert unused.endswith("columns not used: id (in 30 of 31 rows), score (in 1 of 31 rows)")
    (left_out,) = [line for line in lines if "not documents" in line]
    assert left_out.endswith(
        "2 files are not documents and not read: data/README.md, data/dataset_infos.json"
    )


def test_a_folder_of_several_splits_is_refused(chatting: Desk) -> None:
    for split in ("train", "test"):
        write(chatting, f"data/{split}.jsonl", chats(5))
    for command in ("plan", "teacher-logits"):
        assert chatting.refused(command, "r.toml") == (
            "error: data: a data set of several splits (test, train); name the files of the one to "
            "read, such as data/train*"
        )
