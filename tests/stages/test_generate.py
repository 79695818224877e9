"""Answers are drawn from the teacher's distribution and do not depend on their batch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from coldstill.data.alignment import labels
from coldstill.data.prepared import TokenizedDocument, build_sequences
from coldstill.data.schema import check_hashes
from coldstill.stages.capture.generate import answer, end_tokens
from coldstill.stages.config import GenerateConfig
from coldstill.stages.models.output_head import OutputHead, connect_head
from conftest import VOCABULARY, make_model
from transformers import GenerationConfig, LlamaConfig

if TYPE_CHECKING:
    from coldstill.data.schema import Sequences
    from numpy.typing import NDArray

LENGTHS = [1, 9, 30, 4, 17, 2, 25, 12]
NOTHING: frozenset[int] = frozenset()

families = pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", "gemma2"])


def make_head(family: str, sureness: float = 1.0) -> OutputHead:
    """A small teacher whose padding rows have the largest logits."""
    model = make_model(family, VOCABULARY + 16)
    weight = model.get_output_embeddings().weight
    with torch.no_grad():
        weight[:VOCABULARY].mul_(sureness)
        weight[VOCABULARY:] = 20 * weight[:16]
    return connect_head(model, VOCABULARY)


def prompts_of(rows: list[NDArray[np.int32]]) -> Sequences:
    packed = [
        [TokenizedDocument(100 + i, r, np.zeros(len(r), np.bool_))] for i, r in enumerate(rows)
    ]
    return build_sequences(40, packed)


@pytest.fixture(scope="module")
def prompts() -> Sequences:
    """Prompts of different lengths."""
    random = np.random.default_rng(0)
    return prompts_of([random.integers(0, VOCABULARY, n).astype(np.int32) for n in LENGTHS])


def answers(prompts: Sequences, answered: Sequences) -> list[list[int]]:
    pairs = zip(prompts.tokens, answered.tokens, strict=True)
    assert all(a[: len(p)].tolist() == p.tolist() for p, a in pairs)
    lengths = prompts.tokens.lengths
    return [answered.tokens[row][lengths[row] :].tolist() for row in range(len(prompts))]


@torch.no_grad()
def dense(head: OutputHead, tokens: list[int]) -> torch.Tensor:
    """[V] logits after some tokens, without cache, padding or other rows."""
    logits: torch.Tensor = head.model(torch.tensor([tokens]), use_cache=False).logits
    return logits[0, -1, :VOCABULARY].double()


def generated(
    head: OutputHead,
    prompts: Sequences,
    *,
    ends: frozenset[int] = NOTHING,
    length: int = 64,
    seed: int = 3,
    **config: Any,
) -> list[list[int]]:
    settings = GenerateConfig(**{"max_new_tokens": 16, **config})
    found = answer(
        head,
        prompts,
        settings,
        seed=seed,
        ends=ends,
        sequence_length=length,
        answering="padded",
    )
    return answers(prompts, found)


@families
def test_at_temperature_0_every_token_is_the_most_probable_one(
    family: str, prompts: Sequences
) -> None:
    head = make_head(family)
    found = generated(head, prompts, temperature=0.0, max_new_tokens=12)
    for prompt, answer_T in zip(prompts.tokens, found, strict=True):
        tokens = prompt.tolist()
        for _ in range(12):
            tokens.append(int(dense(head, tokens).argmax()))
        assert answer_T == tokens[len(prompt) :]
    assert generated(head, prompts, temperature=0.0, max_new_tokens=12, seed=9, top_k=2) == found
    assert generated(head, prompts, temperature=1e-30, max_new_tokens=12) == found


def expected(
    head: OutputHead, prompt: list[int], temperature: float, top_k: int, top_p: float
) -> Any:
    """[V] the requested distribution, computed densely."""
    probs = (dense(head, prompt) / temperature).softmax(0)
    order = probs.argsort(descending=True)
    if top_k:
        probs[order[top_k:]] = 0
        probs /= probs.sum()
    before = probs[order].cumsum(0) - probs[order]
    probs[order[before >= top_p]] = 0
    return (probs / probs.sum()).numpy()


def excess(seen: NDArray[np.int64], wanted: NDArray[np.float64]) -> float:
    """Pearson's chi-square in standard deviations above its expectation. Rare tokens count as
    one."""
    often = wanted >= 5
    seen, wanted = (np.append(part[often], part[~often].sum()) for part in (seen, wanted))
    there = wanted > 0
    chi = float(((seen - wanted)[there] ** 2 / wanted[there]).sum())
    freedom = int(there.sum()) - 1
    assert freedom > 3
    return float((chi - freedom) / np.sqrt(2 * freedom))


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.6, 0, 1.0), (2.0, 0, 1.0), (1.0, 7, 1.0), (1.0, 0, 0.8), (1.5, 30, 0.7)],
)
def test_many_answers_follow_the_distribution(temperature: float, top_k: int, top_p: float) -> None:
    head, count = make_head("llama", 3.0), 6000
    prompt = np.array([7, 250, 31], np.int32)
    found = generated(
        head,
        prompts_of([prompt] * count),
        max_new_tokens=1,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
    )
    seen = np.bincount([one for (one,) in found], minlength=VOCABULARY)
    wanted = expected(head, prompt.tolist(), temperature, top_k, top_p) * count
    assert len(seen) == VOCABULARY
    assert (wanted > 0).sum() > 5
    assert not seen[wanted == 0].any()
    assert excess(seen, wanted) < 4
    # another temperature would be detected
    other = expected(head, prompt.tolist(), temperature * 1.6, top_k, top_p) * count
    assert excess(seen, other) > 5


@families
def test_an_answer_does_not_depend_on_its_batch(family: str, prompts: Sequences) -> None:
    """The other rows decide the padding, and where a fuller row interrupts the others."""
    head = make_head(family, 0.5)
    for length in (64, 33):
        together = generated(head, prompts, length=length)
        for row in range(len(prompts)):
            (alone,) = generated(head, prompts.take(np.array([row])), length=length)
            assert alone == together[row]
        order = np.arange(len(prompts))[::-1]
        assert generated(head, prompts.take(order), length=length) == together[::-1]
    assert generated(head, prompts, seed=4) != generated(head, prompts, seed=3)


def test_copies_of_a_prompt_get_different_answers() -> None:
    head = make_head("llama", 0.3)
    found = generated(head, prompts_of([np.array([5, 6, 7], np.int32)] * 20))
    assert len({tuple(one) for one in found}) == 20
    steps = np.array(found)
    assert min(len(set(column)) for column in steps.T) > 5


@families
def test_an_answer_ends_at_the_first_end_token_or_when_the_sequence_is_full(
    family: str, prompts: Sequences
) -> None:
    head = make_head(family, 0.5)
    free = generated(head, prompts)
    assert [len(one) for one in free] == [16] * len(free)
    ends = frozenset({free[0][3], free[4][7], free[2][0]})
    cut = generated(head, prompts, ends=ends)
    for whole, one in zip(free, cut, strict=True):
        assert one == whole[: len(one)]
        assert len(one) == 16 or one[-1] in ends
        assert not ends & set(one[:-1])
    assert len(cut[2]) == 1
    assert {len(one) for one in cut} >= {1, 16} or len({len(one) for one in cut}) > 2
    tight = generated(head, prompts, length=31)
    assert [len(one) for one in tight] == [min(16, 31 - n) for n in LENGTHS]
    assert all(one == whole[: len(one)] for whole, one in zip(free, tight, strict=True))


def test_generation_stops_when_all_answers_have_ended(prompts: Sequences) -> None:
    head, steps = make_head("llama", 0.5), list[Any]()
    head.model.register_forward_hook(lambda *_: steps.append(1))
    free = generated(head, prompts)
    assert len(steps) == 16
    steps.clear()
    generated(head, prompts, ends=frozenset(one[2] for one in free))
    assert len(steps) <= 3


def test_no_row_grows_beyond_the_context() -> None:
    """Learned positions end at 128; the model fails one step later."""
    head = make_head("gpt2")
    rows = [np.arange(n, dtype=np.int32) for n in (127, 3, 120)]
    found = generated(head, prompts_of(rows), length=128, max_new_tokens=200)
    assert [len(one) for one in found] == [1, 125, 8]


def test_only_the_answer_is_supervised(prompts: Sequences) -> None:
    head = make_head("llama", 0.5)
    assert len(prompts.positions.values) == 0
    config = GenerateConfig(max_new_tokens=9)
    found = answer(head, prompts, config, seed=0, ends=frozenset({11}), sequence_length=36)
    found_answers = answers(prompts, found)
    assert labels(found).tolist() == [token for one in found_answers for token in one]
    assert found.positions.lengths.tolist() == [len(one) for one in found_answers]
    assert [int(p[0]) for p in found.positions] == [n - 1 for n in LENGTHS]
    check_hashes(found)
    np.testing.assert_array_equal(found.ids, prompts.ids)
    for name in ("document_ids", "document_starts"):
        np.testing.assert_array_equal(getattr(found, name).values, getattr(prompts, name).values)
    assert found.tokens.values.dtype == np.int32


def test_generation_settings_of_a_checkpoint_are_ignored(prompts: Sequences) -> None:
    head = make_head("llama", 0.5)
    plain = generated(head, prompts)
    settings_of_checkpoint = GenerationConfig(
        do_sample=True,
        temperature=0.01,
        top_k=1,
        repetition_penalty=9.0,
        no_repeat_ngram_size=1,
        suppress_tokens=[plain[0][0], plain[1][0]],
        eos_token_id=plain[0][1],
        max_length=3,
        num_beams=4,
    )
    head.model.generation_config = settings_of_checkpoint
    assert generated(head, prompts) == plain
    assert head.model.generation_config is settings_of_checkpoint
    greedy = generated(head, prompts, temperature=0.0)
    head.model.generation_config = GenerationConfig()
    assert generated(head, prompts, temperature=0.0) == greedy


def test_padding_rows_of_the_vocabulary_are_never_generated(prompts: Sequences) -> None:
    head = make_head("llama")
    logits = head.model(torch.tensor([prompts.tokens[1].tolist()]), use_cache=False).logits[0, -1]
    assert int(logits.argmax()) >= VOCABULARY  # it would be generated first
    for config in ({"temperature": 0.0}, {"temperature": 3.0}, {"top_p": 0.5}, {"top_k": 3}):
        assert (
            max(token for one in generated(head, prompts, **config) for token in one) < VOCABULARY
        )


def test_nan_logits_select_tokens_of_the_vocabulary(prompts: Sequences) -> None:
    """The capture of the answer reports them; a token past the vocabulary would break it."""
    head = make_head("llama")
    with torch.no_grad():
        head.model.get_output_embeddings().weight.fill_(torch.nan)
    for temperature in (0.0, 1.0):
        found = generated(head, prompts, temperature=temperature)
        assert all(0 <= token < VOCABULARY for one in found for token in one)


def test_a_prompt_that_leaves_no_room_raises_a_value_error(prompts: Sequences) -> None:
    with pytest.raises(ValueError, match="sequence 42: a prompt of 30 tokens leaves no room in 30"):
        generated(make_head("llama"), prompts, length=30)


def test_end_tokens_are_those_of_the_checkpoint_and_of_the_tokenizer() -> None:
    cases: list[tuple[Any, int | None, set[int]]] = [
        (7, 7, {7}), ([7, 8], 0, {0, 7, 8}), (None, 5, {5}), (None, None, set()),
    ]  # fmt: skip
    for configured, own, ends in cases:
        model = SimpleNamespace(
            generation_config=GenerationConfig(eos_token_id=configured),
            config=LlamaConfig(eos_token_id=None),
        )
        assert end_tokens(model, SimpleNamespace(eos_token_id=own)) == ends
