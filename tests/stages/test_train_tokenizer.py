"""A tokenizer is trained on the training split of the corpus."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from coldstill.data.corpus.document import Document, is_held_out
from coldstill.data.errors import ColdstillError
from coldstill.stages.config import CorpusConfig, TokenizerConfig
from coldstill.stages.corpus.train_tokenizer import END_OF_TEXT, train_tokenizer
from coldstill.stages.models.loading import load_tokenizer
from coldstill.stages.models.vocabulary import vocabulary_size
from conftest import sentences

if TYPE_CHECKING:
    from pathlib import Path


def trained(folder: Path, vocabulary: int, texts: list[str], holdout: float = 0.3) -> Any:
    folder.mkdir()
    lines = "\n".join(json.dumps({"text": text}) for text in texts)
    (folder / "a.jsonl").write_text(lines, encoding="utf-8")
    corpus = CorpusConfig(files=("a.jsonl",), holdout=holdout)
    return train_tokenizer(folder / "out", TokenizerConfig(vocabulary=vocabulary), corpus, folder)


def test_any_text_is_encoded_and_decoded_unchanged(tmp_path: Path) -> None:
    tokenizer = trained(tmp_path / "a", 300, sentences(40))
    assert vocabulary_size(tokenizer) == 300
    assert tokenizer.eos_token == END_OF_TEXT
    loaded = load_tokenizer(str(tmp_path / "a" / "out"), "test")
    for text in (" spaced  out\n\n", "ünïcödé 🙂 ✓", "\x00\t\r", sentences(1, seed=9)[0]):
        assert loaded.decode(loaded(text)["input_ids"]) == text
        assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_held_out_texts_do_not_affect_the_tokenizer(tmp_path: Path) -> None:
    texts = [f"{text} {'zyxw' * 9}" for text in sentences(40)]
    everything = trained(tmp_path / "a", 300, texts, holdout=1e-9)
    assert any("zyxw" in token for token in everything.get_vocab())
    held = [t for t in texts if is_held_out(Document(where="", text=t).digest(), 0.3)]
    plain = [t for t in sentences(40) if not is_held_out(Document(where="", text=t).digest(), 0.3)]
    assert held
    without = trained(tmp_path / "c", 300, [*held, *plain])
    assert not any("zyxw" in token for token in without.get_vocab())


def test_a_corpus_too_small_for_the_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ColdstillError, match=r"gives only \d+ tokens, expected 5000; set it to "):
        trained(tmp_path / "a", 5000, sentences(5), holdout=1e-9)
    assert not (tmp_path / "a" / "out").exists()
