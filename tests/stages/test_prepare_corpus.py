"""The corpus on disk: what is in it, what was left out, and when it has to be made anew."""

from __future__ import annotations

import dataclasses
import json
import os
from typing import TYPE_CHECKING, Any

import chat_templates
import numpy as np
import pytest
from chats import CHAT, TEMPLATE
from coldstill.data.corpus import is_held_out, list_sources, read_documents
from coldstill.data.errors import ColdstillError
from coldstill.data.prepared import CorpusLayout
from coldstill.stages.config import CorpusConfig
from coldstill.stages.corpus.provenance import difference_in_corpus, outdated_labels
from coldstill.stages.models.loading import load_tokenizer
from coldstill.stages.models.vocabulary import tokenizer_identity
from coldstill.stages.prepare_corpus import prepare_corpus, summary
from conftest import sentences

if TYPE_CHECKING:
    from pathlib import Path

    from coldstill.data.prepared import CorpusRecord, Split
    from coldstill.stages.report import Report

LENGTH = 40
END = "<|endoftext|>"


def write(folder: Path, texts: list[str], name: str = "a.jsonl") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"text": text}) for text in texts]
    (folder / name).write_text("\n".join(lines), encoding="utf-8")


def configured(**changes: Any) -> CorpusConfig:
    settings: dict[str, Any] = {
        "files": ("*.jsonl",), "sequence_length": LENGTH, "holdout": 0.3,
    }  # fmt: skip
    return CorpusConfig(**(settings | changes))


def prepared(folder: Path, tokenizer: Any, **changes: Any) -> CorpusRecord:
    together, prompts = changes.pop("together", True), changes.pop("prompts", False)
    return prepare_corpus(
        folder / "corpus",
        configured(**changes),
        folder,
        tokenizer,
        together=together,
        prompts=prompts,
    )


def documents_of(folder: Path, split: Split, tokenizer: Any) -> dict[int, str]:
    """Each document's text, put together again from its pieces."""
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


def test_every_document_is_there_once_and_on_its_side(tmp_path: Path, tokenizer: Any) -> None:
    texts = sentences(40)
    write(tmp_path, texts)
    record = prepared(tmp_path, tokenizer)
    assert record.counts["cut_documents"] > 0
    documents = list(read_documents(list_sources(("*.jsonl",), tmp_path), configured().columns))
    held_out = {d.text for d in documents if is_held_out(d.digest(), 0.3)}
    assert 0 < len(held_out) < 40
    train, heldout = (documents_of(tmp_path, s, tokenizer) for s in ("train", "heldout"))
    assert {text.removesuffix(END) for text in heldout.values()} == held_out
    assert {text.removesuffix(END) for text in train.values()} == set(texts) - held_out
    assert all(text.endswith(END) for text in [*train.values(), *heldout.values()])
    assert sorted([*train, *heldout]) == list(range(40))


def test_the_record_counts_what_the_files_hold(tmp_path: Path, tokenizer: Any) -> None:
    write(tmp_path, [*sentences(30), "", ""])
    record = prepared(tmp_path, tokenizer)
    layout = CorpusLayout(tmp_path / "corpus")
    assert layout.read_record() == record
    assert record.counts["empty_documents"] == 2
    assert sum(split.documents for split in record.splits.values()) == 30
    assert sum(split.bytes for split in record.splits.values()) == sum(map(len, sentences(30)))
    for name in ("train", "heldout"):
        sequences = layout.open(name).read(np.arange(len(layout.open(name))))
        split = record.splits[name]
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


def test_without_packing_every_sequence_is_of_one_document(tmp_path: Path, tokenizer: Any) -> None:
    write(tmp_path, sentences(30))
    record = prepared(tmp_path, tokenizer, together=False)
    assert not record.together
    sequences = CorpusLayout(tmp_path / "corpus").open("train")
    for batch in sequences.batches(9):
        assert (batch.document_starts.lengths == 1).all()
    packed = prepared(tmp_path, tokenizer)
    assert packed.splits["train"].sequences < record.splits["train"].sequences


def test_more_documents_do_not_move_those_that_were_there(tmp_path: Path, tokenizer: Any) -> None:
    texts = sentences(60)
    write(tmp_path / "few", texts[:30])
    write(tmp_path / "more", list(reversed(texts)))
    sides = []
    for name in ("few", "more"):
        prepared(tmp_path / name, tokenizer)
        sides.append(set(documents_of(tmp_path / name, "heldout", tokenizer).values()))
    assert sides[0] == {text for text in sides[1] if text.removesuffix(END) in texts[:30]}
    assert len(sides[1]) > len(sides[0]) > 0


