"""The corpus on disk: what is in it, what was left out, and when it has to be made anew."""

from __future__ import annotations

import dataclasses
import json
import os
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from coldstill.data.corpus import is_held_out, list_sources, read_documents
from coldstill.data.errors import ColdstillError
from coldstill.data.prepared import CorpusLayout
from coldstill.stages.config import CorpusConfig
from coldstill.stages.models import load_tokenizer, tokenizer_identity
from coldstill.stages.prepare_corpus import difference_in_corpus, prepare_corpus, summary
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
    together = changes.pop("together", True)
    return prepare_corpus(
        folder / "corpus", configured(**changes), folder, tokenizer, together=together
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
    assert [(report.done, report.unit) for report in said[:-1]] == [
        (256, "documents"), (300, "documents"),
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
