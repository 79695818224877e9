"""Corpora that changed, and rows of every kind through the command line."""

from __future__ import annotations

import json
import os
import shutil
from typing import TYPE_CHECKING, Any

import pytest
from chats import CHAT, TEMPLATE
from coldstill.data.errors import ColdstillError
from coldstill.data.prepared import CorpusLayout
from coldstill.pipeline.recipe.reading import load_recipe
from coldstill.pipeline.recipe.run_folder import Run
from coldstill.pipeline.recipe.work import Work
from coldstill.pipeline.steps.teacher import prepared, tokenizer_of
from coldstill.stages.report import silent
from conftest import sentences
from transformers import AutoTokenizer

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from desk import Desk

pytest_plugins = ("desk",)

LOGITS = ("teacher-logits", "r.toml")


def rewrite(folder: Path) -> None:
    (folder / "07.txt").write_text("something else", encoding="utf-8")


def rewrite_unseen(folder: Path) -> None:
    """Of the same size, and its time set back."""
    path = folder / "07.txt"
    before = path.stat()
    path.write_bytes(path.read_bytes()[::-1])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


def replace(folder: Path) -> None:
    """By another file of the same size and time, as a synchronisation does."""
    path, other = folder / "07.txt", folder / "07.new"
    other.write_bytes(path.read_bytes()[::-1])
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    other.replace(path)


def remove(folder: Path) -> None:
    (folder / "07.txt").unlink()


def add(folder: Path) -> None:
    (folder / "07b.txt").write_text("one more", encoding="utf-8")


@pytest.fixture(scope="module")
def captured(
    tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path
) -> Callable[[Path], Desk]:
    from desk import RECIPE, Desk

    desk = Desk(tmp_path_factory.mktemp("captured"))
    for i, text in enumerate(sentences(30)):
        desk.write(f"texts/{i:02d}.txt", text)
    desk.write("r.toml", RECIPE.format(texts="texts", teacher=f'model = "{teacher_folder}"'))
    desk.done(*LOGITS)

    def copy(folder: Path) -> Desk:
        shutil.copytree(desk.root, folder, dirs_exist_ok=True)
        return Desk(folder)

    return copy


@pytest.mark.slow
def test_a_store_does_not_resume_from_another_corpus(
    captured: Callable[[Path], Desk], tmp_path: Path
) -> None:
    changed = "the file texts/07.txt has changed"
    for change, message in (
        (rewrite, changed),
        (rewrite_unseen, changed),
        (replace, changed),
        (remove, "the file texts/07.txt is gone"),
        (add, "the file texts/07b.txt is new"),
    ):
        desk = captured(tmp_path / change.__name__)
        if change in (rewrite, remove):  # incomplete, as a killed run leaves it
            (desk.run / "logits" / "shards" / "00001.json").unlink()
        change(desk.root / "texts")
        assert desk.refused(*LOGITS) == (
            f"error: runs/r/corpus: prepared differently: {message}; logits was made from it, so "
            "give this run another name"
        )
    desk.done(*LOGITS, "--set", "name=other")
    # a changed corpus is prepared again before a store is made from it
    for store in ("logits", "heldout"):
        shutil.rmtree(desk.run / store)
    desk.done(*LOGITS)
    assert len(desk.json("corpus", "corpus.json")["sources"]) == 31
    for path in (desk.root / "texts").iterdir():  # a touched corpus is still the same
        path.touch()
    assert "complete: " in desk.done(*LOGITS).stderr


@pytest.fixture
def chatting(desk: Desk, teacher_folder: Path) -> Desk:
    """A desk with prompts, chats and a teacher that has a template for them."""
    shutil.copytree(teacher_folder, desk.root / "teacher")
    tokenizer: Any = AutoTokenizer.from_pretrained(teacher_folder)
    tokenizer.chat_template = "{{ raise_exception('tools') if messages[0].role == 'tool' }}"
    tokenizer.chat_template += TEMPLATE
    tokenizer.save_pretrained(desk.root / "teacher")
    desk.edit(f'model = "{teacher_folder}"', 'model = "teacher"')
    desk.edit("files = [", 'files = ["rows.jsonl"] # ')
    rows: list[dict[str, Any]] = [
        {"prompt": text[:9], "completion": text[9:]} for text in sentences(30)
    ]
    rows[5:5] = [
        {"messages": [{"role": "tool", "content": "3"}, CHAT[4]]},
        {"prompt": "x" * 32, "completion": "y"},
    ]
    desk.write("rows.jsonl", "\n".join(json.dumps(row) for row in rows))
    return desk