def test_the_same_corpus_gives_the_same_bytes(tmp_path: Path, tokenizer: Any) -> None:
    write(tmp_path, sentences(40))
    prepared(tmp_path, tokenizer)

    def contents() -> dict[str, bytes]:
        return {p.name: p.read_bytes() for p in sorted((tmp_path / "corpus").iterdir())}

    first = contents()
    assert sorted(first) == ["corpus.json", "heldout.arrow", "train.arrow"]
    prepared(tmp_path, tokenizer)
    assert contents() == first


def test_a_corpus_is_there_whole_or_not_at_all(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, sentences(40))

    def killed(report: Report) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_corpus(
            tmp_path / "corpus", configured(), tmp_path, tokenizer, together=True, report=killed
        )
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_progress_counts_documents_and_ends_in_a_sentence(tmp_path: Path, tokenizer: Any) -> None:
    write(tmp_path, sentences(300))
    said: list[Report] = []
    record = prepare_corpus(
        tmp_path / "corpus", configured(), tmp_path, tokenizer, together=True, report=said.append
    )
    assert [(report.done, report.unit) for report in said[:-1] if not report.doing] == [
        (0, "documents"), (256, "documents"), (300, "documents"),
    ]  # fmt: skip
    assert said[-1].note == summary(record)


@pytest.mark.parametrize(
    ("contents", "told"),
    [
        (["", ""], "*.jsonl: nothing to learn: "),
        (sentences(1), "*.jsonl: holds one document"),
        (sentences(5), "raise corpus.holdout"),
        ([f"{i}" for i in range(3)], "nothing to learn"),
    ],
)
def test_a_corpus_with_nothing_to_learn_is_refused_in_one_line(
    contents: list[str], told: str, tmp_path: Path, tokenizer: Any
) -> None:
    write(tmp_path, contents)
    with pytest.raises(ColdstillError) as error:
        prepared(tmp_path, tokenizer, holdout=1e-9, separator="")
    assert told in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "corpus").exists()


def test_a_difference_is_named_by_its_key(tmp_path: Path, tokenizer_folder: Path) -> None:
    tokenizer = load_tokenizer(str(tokenizer_folder), "test")
    write(tmp_path, sentences(40))
    record = prepared(tmp_path, tokenizer)

    def difference(**changes: Any) -> str | None:
        return difference_in_corpus(record, configured(**changes), tmp_path, tokenizer)

    assert difference() is None
    reread = CorpusLayout(tmp_path / "corpus").read_record()
    assert reread is not None
    assert difference_in_corpus(reread, configured(), tmp_path, tokenizer) is None
    assert difference(sequence_length=50) == "corpus.sequence_length was 40, is 50"
    assert difference(holdout=0.4) == "corpus.holdout was 0.3, is 0.4"
    assert difference(separator="") == "corpus.separator was None, is ''"
    columns = dataclasses.replace(configured().columns, text="body")
    assert str(difference(columns=columns)).startswith("corpus.columns was")
    tokenizer.chat_template = "{{ messages }}"
    assert "chat template" in str(difference())
    tokenizer.chat_template = None
    tokenizer.add_tokens(["<new>"])
    assert "tokenizer" in str(difference())


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
    assert difference() == "None"  # touched, not changed
    changed = (tmp_path / "b.jsonl").read_bytes()
    (tmp_path / "b.jsonl").write_bytes(changed.replace(b"0", b"9"))  # of the same size
    assert difference().endswith("b.jsonl has changed")
    (tmp_path / "b.jsonl").unlink()
    assert difference().endswith("b.jsonl is gone")


