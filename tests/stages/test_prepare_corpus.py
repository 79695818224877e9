"""A prepared corpus: its content, skipped rows, and when it must be prepared again."""

from __future__ import annotations

import dataclasses
import json
import os
from typing import TYPE_CHECKING, Any

import chat_templates
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chats import CHAT, TEMPLATE
from coldstill.data.corpus.document import BadRowError, is_held_out
from coldstill.data.corpus.formats import read_documents
from coldstill.data.corpus.sources import list_sources
from coldstill.data.errors import ColdstillError
from coldstill.data.prepared import CorpusLayout
from coldstill.stages.config import CorpusConfig
from coldstill.stages.models.loading import load_tokenizer
from coldstill.stages.models.vocabulary import tokenizer_identity
from coldstill.stages.prepare_corpus import (
    difference_in_corpus,
    outdated_labels,
    prepare_corpus,
    summary,
)
from conftest import sentences

if TYPE_CHECKING:
    from pathlib import Path

    from coldstill.data.prepared import CorpusRecord, Split
    from coldstill.stages.report import Report

LENGTH = 40
END = "<|endoftext|>"
Row = dict[str, Any]


def write_rows(folder: Path, rows: list[Row], name: str = "a.jsonl") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def write(folder: Path, texts: list[str], name: str = "a.jsonl") -> None:
    write_rows(folder, [{"text": text} for text in texts], name)


def configured(**changes: Any) -> CorpusConfig:
    settings: Row = {"files": ("*.jsonl",), "sequence_length": LENGTH, "holdout": 0.3}
    return CorpusConfig(**(settings | changes))


def prepared(folder: Path, tokenizer: Any, **changes: Any) -> CorpusRecord:
    options = {name: changes.pop(name) for name in ("prompts", "report") if name in changes}
    together = changes.pop("together", True)
    config = configured(**changes)
    return prepare_corpus(
        folder / "corpus", config, folder, tokenizer, together=together, **options
    )


def pairs(count: int) -> list[Row]:
    words = [text.split() for text in sentences(count, seed=5)]
    return [{"prompt": " ".join(w[:3]), "completion": " ".join(w[3:])} for w in words]


@pytest.fixture
def chatting(tokenizer_folder: Path) -> Any:
    """A tokenizer whose template rejects tools."""
    tokenizer = load_tokenizer(str(tokenizer_folder), "test")
    no_tools = "{{ raise_exception('no tools') if messages[0].role == 'tool' }}"
    tokenizer.chat_template = no_tools + TEMPLATE
    return tokenizer


def documents_of(folder: Path, split: Split, tokenizer: Any) -> dict[int, str]:
    """The text of each document, joined from its pieces."""
    sequences = CorpusLayout(folder / "corpus").open(split)
    pieces: dict[int, list[Any]] = {}
    for batch in sequences.batches(7):
        for row in range(len(batch)):
            edges = [*batch.document_starts[row].tolist(), len(batch.tokens[row])]
            for d, index in enumerate(batch.document_ids[row].tolist()):
                pieces.setdefault(index, []).append(batch.tokens[row][edges[d] : edges[d + 1]])
    # a piece begins with the last token of the piece before
    return {
        index: tokenizer.decode(np.concatenate([parts[0], *[part[1:] for part in parts[1:]]]))
        for index, parts in pieces.items()
    }


def test_every_document_is_in_its_split_once_and_counted(tmp_path: Path, tokenizer: Any) -> None:
    texts = sentences(40)
    write(tmp_path, [*texts, "", ""])
    record = prepared(tmp_path, tokenizer)
    documents = read_documents(list_sources(("*.jsonl",), tmp_path), configured().columns)
    held_out = {d.text for d in documents if d.text and is_held_out(d.digest(), 0.3)}
    assert 0 < len(held_out) < 40
    train, heldout = (documents_of(tmp_path, s, tokenizer) for s in ("train", "heldout"))
    assert set(heldout.values()) == {text + END for text in held_out}
    assert set(train.values()) == {text + END for text in set(texts) - held_out}
    assert sorted([*train, *heldout]) == list(range(40))
    layout = CorpusLayout(tmp_path / "corpus")
    assert layout.read_record() == record
    assert record.counts["cut_documents"] > 0
    assert record.counts["empty_documents"] == 2
    assert sum(split.documents for split in record.splits.values()) == 40
    assert sum(split.bytes for split in record.splits.values()) == sum(map(len, texts))
    for name, split in record.splits.items():
        sequences = layout.open(name).read(np.arange(len(layout.open(name))))
        assert split.sequences == len(sequences)
        assert split.tokens == len(sequences.tokens.values)
        assert split.positions == len(sequences.positions.values)
        assert sequences.tokens.lengths.max() <= LENGTH
        np.testing.assert_array_equal(sequences.ids, np.arange(len(sequences)))
    assert record.together
    assert record.separator == [tokenizer.eos_token_id]
    assert record.settings["tokenizer"] == tokenizer_identity(tokenizer).fingerprint
    assert "2 empty documents skipped" in summary(record)
    assert f"train: {record.splits['train'].documents} documents" in summary(record)