@pytest.mark.slow
def test_rows_that_cannot_be_learned_are_refused_or_skipped(chatting: Desk) -> None:
    assert chatting.refused(*LOGITS) == (
        "error: rows.jsonl:6: the chat template cannot render this chat: tools; repair it, or skip "
        'such rows with corpus.bad_rows = "skip"'
    )
    lines = (chatting.root / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    chatting.write("rows.jsonl", "\n".join(["", *lines[:5], *lines[6:]]))
    assert chatting.refused(*LOGITS) == (
        "error: rows.jsonl:7: its prompt of 32 tokens leaves no room for an answer in sequences of "
        "32; shorten it, raise corpus.sequence_length, or skip such rows with "
        'corpus.bad_rows = "skip"'
    )
    chatting.write("rows.jsonl", "\n".join(lines))
    output = chatting.done(*LOGITS, "--set", "corpus.bad_rows=skip").stderr
    assert "1 chats that the template cannot render skipped" in output
    assert "1 prompts that leave no room for an answer skipped" in output
    # the recipe no longer skips them, but the store was made from a corpus that did
    assert "corpus.bad_rows was 'skip', is 'refuse'; logits was made from it" in chatting.refused(
        *LOGITS
    )


@pytest.mark.slow
def test_a_tokenizer_without_an_end_of_text_needs_a_separator(
    desk: Desk, teacher_folder: Path
) -> None:
    folder = desk.root / "teacher"
    shutil.copytree(teacher_folder, folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["eos_token"] = None
    path.write_text(json.dumps(settings), encoding="utf-8")
    desk.edit(f'model = "{teacher_folder}"', 'model = "teacher"')
    line = desk.refused(*LOGITS)
    assert line.startswith(
        "error: corpus.separator: the tokenizer has no end-of-text token to put after a text ("
    )
    assert line.endswith('00.txt); set a text to put there, or "" for nothing')
    desk.done(*LOGITS, "--set", 'corpus.separator=""')


def work_at(desk: Desk, *settings: str) -> Work:
    loaded = load_recipe(str(desk.root / "r.toml"), settings)
    return Work(loaded, Run(desk.run), silent)


def test_a_corpus_of_prompts_and_one_of_texts_differ(chatting: Desk) -> None:
    texts = work_at(chatting, "corpus.bad_rows=skip")
    asking = work_at(chatting, "corpus.bad_rows=skip", "teacher.generate.max_new_tokens=4")
    tokenizer = tokenizer_of(texts)
    first = prepared(texts, tokenizer, together=True)
    assert (first.prompts, first.together) == (False, True)
    record = prepared(asking, tokenizer, together=True)  # nothing was made from the first
    assert (record.prompts, record.together) == (True, False)
    assert record.splits["train"].content == first.splits["train"].content
    assert prepared(asking, tokenizer, together=True) == record
    assert CorpusLayout(chatting.run / "corpus").read_record() == record
    chatting.write("runs/r/logits/manifest.json", "{}")
    with pytest.raises(ColdstillError, match=r"it holds prompts .*; logits was made from it"):
        prepared(texts, tokenizer, together=True)


def test_a_recipe_with_both_or_neither_is_refused(desk: Desk) -> None:
    recipe = (desk.root / "r.toml").read_text(encoding="utf-8")
    for new, message in (
        ("[teacher.generate]\ntop_p = 0\n[teacher]", "top_p: input should be greater"),
        ("[teacher.generate]\ntop = 0\n[teacher]", "unknown key 'top'; did you mean"),
        (
            "[teacher]\ntrain = { steps = 3 }\ngenerate = {}",
            "teacher has both 'train', which learns from texts, and 'generate'",
        ),
        ('[corpus.columns]\nprompt = "q"\n[teacher]', "completion is not mapped"),
    ):
        desk.write("r.toml", recipe.replace("[teacher]", new))
        assert message in desk.refused("plan", "r.toml")
        assert message in desk.refused(*LOGITS)


def test_a_prompt_needs_no_completion_where_the_teacher_answers(desk: Desk) -> None:
    desk.edit("[teacher]", '[corpus.columns]\nprompt = "q"\n[teacher]\ngenerate = {}')
    desk.write("q.jsonl", "\n".join(json.dumps({"q": text[:20]}) for text in sentences(30)))
    desk.edit("files = [", 'files = ["q.jsonl"] # ')
    work = work_at(desk)
    record = prepared(work, tokenizer_of(work), together=True)
    assert sum(split.sequences for split in record.splits.values()) == 30


@pytest.fixture
def tools(chatting: Desk) -> Desk:
    """A desk whose teacher has a chat template that writes tools and calls."""
    tokenizer: Any = AutoTokenizer.from_pretrained(chatting.root / "teacher")
    calls = "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c | tojson }}{% endfor %}"
    tokenizer.chat_template = "{% if tools %}{{ tools | tojson }}{% endif %}" + TEMPLATE.replace(
        "{{ m['content'] }}", calls
    )
    tokenizer.save_pretrained(chatting.root / "teacher")
    chatting.edit('files = ["rows.jsonl"]', 'files = ["data"]')
    chatting.edit("sequence_length = 32", "sequence_length = 128")
    return chatting


def conversations(count: int) -> list[dict[str, Any]]:
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


def test_bad_rows_are_refused_with_their_line(tools: Desk) -> None:
    good = conversations(30)
    for row in BAD.values():
        write(tools, "data/train.jsonl", [*good[:4], row, *good[4:]])
        line = tools.refused(*LOGITS)
        assert line.startswith("error: data/train.jsonl:5: ")
        assert line.endswith(', or skip such rows with corpus.bad_rows = "skip"')


KINDS = {
    "unknown_roles", "unanswered_chats", "broken_text", "wrong_values", "incomplete_rows",
    "broken_tool_calls",
}  # fmt: skip


@pytest.mark.slow
def test_skipped_rows_and_unused_columns_are_reported_once(tools: Desk) -> None:
    rows = conversations(30)
    rows[4]["score"] = 1
    bad = [*BAD.values(), BAD["chats with an unknown role"]]
    write(tools, "data/train.jsonl", [*rows[:4], *bad, *rows[4:]])
    tools.write("data/README.md", "---\nlicense: mit\n---\n# Chats\n")
    tools.write("data/dataset_infos.json", "{}")
    output = tools.done(*LOGITS, "--set", "corpus.bad_rows=skip").stderr
    for place, reason in enumerate(BAD):
        assert f"; {1 if place else 2} {reason} skipped" in output
    record = tools.json("corpus", "corpus.json")
    assert sum(record["counts"].get(name, 0) for name in KINDS) == len(bad)
    assert [name for name, *_ in record["sources"]] == ["data/train.jsonl"]
    lines = output.splitlines()
    (unused,) = [line for line in lines if "columns not used: " in line]
    assert unused.endswith("columns not used: id (in 30 of 31 rows), score (in 1 of 31 rows)")
    (left_out,) = [line for line in lines if "not documents" in line]
    assert left_out.endswith(
        "2 files are not documents and not read: data/README.md, data/dataset_infos.json"
    )


def test_a_folder_of_several_splits_is_refused(tools: Desk) -> None:
    for split in ("train", "test"):
        write(tools, f"data/{split}.jsonl", conversations(5))
    for command in ("plan", "teacher-logits"):
        assert tools.refused(command, "r.toml") == (
            "error: data: a data set of several splits (test, train); name the files of the one to "
            "read, such as data/train*"
        )
