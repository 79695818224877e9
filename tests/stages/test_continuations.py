"""Prompts from a held-out store, and what models make of them."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from coldstill.data.order import uniform
from coldstill.data.packing import Packer, TokenizedDocument, build_sequences
from coldstill.stages.continuations import (
    Drawing,
    Prompt,
    choose_prompts,
    continued,
    first_sequences,
)
from conftest import VOCABULARY, make_model

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

LENGTH = 64
PROMPT = Prompt(sequence=0, document=0, tokens=(5, 9, 200, 31, 7), next=(1,))
DRAWING = Drawing(seed=3, temperature=0.5, vocabulary=VOCABULARY)


class TokenStore:
    """Sequences packed as a corpus is, read as a store is; there are no targets."""

    def __init__(self, lengths: Sequence[int], learned_from: Sequence[int] = ()) -> None:
        random = np.random.default_rng(0)
        self.documents = [random.integers(0, VOCABULARY, n).astype(np.int32) for n in lengths]
        packer = Packer(LENGTH, together=True)
        packed: list[list[TokenizedDocument]] = []
        for i, tokens_T in enumerate(self.documents):
            start = learned_from[i] if learned_from else 0
            learned_T = np.arange(len(tokens_T)) >= start
            packed += packer.add(TokenizedDocument(i, tokens_T, learned_T))
        self._sequences = build_sequences(0, [*packed, *packer.finish()])

    def batches(self, size: int) -> Iterator[Any]:
        for start in range(0, len(self), size):
            yield self._sequences.take(np.arange(start, min(start + size, len(self))))

    def __len__(self) -> int:
        return len(self._sequences)

    def read(self, rows: Any) -> Any:
        return type("Block", (), {"sequences": self._sequences.take(rows)})


def chosen(store: Any, count: int, seed: int = 0, *, exact: bool = False) -> list[Prompt]:
    return choose_prompts(store, count, seed, first_sequences(store) if exact else None)


@pytest.mark.parametrize("exact", [True, False], ids=["with the corpus", "without"])
def test_prompts_are_beginnings_of_documents_and_what_follows_them(exact: bool) -> None:
    # long ones are cut into pieces that begin with the last token of the piece before
    store = TokenStore([50, 300, 16, 64, 200, 45, 15])
    prompts = chosen(store, 20, exact=exact)
    assert {p.document for p in prompts} == {0, 1, 2, 3, 4, 5}  # the last is too short
    for prompt in prompts:
        tokens_T = store.documents[prompt.document][:LENGTH].tolist()
        half = min(32, len(tokens_T) // 2)
        assert list(prompt.tokens) == tokens_T[:half]
        # a piece of a cut document ends with its sequence
        assert list(prompt.next) == tokens_T[half : half + 40]
        assert prompt.document in store.read([prompt.sequence]).sequences.document_ids.values


def test_the_end_of_a_document_far_from_its_beginning_is_told_by_the_corpus() -> None:
    # it waits in an open sequence while a hundred others pass
    store = TokenStore([95, *[64] * 100])
    (row,) = [
        r for r in range(len(store)) if len(store.read(np.array([r])).sequences.tokens[0]) < 64
    ]
    assert row == 101
    assert row in {p.sequence for p in chosen(store, 200)}
    assert {p.sequence for p in chosen(store, 200, exact=True)} == {*range(101)}


def test_it_is_told_where_a_document_ends() -> None:
    # 64 tokens a sequence: two of 30 stand in one, one of 90 in two, one of 64 fills its own
    store = TokenStore([30, 30, 90, 64])
    ended = {prompt.document: prompt.ended for prompt in chosen(store, 9, exact=True)}
    rows = {p.document: store.read(np.array([p.sequence])).sequences for p in chosen(store, 9)}
    last = {d for d, s in rows.items() if int(s.document_ids[0][-1]) == d}
    assert ended == {document: document not in last for document in ended}
    assert {*ended.values()} == {True, False}


def test_the_seed_decides_which() -> None:
    store = TokenStore([60] * 40)
    first = chosen(store, 3)
    assert first == chosen(store, 3)
    assert [p.document for p in first] != [p.document for p in chosen(store, 3, seed=1)]
    assert chosen(store, 2) == first[:2]


def test_a_prompt_that_the_corpus_gives_is_taken_whole() -> None:
    store = TokenStore([60, 60, 20], learned_from=[12, 55, 9])
    prompts = {p.document: p for p in chosen(store, 5)}
    assert {document: len(p.tokens) for document, p in prompts.items()} == {0: 12, 2: 9}
    assert list(prompts[2].next) == store.documents[2][9:].tolist()


def go_on(model: Any, prompt: Prompt = PROMPT, ends: frozenset[int] = frozenset()) -> list[int]:
    (written,) = continued(model, [prompt], DRAWING, ends)
    return written


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "gpt_neox", "qwen3"])
def test_it_writes_what_a_loop_without_a_cache_draws(family: str) -> None:
    model = make_model(family, VOCABULARY + 16)
    with torch.no_grad():  # rows past the vocabulary would be the most probable of all
        model.get_output_embeddings().weight[VOCABULARY:] *= 9.0
    written = go_on(model)
    assert len(written) == 40
    text = torch.tensor([[*PROMPT.tokens, *written]])
    draws = uniform(DRAWING.seed, np.full(40, PROMPT.sequence), np.arange(40, dtype=np.int32))
    for step in range(0, 40, 7):
        place = len(PROMPT.tokens) + step
        with torch.no_grad():
            logits = model(input_ids=text[:, :place], use_cache=False).logits
        probs = (logits[0, -1, :VOCABULARY].double() / 0.5).softmax(0).tolist()
        # what is at least as probable as the token takes [0, 1) up to its end
        own = probs[written[step]]
        end = sum(p for p in probs if p >= own)
        assert end - own - 1e-4 <= draws[step] <= end + 1e-4


def test_another_seed_and_another_sequence_draw_something_else() -> None:
    model = make_model("llama", VOCABULARY)
    first = go_on(model)
    assert go_on(model) == first
    assert go_on(model, dataclasses.replace(PROMPT, sequence=4)) != first
    other = dataclasses.replace(DRAWING, seed=DRAWING.seed + 1)
    assert continued(model, [PROMPT], other, frozenset()) != [first]
    # near 0 the most probable is all there is
    cold = dataclasses.replace(DRAWING, temperature=1e-6)
    (greedy,) = continued(model, [PROMPT], cold, frozenset())
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*PROMPT.tokens, *greedy]])).logits[0, 4:-1]
    assert logits.argmax(1).tolist() == greedy


def test_a_model_without_a_cache_writes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama", VOCABULARY)
    expected = go_on(model)
    own = model.forward

    def forward(input_ids: Any, **inputs: Any) -> Any:
        return own(input_ids=input_ids, use_cache=False)

    monkeypatch.setattr(model, "forward", forward)
    assert go_on(model) == expected


def test_it_ends_with_a_document_and_with_the_context() -> None:
    model = make_model("gpt2", VOCABULARY)
    whole = go_on(model)
    end = whole[3]
    assert go_on(model, ends=frozenset({end})) == whole[: whole.index(end) + 1]
    long = dataclasses.replace(PROMPT, tokens=tuple(i % VOCABULARY for i in range(120)))
    assert len(go_on(model, long)) == 128 - 120