def test_without_packing_every_sequence_has_one_document(tmp_path: Path, tokenizer: Any) -> None:
    write(tmp_path, sentences(30))
    record = prepared(tmp_path, tokenizer, together=False)
    assert not record.together
    for batch in CorpusLayout(tmp_path / "corpus").open("train").batches(9):
        assert (batch.document_starts.lengths == 1).all()
    packed = prepared(tmp_path, tokenizer)
    assert packed.splits["train"].sequences < record.splits["train"].sequences


def test_added_documents_do_not_move_others_between_splits(tmp_path: Path, tokenizer: Any) -> None:
    texts = sentences(60)
    write(tmp_path / "few", texts[:30])
    write(tmp_path / "more", list(reversed(texts)))
    sides = []
    for name in ("few", "more"):
        prepared(tmp_path / name, tokenizer)
        sides.append(set(documents_of(tmp_path / name, "heldout", tokenizer).values()))
    assert sides[0] == {text for text in sides[1] if text.removesuffix(END) in texts[:30]}
    assert len(sides[1]) > len(sides[0]) > 0


def test_the_same_corpus_gives_the_same_bytes_and_reports_its_progress(
    tmp_path: Path, tokenizer: Any
) -> None:
    write(tmp_path, sentences(300))
    reports: list[Report] = []
    record = prepared(tmp_path, tokenizer, report=reports.append)
    assert [(report.done, report.unit) for report in reports[:-1] if not report.doing] == [
        (0, "documents"), (256, "documents"), (300, "documents"),
    ]  # fmt: skip
    assert reports[-1].note == summary(record)

    def contents() -> dict[str, bytes]:
        return {p.name: p.read_bytes() for p in sorted((tmp_path / "corpus").iterdir())}

    first = contents()
    assert sorted(first) == ["corpus.json", "heldout.arrow", "train.arrow"]
    prepared(tmp_path, tokenizer)
    assert contents() == first


def test_an_interrupted_or_changed_corpus_leaves_no_folder(tmp_path: Path, tokenizer: Any) -> None:
    write(tmp_path, sentences(300))

    def killed(report: Report) -> None:
        raise KeyboardInterrupt

    def touched(report: Report) -> None:
        if report.done == 256:
            with (tmp_path / "a.jsonl").open("a", encoding="utf-8") as file:
                file.write('\n{"text": "late"}')

    with pytest.raises(KeyboardInterrupt):
        prepared(tmp_path, tokenizer, report=killed)
    with pytest.raises(ColdstillError, match=r"a\.jsonl: was changed while the corpus was read; "):
        prepared(tmp_path, tokenizer, report=touched)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize(
    ("contents", "line"),
    [
        (["", ""], "*.jsonl: nothing to learn: "),
        (sentences(1), "*.jsonl: holds one document"),
        (sentences(5), "raise corpus.holdout"),
        ([f"{i}" for i in range(3)], "nothing to learn"),
    ],
)
def test_a_corpus_without_anything_to_learn_is_refused(
    contents: list[str], line: str, tmp_path: Path, tokenizer: Any
) -> None:
    write(tmp_path, contents)
    with pytest.raises(ColdstillError) as error:
        prepared(tmp_path, tokenizer, holdout=1e-9, separator="")
    assert line in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "corpus").exists()


