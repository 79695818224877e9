"""Prompts from a held-out store, and their continuations by models."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from coldstill.data.order import uniform
from coldstill.data.prepared import Packer, TokenizedDocument, build_sequences
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
    """A store of packed sequences without targets."""

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
def test_prompts_are_beginnings_of_documents(exact: bool) -> None:
    # a long document is cut into parts; each begins with the last token of the part before
    store = TokenStore([50, 300, 16, 64, 200, 45, 15])
    prompts = chosen(store, 20, exact=exact)
    assert {p.document for p in prompts} == {0, 1, 2, 3, 4, 5}  # the last is too short
    for prompt in prompts:
        tokens_T = store.documents[prompt.document][:LENGTH].tolist()
        half = min(32, len(tokens_T) // 2)
        assert list(prompt.tokens) == tokens_T[:half]
        # a part of a cut document ends with its sequence
        assert list(prompt.next) == tokens_T[half : half + 40]
        assert prompt.document in store.read([prompt.sequence]).sequences.document_ids.values


def test_the_corpus_recognises_a_part_far_from_its_beginning() -> None:
    # its second part stays in an open sequence while 100 others are written
    store = TokenStore([95, *[64] * 100])
    (row,) = [
        r for r in range(len(store)) if len(store.read(np.array([r])).sequences.tokens[0]) < 64
    ]
    assert row == 101
    assert row in {p.sequence for p in chosen(store, 200)}
    assert {p.sequence for p in chosen(store, 200, exact=True)} == {*range(101)}


def test_prompts_know_whether_their_document_ends() -> None:
    # sequences of 64 tokens: both of 30 in one, 90 in two, 64 fills one
    store = TokenStore([30, 30, 90, 64])
    ended = {prompt.document: prompt.ended for prompt in chosen(store, 9, exact=True)}
    rows = {p.document: store.read(np.array([p.sequence])).sequences for p in chosen(store, 9)}
    last = {d for d, s in rows.items() if int(s.document_ids[0][-1]) == d}
    assert ended == {document: document not in last for document in ended}
    assert {*ended.values()} == {True, False}


def test_the_seed_chooses_the_documents() -> None:
    store = TokenStore([60] * 40)
    first = chosen(store, 3)
    assert first == chosen(store, 3)
    assert [p.document for p in first] != [p.document for p in chosen(store, 3, seed=1)]
    assert chosen(store, 2) == first[:2]


def test_a_prompt_of_the_corpus_is_taken_whole() -> None:
    store = TokenStore([60, 60, 20], learned_from=[12, 55, 9])
    prompts = {p.document: p for p in chosen(store, 5)}
    assert {document: len(p.tokens) for document, p in prompts.items()} == {0: 12, 2: 9}
    assert list(prompts[2].next) == store.documents[2][9:].tolist()


def continuation(
    model: Any, prompt: Prompt = PROMPT, ends: frozenset[int] = frozenset()
) -> list[int]:
    (written,) = continued(model, [prompt], DRAWING, ends)
    return written


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_continuations_equal_sampling_without_a_cache(family: str) -> None:
    model = make_model(family, VOCABULARY + 16)
    with torch.no_grad():  # padding rows would be the most probable
        model.get_output_embeddings().weight[VOCABULARY:] *= 9.0
    written = continuation(model)
    assert len(written) == 40
    text = torch.tensor([[*PROMPT.tokens, *written]])
    draws = uniform(DRAWING.seed, np.full(40, PROMPT.sequence), np.arange(40, dtype=np.int32))
    for step in range(0, 40, 7):
        place = len(PROMPT.tokens) + step
        with torch.no_grad():
            logits = model(input_ids=text[:, :place], use_cache=False).logits
        probs = (logits[0, -1, :VOCABULARY].double() / 0.5).softmax(0).tolist()
        # tokens that are at least as probable take the beginning of [0, 1)
        own = probs[written[step]]
        end = sum(p for p in probs if p >= own)
        assert end - own - 1e-4 <= draws[step] <= end + 1e-4


def test_the_seed_and_the_sequence_change_the_random_numbers() -> None:
    model = make_model("llama", VOCABULARY)
    first = continuation(model)
    assert continuation(model) == first
    assert continuation(model, dataclasses.replace(PROMPT, sequence=4)) != first
    other = dataclasses.replace(DRAWING, seed=DRAWING.seed + 1)
    assert continued(model, [PROMPT], other, frozenset()) != [first]
    # near temperature 0, sampling is greedy
    cold = dataclasses.replace(DRAWING, temperature=1e-6)
    (greedy,) = continued(model, [PROMPT], cold, frozenset())
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*PROMPT.tokens, *greedy]])).logits[0, 4:-1]
    assert logits.argmax(1).tolist() == greedy


def test_a_model_without_a_cache_gives_the_same_text(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama", VOCABULARY)
    expected = continuation(model)
    own = model.forward

    def forward(input_ids: Any, **inputs: Any) -> Any:
        return own(input_ids=input_ids, use_cache=False)

    monkeypatch.setattr(model, "forward", forward)
    assert continuation(model) == expected


def test_generation_stops_at_an_end_and_at_the_context() -> None:
    model = make_model("gpt2", VOCABULARY)
    whole = continuation(model)
    end = whole[3]
    assert continuation(model, ends=frozenset({end})) == whole[: whole.index(end) + 1]
    long = dataclasses.replace(PROMPT, tokens=tuple(i % VOCABULARY for i in range(120)))
    assert len(continuation(model, long)) == 128 - 120
