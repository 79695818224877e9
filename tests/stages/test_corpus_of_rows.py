"""A corpus of rows as it is prepared: preferences, formats, and records from before."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chats import TEMPLATE
from coldstill.data.errors import ColdstillError
from coldstill.stages.config import CorpusConfig
from coldstill.stages.corpus.origin import difference_in_corpus
from coldstill.stages.models.loading import load_tokenizer
from coldstill.stages.prepare_corpus import prepare_corpus
from conftest import sentences

if TYPE_CHECKING:
    from pathlib import Path

    from coldstill.data.prepared import CorpusRecord

Row = dict[str, Any]


@pytest.fixture(scope="module")
def chatting(tokenizer_folder: Path) -> Any:
    tokenizer = load_tokenizer(str(tokenizer_folder), "test")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def configured(**changes: Any) -> CorpusConfig:
    settings: Row = {"files": ("a.*",), "sequence_length": 128, "holdout": 0.2}
    return CorpusConfig(**(settings | changes))


def prepared(folder: Path, tokenizer: Any, rows: list[Row], **changes: Any) -> CorpusRecord:
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    config = configured(**changes)
    return prepare_corpus(folder / "corpus", config, folder, tokenizer, together=True)


def turns(text: str) -> list[Row]:
    roles = [("user", text[:9]), ("assistant", text[9:30])]
    return [{"role": role, "content": content} for role, content in roles]


CHATS = [turns(text) for text in sentences(30)]


def test_of_preferences_as_much_is_learned_as_of_their_better_chats(
    tmp_path: Path, chatting: Any
) -> None:
    expected = prepared(tmp_path, chatting, [{"messages": chat} for chat in CHATS])
    assert expected.splits["train"].positions > 100
    no = [{"role": "assistant", "content": "no"}]
    rows = [{"prompt": chat[:1], "chosen": chat[1:], "rejected": no} for chat in CHATS]
    assert prepared(tmp_path, chatting, rows).splits == expected.splits


def test_every_format_is_prepared_alike(tmp_path: Path, chatting: Any) -> None:
    rows = [{"messages": chat, "id": i} for i, chat in enumerate(CHATS)]
    expected = prepared(tmp_path, chatting, rows)
    (tmp_path / "a.jsonl").unlink()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    record = prepare_corpus(tmp_path / "corpus", configured(), tmp_path, chatting, together=True)
    assert record.splits == expected.splits


def test_chats_without_answers_are_refused_or_counted(tmp_path: Path, chatting: Any) -> None:
    rows = [{"messages": chat} for chat in CHATS]
    asking = {"conversations": [{"from": "human", "value": "?"}]}
    with pytest.raises(ColdstillError, match=r"^a\.jsonl:3: this chat has no answer of the"):
        prepared(tmp_path, chatting, [*rows[:2], asking, *rows[2:]])
    record = prepared(tmp_path, chatting, [*rows, asking], bad_rows="skip")
    assert (record.counts["unanswered_chats"], record.skipped) == (1, 1)
    with pytest.raises(ColdstillError, match=r"^every row is bad, the first of them: a\.jsonl:1: "):
        prepared(tmp_path, chatting, [asking] * 9, bad_rows="skip")


def test_a_record_from_before_a_column_could_be_mapped_is_still_the_same(
    tmp_path: Path, chatting: Any
) -> None:
    record = prepared(tmp_path, chatting, [{"messages": chat} for chat in CHATS])
    now = record.settings["columns"]
    for key in ("roles", "system", "tools", "documents"):
        del now[key]
    assert difference_in_corpus(record, configured(), tmp_path, chatting) is None
    columns = dataclasses.replace(configured().columns, tools="t")
    changed = difference_in_corpus(record, configured(columns=columns), tmp_path, chatting)
    assert str(changed).startswith("corpus.columns was ")