def test_a_difference_is_named_by_its_key(tmp_path: Path, tokenizer_folder: Path) -> None:
    tokenizer = load_tokenizer(str(tokenizer_folder), "test")
    write(tmp_path, sentences(40))
    prepared(tmp_path, tokenizer)
    record = CorpusLayout(tmp_path / "corpus").read_record()
    assert record is not None

    def difference(**changes: Any) -> str | None:
        return difference_in_corpus(record, configured(**changes), tmp_path, tokenizer)

    assert difference() is None
    assert difference(sequence_length=50) == "corpus.sequence_length was 40, is 50"
    assert difference(holdout=0.4) == "corpus.holdout was 0.3, is 0.4"
    assert difference(separator="") == "corpus.separator was None, is ''"
    columns = dataclasses.replace(configured().columns, text="body")
    assert str(difference(columns=columns)).startswith("corpus.columns was")
    # older records lack newer keys, which then have their defaults
    assert record.settings.pop("as_chat") is False
    del record.settings["bad_rows"]
    for key in ("roles", "system", "tools", "documents"):
        del record.settings["columns"][key]
    assert difference() is None
    assert difference(as_chat=True) == "corpus.as_chat was False, is True"
    columns = dataclasses.replace(configured().columns, tools="t")
    assert str(difference(columns=columns)).startswith("corpus.columns was ")
    tokenizer.chat_template = "{{ messages }}"
    assert difference() == "the chat template has changed"
    tokenizer.chat_template = None
    tokenizer.add_tokens(["<new>"])
    assert difference() == "the tokenizer has changed"


def test_a_difference_is_named_by_its_file(tmp_path: Path, tokenizer: Any) -> None:
    write(tmp_path, sentences(40))
    write(tmp_path, sentences(4, seed=3), "b.jsonl")
    record = prepared(tmp_path, tokenizer)

    def difference() -> str:
        return str(difference_in_corpus(record, configured(), tmp_path, tokenizer))

    write(tmp_path, sentences(5, seed=3), "c.jsonl")
    assert difference().startswith("the file ")
    assert difference().endswith("c.jsonl is new")
    (tmp_path / "c.jsonl").unlink()
    assert difference() == "None"
    os.utime(tmp_path / "b.jsonl", ns=(1, 1))
    assert difference() == "None"  # only the time has changed
    changed = (tmp_path / "b.jsonl").read_bytes()
    (tmp_path / "b.jsonl").write_bytes(changed.replace(b"0", b"9"))  # of the same size
    assert difference().endswith("b.jsonl has changed")
    (tmp_path / "b.jsonl").unlink()
    assert difference().endswith("b.jsonl is gone")


def test_a_change_with_the_same_time_and_size_is_found(tmp_path: Path, tokenizer: Any) -> None:
    write(tmp_path, sentences(40))
    path = tmp_path / "a.jsonl"
    os.utime(path, ns=(10**18, 10**18))
    record = prepared(tmp_path, tokenizer)
    now = path.stat().st_ctime_ns + 10**11

    def difference(record: CorpusRecord, written_ns: int = now) -> str | None:
        return difference_in_corpus(
            record, configured(), tmp_path, tokenizer, written_ns=written_ns
        )

    assert difference(record) is None
    old = path.read_bytes()
    path.write_bytes(old.replace(b"0", b"9"))
    os.utime(path, ns=(10**18, 10**18))
    assert str(difference(record)).endswith("a.jsonl has changed")
    # on a file system with a coarse clock both changes have one time
    ((name, size, _, digest),) = record.sources
    changed = path.stat().st_ctime_ns
    coarse = dataclasses.replace(record, sources=[[name, size, changed, digest]])
    assert str(difference(coarse, changed + 10**9)).endswith("a.jsonl has changed")
    # the time of an older change is trusted without reading the file
    assert difference(coarse, changed + 3 * 10**9) is None
    path.write_bytes(old)
    assert difference(record) is None