def test_a_change_that_hides_behind_its_time_and_size_is_found(
    tmp_path: Path, tokenizer: Any
) -> None:
    write(tmp_path, sentences(40))
    path = tmp_path / "a.jsonl"
    os.utime(path, ns=(10**18, 10**18))  # long ago
    record = prepared(tmp_path, tokenizer)
    now = path.stat().st_ctime_ns + 10**11

    def difference(record: CorpusRecord, written_ns: int = now) -> str | None:
        return difference_in_corpus(
            record, configured(), tmp_path, tokenizer, written_ns=written_ns
        )

    assert difference(record) is None
    old = path.read_bytes()
    path.write_bytes(old.replace(b"0", b"9"))
    os.utime(path, ns=(10**18, 10**18))  # set back
    assert str(difference(record)).endswith("a.jsonl has changed")
    # as if on a file system so coarse that both changes bear one time
    ((name, size, _, digest),) = record.sources
    changed = path.stat().st_ctime_ns
    coarse = dataclasses.replace(record, sources=[[name, size, changed, digest]])
    assert str(difference(coarse, changed + 10**9)).endswith("a.jsonl has changed")
    # a file that had been left alone for a while is known by its time, without reading it
    assert difference(coarse, changed + 3 * 10**9) is None
    path.write_bytes(old)
    assert difference(record) is None


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    write(tmp_path, sentences(300))

    def touched(report: Report) -> None:
        if report.done == 256:
            with (tmp_path / "a.jsonl").open("a", encoding="utf-8") as file:
                file.write('\n{"text": "late"}')

    with pytest.raises(ColdstillError, match=r"a\.jsonl: was changed while the corpus was read; "):
        prepare_corpus(
            tmp_path / "corpus", configured(), tmp_path, tokenizer, together=True, report=touched
        )
    assert not (tmp_path / "corpus").exists()


