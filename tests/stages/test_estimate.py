"""The estimated size of a corpus is close to that of the prepared corpus."""

from __future__ import annotations

import gzip
import json
from typing import TYPE_CHECKING, Any

import pytest
from chats import TEMPLATE
from coldstill.data.corpus.sources import list_sources
from coldstill.stages.config import CorpusConfig
from coldstill.stages.corpus.estimate import Estimate, NoEstimateError, estimate
from coldstill.stages.models.loading import load_tokenizer
from coldstill.stages.prepare_corpus import prepare_corpus
from conftest import sentences

if TYPE_CHECKING:
    from pathlib import Path

    from coldstill.data.prepared import CorpusRecord

CONFIG = CorpusConfig(files=("*.*",), sequence_length=40, holdout=0.2)


@pytest.fixture(scope="module")
def chatting(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer with a chat template, saved."""
    tokenizer = load_tokenizer(str(tokenizer_folder), "test")
    tokenizer.chat_template = TEMPLATE
    folder = tmp_path_factory.mktemp("chatting")
    tokenizer.save_pretrained(folder)
    return folder


def estimated(folder: Path, tokenizer: Path | None, *, prompts: bool = False) -> Estimate:
    return estimate(CONFIG, list_sources(CONFIG.files, folder), tokenizer, prompts=prompts)


def prepared(folder: Path, tokenizer: Path) -> CorpusRecord:
    loaded = load_tokenizer(str(tokenizer), "test")
    return prepare_corpus(folder / "corpus", CONFIG, folder, loaded, together=True)


def pair(text: str, kind: str) -> dict[str, Any]:
    asked, answer = text[:9], text[9:]
    if kind == "texts":
        return {"text": text}
    if kind == "prompts":
        return {"prompt": asked, "completion": answer}
    roles = [("user", asked), ("assistant", answer)]
    return {"messages": [{"role": role, "content": content} for role, content in roles]}


@pytest.mark.parametrize("kind", ["texts", "prompts", "chats"])
def test_the_estimate_of_a_small_corpus_is_exact(tmp_path: Path, chatting: Path, kind: str) -> None:
    rows = [pair(text, kind) for text in sentences(80)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows[:40])), encoding="utf-8")
    rest = "\n".join(map(json.dumps, rows[40:])).encode()
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(rest))
    found = estimated(tmp_path, chatting)
    assert (found.documents, found.is_whole) == (80, True)
    for split, record in prepared(tmp_path, chatting).splits.items():
        counts = (found.sequences[split], found.tokens[split], found.positions[split])
        assert counts == (record.sequences, record.tokens, record.positions)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "packed"), [("texts", False), ("prompts", True)])
def test_a_large_corpus_is_estimated_from_a_sample(
    tmp_path: Path, chatting: Path, kind: str, packed: bool
) -> None:
    lines = "".join(json.dumps(pair(text, kind)) + "\n" for text in sentences(1500)).encode()
    name = "a.jsonl.gz" if packed else "a.jsonl"
    (tmp_path / name).write_bytes(gzip.compress(lines) if packed else lines)
    found = estimated(tmp_path, chatting)
    assert (found.documents, found.is_whole) == (512, False)
    splits = prepared(tmp_path, chatting).splits
    for name in ("sequences", "tokens", "positions"):
        whole = sum(getattr(record, name) for record in splits.values())
        assert sum(getattr(found, name).values()) == pytest.approx(whole, rel=0.05)


def test_without_a_tokenizer_a_token_has_four_bytes(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"prompt": "p" * 40, "completion": "c" * 60} for _ in range(50)]
    answer = [{"role": "user", "content": "p" * 40}, {"role": "assistant", "content": "c" * 60}]
    rows += [{"messages": answer}] * 50
    lines = "\n".join(map(json.dumps, rows)).encode()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    found = estimated(tmp_path, None)
    assert sum(found.tokens.values()) == 100 * 25
    assert sum(found.positions.values()) == 100 * 15


def test_each_prompt_is_estimated_as_a_sequence(tmp_path: Path, chatting: Path) -> None:
    rows = [{"prompt": text[:20]} for text in sentences(50)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    found = estimated(tmp_path, chatting, prompts=True)
    assert sum(found.sequences.values()) == 50
    assert sum(found.positions.values()) == 0


def test_bad_rows_do_not_stop_the_estimate(tmp_path: Path, chatting: Path) -> None:
    good = [pair(text, "texts") for text in sentences(20)]
    bad = [{"text": 3}, {"messages": [{"role": "unknown", "content": ""}]}, {"prompt": "p" * 99}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, [*good[:9], *bad, *good[9:]])))
    assert estimated(tmp_path, chatting).documents == 20


def test_a_corpus_that_cannot_be_sampled_is_reported(tmp_path: Path, chatting: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": 3}\n')
    with pytest.raises(NoEstimateError, match=r"^a\.jsonl: column 'text' holds int 3"):
        estimated(tmp_path, chatting)
    (tmp_path / "a.jsonl").write_text('{"text": "3"}\n')
    with pytest.raises(NoEstimateError, match="transformers cannot load the tokenizer quickly"):
        estimated(tmp_path, tmp_path)