def test_bad_rows_are_refused_or_skipped_and_counted(
    tmp_path: Path, chatting: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coldstill.stages.prepare_corpus._BATCH", 7)
    good, long = pairs(30), CHAT[0] | {"content": "be brief " * LENGTH}
    bad: list[dict[str, Any]] = [
        {"messages": [{"role": "tool", "content": "3"}, *CHAT[1:]]},
        {"messages": [long, *CHAT[1:]]},
        {"prompt": "x" * LENGTH, "completion": "y"},
    ]
    for row, fault in zip(
        bad, ("the chat template", "its prompt", "its prompt of 40"), strict=True
    ):
        write_rows(tmp_path, [*good[:10], row, *good[10:]])
        with pytest.raises(ColdstillError, match=rf"^a\.jsonl:11: {fault} ") as error:
            prepared(tmp_path, chatting)
        assert "\n" not in str(error.value)
        assert 'corpus.bad_rows = "skip"' in str(error.value)
        assert not (tmp_path / "corpus").exists()
    write_rows(tmp_path, [*bad[:2], *good[:10], bad[2], *good[10:]])
    record = prepared(tmp_path, chatting, bad_rows="skip")
    assert record.counts["unrenderable_chats"] == 1
    assert record.counts["too_long_prompts"] == 2
    assert record.skipped == 3
    assert "; 1 chats that the template cannot render skipped" in summary(record)
    assert "; 2 prompts that leave no room for an answer skipped" in summary(record)
    # the rest is as if the bad rows did not exist
    alone = tmp_path / "alone"
    write_rows(alone, good)
    assert prepared(alone, chatting).splits == record.splits
    train, heldout = (documents_of(tmp_path, s, chatting) for s in ("train", "heldout"))
    assert sorted([*train, *heldout]) == list(range(30))


def test_skipping_bad_rows_is_a_difference_only_if_rows_were_skipped(
    tmp_path: Path, tokenizer: Any
) -> None:
    for skipped in (False, True):
        bad = [{"prompt": "x" * 99, "completion": "y"}] * skipped
        write_rows(tmp_path, [*pairs(30), *bad])
        record = prepared(tmp_path, tokenizer, bad_rows="skip")
        found = difference_in_corpus(record, configured(), tmp_path, tokenizer)
        assert (found == "corpus.bad_rows was 'skip', is 'refuse'") is skipped
    write_rows(tmp_path, [{"prompt": "x" * 99, "completion": f"{i}"} for i in range(9)])
    with pytest.raises(ColdstillError, match=r" without the 9 rows skipped: nothing to learn"):
        prepared(tmp_path, tokenizer, bad_rows="skip")


def test_the_summary_counts_chats_that_differ_from_their_rows(
    tmp_path: Path, chatting: Any
) -> None:
    chatting.chat_template = chat_templates.DATED
    chats = [
        {"messages": [*chat_templates.ONE[:1], answer | {"content": f"Hello {i}"}]}
        for i in range(30)
        for answer in ({"role": "assistant", "reasoning_content": "so"}, {"role": "assistant"})
    ]
    rows = [*chats, *pairs(3), {"messages": list(chat_templates.TOOL)}]
    write_rows(tmp_path, rows)
    with pytest.raises(ColdstillError, match=r"^a\.jsonl:64: .* does not write the tool call "):
        prepared(tmp_path, chatting, sequence_length=99)
    record = prepared(tmp_path, chatting, sequence_length=99, bad_rows="skip")
    assert summary(record).endswith(
        "; 1 chats with messages that the template does not write skipped; 30 messages without "
        "their thoughts, which the chat template leaves out; 60 chats that say it is 2025-01-01, "
        "where the template writes today's date; 3 prompts without the tokenizer's chat template "
        "(corpus.as_chat = true writes them with it)"
    )
    assert record.skipped == 1
    notes: list[str] = []

    def as_chat(rows: list[Row]) -> CorpusRecord:
        write_rows(tmp_path, rows)
        notes.clear()
        changes: Row = {"sequence_length": 99, "bad_rows": "skip", "as_chat": True}
        return prepared(
            tmp_path, chatting, report=lambda report: notes.append(report.note), **changes
        )

    without_effect = "corpus.as_chat = true has no effect: no row has a prompt"
    assert summary(as_chat(rows)).endswith("; 3 prompts written with the tokenizer's chat template")
    assert without_effect not in notes
    as_chat([{"text": f"alone {i}"} for i in range(30)])
    assert without_effect in notes


def test_wrong_labels_of_chats_by_version_0_1_0_are_found(tmp_path: Path, chatting: Any) -> None:
    write_rows(tmp_path, [{"messages": list(CHAT)}] * 3 + pairs(30))
    record = prepared(tmp_path, chatting)
    assert outdated_labels(record, chatting) is None
    del record.settings["as_chat"]
    assert "white space after each answer" in str(outdated_labels(record, chatting))
    write(tmp_path, sentences(40))  # labels of plain texts were right
    record = prepared(tmp_path, chatting)
    del record.settings["as_chat"]
    assert outdated_labels(record, chatting) is None


def test_each_prompt_is_a_sequence_without_labels(tmp_path: Path, chatting: Any) -> None:
    rows = [
        *pairs(30),
        *({"prompt": f"alone {i}"} for i in range(10)),
        {"messages": list(CHAT[:2])},
    ]
    write_rows(tmp_path, [*rows, {"prompt": ""}, {"prompt": None, "completion": "c"}])
    record = prepared(tmp_path, chatting, prompts=True)
    assert record.prompts
    assert not record.together
    assert record.separator == []
    assert record.counts["empty_documents"] == 2
    found: dict[str, set[str]] = {}
    for split in ("train", "heldout"):
        sequences = CorpusLayout(tmp_path / "corpus").open(split)
        assert len(sequences) == record.splits[split].documents == record.splits[split].sequences
        assert record.splits[split].positions == 0
        texts = [batch.tokens[i] for batch in sequences.batches(7) for i in range(len(batch))]
        found[split] = {chatting.decode(tokens) for tokens in texts}
    asked = "".join(f"<{m['role']}>{m['content']}{END}" for m in CHAT[:2]) + "<assistant>"
    assert found["train"] | found["heldout"] == {asked, *(r["prompt"] for r in rows[:-1])}
    assert f"train: {record.splits['train'].documents} prompts, " in summary(record)
    # the same documents are held out as in a corpus to learn from
    write_rows(tmp_path, rows[:30])
    prepared(tmp_path, chatting)
    learned = documents_of(tmp_path, "heldout", chatting)
    whole = {r["prompt"] + r["completion"] + END: r["prompt"] for r in rows[:30]}
    held_out = {whole[text] for text in learned.values()}
    assert len(held_out) > 2
    assert found["heldout"].issuperset(held_out)


def test_prompts_and_texts_are_not_confused(tmp_path: Path, tokenizer: Any) -> None:
    write_rows(tmp_path, pairs(30))
    for prompts in (False, True):
        record = prepared(tmp_path, tokenizer, prompts=prompts)
        found = {
            wanted: difference_in_corpus(record, configured(), tmp_path, tokenizer, prompts=wanted)
            for wanted in (False, True)
        }
        assert found[prompts] is None
        assert "teacher.generate" in str(found[not prompts])
    write_rows(tmp_path, [*pairs(30), {"text": "just a text"}])
    for rule in ("refuse", "skip"):
        with pytest.raises(
            ColdstillError, match=r"^a\.jsonl:31: a text, but teacher\.generate needs"
        ):
            prepared(tmp_path, tokenizer, prompts=True, bad_rows=rule)


def test_chats_are_prepared_alike_from_preferences_and_parquet(
    tmp_path: Path, chatting: Any
) -> None:
    chats = [
        [{"role": "user", "content": text[:9]}, {"role": "assistant", "content": text[9:30]}]
        for text in sentences(30)
    ]
    rows = [{"messages": chat, "id": i} for i, chat in enumerate(chats)]
    no = [{"role": "assistant", "content": "no"}]

    def splits(rows: list[Row]) -> Any:
        write_rows(tmp_path, rows)
        return prepared(tmp_path, chatting, sequence_length=128).splits

    expected = splits(rows)
    assert expected["train"].positions > 100
    better = [{"prompt": chat[:1], "chosen": chat[1:], "rejected": no} for chat in chats]
    assert splits(better) == expected
    # chats without an answer are refused or counted
    asking = {"conversations": [{"from": "human", "value": "?"}]}
    with pytest.raises(BadRowError, match=r"^a\.jsonl:3: ") as error:
        splits([*rows[:2], asking, *rows[2:]])
    assert error.value.kind == "unanswered_chats"
    write_rows(tmp_path, [*rows, asking])
    record = prepared(tmp_path, chatting, sequence_length=128, bad_rows="skip")
    assert (record.counts["unanswered_chats"], record.skipped) == (1, 1)
    write_rows(tmp_path, [asking] * 9)
    with pytest.raises(ColdstillError, match=r"^every row is bad, the first of them: a\.jsonl:1: "):
        prepared(tmp_path, chatting, bad_rows="skip")
    (tmp_path / "a.jsonl").unlink()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    files = ("*.parquet",)
    assert prepared(tmp_path, chatting, sequence_length=128, files=files).splits == expected