def write_rows(folder: Path, rows: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = "\n".join(json.dumps(row) for row in rows)
    (folder / "a.jsonl").write_text(lines, encoding="utf-8")


def pairs(count: int) -> list[dict[str, Any]]:
    words = [text.split() for text in sentences(count, seed=5)]
    return [{"prompt": " ".join(w[:3]), "completion": " ".join(w[3:])} for w in words]


@pytest.fixture
def chatting(tokenizer_folder: Path) -> Any:
    """A tokenizer with a template that takes no tools."""
    tokenizer = load_tokenizer(str(tokenizer_folder), "test")
    no_tools = "{{ raise_exception('no tools') if messages[0].role == 'tool' }}"
    tokenizer.chat_template = no_tools + TEMPLATE
    return tokenizer


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
    for row, told in zip(bad, ("the chat template", "its prompt", "its prompt of 40"), strict=True):
        write_rows(tmp_path, [*good[:10], row, *good[10:]])
        with pytest.raises(ColdstillError, match=rf"^a\.jsonl:11: {told} ") as error:
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
    # and nothing else is another than it would be without them
    alone = tmp_path / "alone"
    write_rows(alone, good)
    assert prepared(alone, chatting).splits == record.splits
    train, heldout = (documents_of(tmp_path, s, chatting) for s in ("train", "heldout"))
    assert sorted([*train, *heldout]) == list(range(30))


def test_whether_bad_rows_are_skipped_is_a_difference_only_if_there_were_any(
    tmp_path: Path, tokenizer: Any
) -> None:
    rows = pairs(30)
    for skipped in (False, True):
        write_rows(tmp_path, [*rows, *[{"prompt": "x" * 99, "completion": "y"}] * skipped])
        record = prepared(tmp_path, tokenizer, bad_rows="skip")
        found = difference_in_corpus(record, configured(), tmp_path, tokenizer)
        assert (found == "corpus.bad_rows was 'skip', is 'refuse'") is skipped
    # as written before there was this key
    write_rows(tmp_path, rows)
    record = prepared(tmp_path, tokenizer)
    del record.settings["bad_rows"]
    assert difference_in_corpus(record, configured(), tmp_path, tokenizer) is None


def test_chats_that_are_not_as_their_rows_are_said_once_with_their_number(
    tmp_path: Path, tokenizer_folder: Path
) -> None:
    tokenizer = load_tokenizer(str(tokenizer_folder), "test")
    tokenizer.chat_template = chat_templates.DATED
    chats = [
        {"messages": [*chat_templates.ONE[:1], said | {"content": f"Hello {i}"}]}
        for i in range(30)
        for said in ({"role": "assistant", "reasoning_content": "so"}, {"role": "assistant"})
    ]
    rows = [*chats, *pairs(3), {"messages": list(chat_templates.TOOL)}]
    write_rows(tmp_path, rows)
    with pytest.raises(ColdstillError, match=r"^a\.jsonl:64: .* does not write the tool call "):
        prepared(tmp_path, tokenizer, sequence_length=99)
    record = prepared(tmp_path, tokenizer, sequence_length=99, bad_rows="skip")
    told = (
        "; 1 chats with messages that the template does not write skipped; 30 messages without "
        "their thoughts, which the chat template leaves out; 60 chats that say it is 2025-01-01, "
        "where the template writes today's date; 3 prompts without the tokenizer's chat template "
        "(corpus.as_chat = true writes them with it)"
    )
    assert summary(record).endswith(told)
    assert record.skipped == 1
    record = prepared(tmp_path, tokenizer, sequence_length=99, bad_rows="skip", as_chat=True)
    assert summary(record).endswith("; 3 prompts written with the tokenizer's chat template")


def test_as_chat_without_any_prompt_is_said_to_change_nothing(
    tmp_path: Path, tokenizer_folder: Path
) -> None:
    tokenizer = load_tokenizer(str(tokenizer_folder), "test")
    tokenizer.chat_template = chat_templates.PLAIN
    for rows, changes in ((pairs(9), True), ([{"text": f"alone {i}"} for i in range(30)], False)):
        write_rows(tmp_path, rows)
        notes: list[str] = []
        prepare_corpus(
            tmp_path / "corpus",
            configured(as_chat=True, sequence_length=99),
            tmp_path,
            tokenizer,
            together=True,
            report=lambda report: notes.append(report.note),  # noqa: B023
        )
        told = "corpus.as_chat = true changes nothing: no row is a prompt of its own"
        assert (told in notes) is not changes


def test_records_without_newer_keys_mean_their_defaults(tmp_path: Path, tokenizer: Any) -> None:
    write_rows(tmp_path, pairs(30))
    record = prepared(tmp_path, tokenizer)
    assert record.settings.pop("as_chat") is False
    assert record.settings["columns"].pop("roles") == {}
    assert difference_in_corpus(record, configured(), tmp_path, tokenizer) is None
    found = difference_in_corpus(record, configured(as_chat=True), tmp_path, tokenizer)
    assert found == "corpus.as_chat was False, is True"


def test_labels_of_chats_by_an_older_version_are_told(tmp_path: Path, chatting: Any) -> None:
    write_rows(tmp_path, [{"messages": list(CHAT)}] * 3 + pairs(30))
    record = prepared(tmp_path, chatting)
    assert outdated_labels(record, chatting) is None
    del record.settings["as_chat"]
    assert "white space after each answer" in str(outdated_labels(record, chatting))


def test_plain_texts_by_an_older_version_are_as_they_were(tmp_path: Path, chatting: Any) -> None:
    write(tmp_path, sentences(40))
    record = prepared(tmp_path, chatting)
    del record.settings["as_chat"]
    assert outdated_labels(record, chatting) is None


def test_a_corpus_of_bad_rows_says_that_they_were_skipped(tmp_path: Path, tokenizer: Any) -> None:
    write_rows(tmp_path, [{"prompt": "x" * 99, "completion": f"{i}"} for i in range(9)])
    with pytest.raises(
        ColdstillError, match=r"^\*\.jsonl without the 9 rows skipped: nothing to le"
    ):
        prepared(tmp_path, tokenizer, bad_rows="skip")


def test_of_prompts_each_is_a_sequence_with_nothing_to_learn(tmp_path: Path, chatting: Any) -> None:
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
    # the same documents are held out as where they are learned from
    write_rows(tmp_path, rows[:30])
    prepared(tmp_path, chatting)
    learned = documents_of(tmp_path, "heldout", chatting)
    whole = {r["prompt"] + r["completion"] + END: r["prompt"] for r in rows[:30]}
    held_out = {whole[text] for text in learned.values()}
    assert len(held_out) > 2
    assert found["heldout"].issuperset(held_out)


def test_a_corpus_of_prompts_is_never_taken_for_one_of_texts(
    tmp_path: Path, tokenizer: Any
) -> None:
    write_rows(tmp_path, pairs(30))
    for prompts in (False, True):
        record = prepared(tmp_path, tokenizer, prompts=prompts)
        told = {
            asked: difference_in_corpus(record, configured(), tmp_path, tokenizer, prompts=asked)
            for asked in (False, True)
        }
        assert told[prompts] is None
        assert "teacher.generate" in str(told[not prompts])


def test_a_text_among_prompts_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    write_rows(tmp_path, [*pairs(30), {"text": "just a text"}])
    for rule in ("refuse", "skip"):
        with pytest.raises(
            ColdstillError, match=r"^a\.jsonl:31: a text, but teacher\.generate needs"
        ):
            prepared(tmp_path, tokenizer, prompts=True, bad_rows=rule)
