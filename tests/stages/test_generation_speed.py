"""How fast a model writes, and what a token costs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from coldstill.data.packing import TokenizedDocument, build_sequences
from coldstill.stages.evaluation import generation_speed as module
from coldstill.stages.evaluation.flops import flops_per_token
from coldstill.stages.evaluation.generation_speed import BATCHES, GenerationSpeed, generation_speed
from conftest import make_model
from transformers import LlamaConfig, LlamaForCausalLM

if TYPE_CHECKING:
    from coldstill.data.schema import Sequences

VOCABULARY = 64


def sequences_of(*lengths: int) -> Sequences:
    random = np.random.default_rng(0)
    rows = [
        [TokenizedDocument(i, random.integers(0, VOCABULARY, n).astype(np.int32), np.ones(n, bool))]
        for i, n in enumerate(lengths)
    ]
    return build_sequences(0, rows)


@pytest.fixture(autouse=True)
def _few_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_REPEATS", 2)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "gpt_neox"])
def test_every_batch_is_measured_and_adds_up(family: str) -> None:
    model = make_model(family, VOCABULARY)
    speeds = generation_speed(model, sequences_of(40, 30, 40), 128)
    assert [speed.batch for speed in speeds] == list(BATCHES)
    for speed in speeds:
        assert speed.prompt_tokens == 40
        assert speed.new_tokens == 32
        assert 0 < speed.token_seconds <= speed.token_seconds_p95
        assert speed.prefill_tokens_per_second == pytest.approx(
            speed.batch * 40 / speed.first_token_seconds, rel=1e-2
        )
        assert speed.decode_tokens_per_second == pytest.approx(
            speed.batch / speed.token_seconds, rel=1e-2
        )


def test_what_is_written_is_what_the_model_writes_without_a_cache(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make_model("llama", VOCABULARY)
    seen: list[torch.Tensor] = []
    own = model.forward

    def watched(**inputs: Any) -> Any:
        seen.append(inputs["input_ids"])
        return own(**inputs)

    watched.__signature__ = module.inspect.signature(own)  # type: ignore[attr-defined]
    monkeypatch.setattr(model, "forward", watched)
    prompts = torch.randint(0, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        module._written(model, prompts, 5)
        text = torch.cat(seen, 1)
        for place in range(7, 11):
            expected = own(input_ids=text[:, :place], use_cache=False).logits[:, -1].argmax(-1)
            assert torch.equal(text[:, place], expected)


def test_prompts_are_as_long_as_the_context_allows_and_no_longer() -> None:
    model = make_model("gpt2", VOCABULARY)
    assert model.config.n_positions == 128
    for longest, prompt, new in ((128, 96, 32), (20, 10, 10)):
        for speed in generation_speed(model, sequences_of(400), longest):
            assert (speed.prompt_tokens, speed.new_tokens) == (prompt, new)


def test_medians_and_the_slow_end_are_of_the_further_tokens() -> None:
    runs = [[0.5] + [0.01] * 18 + [0.2] * 2, [0.7] + [0.02] * 20]
    speed = module._speed(torch.Size([4, 10]), runs)
    assert speed.first_token_seconds == pytest.approx(0.6)
    assert speed.token_seconds == pytest.approx(0.02)
    assert speed.token_seconds_p95 == pytest.approx(0.029, abs=0.01)
    assert speed.decode_tokens_per_second == pytest.approx(200.0)


def test_a_model_without_a_cache_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama", VOCABULARY)
    own = model.forward
    monkeypatch.setattr(
        model, "forward", lambda **inputs: own(input_ids=inputs["input_ids"], use_cache=False)
    )
    found: tuple[GenerationSpeed, ...] = generation_speed(model, sequences_of(40), 128)
    assert found == ()


def test_operations_are_those_of_the_matrices() -> None:
    width, wide, layers, length = 32, 96, 3, 20
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=width,
            intermediate_size=wide,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    ).eval()
    projections = width * (width + width // 2 + width // 2 + width) + 3 * width * wide
    attention = 2 * length * width
    expected = 2 * (layers * (projections + attention) + width * VOCABULARY)
    # rotary frequencies are a product too, small and made once
    assert flops_per_token(model, length) == pytest.approx(expected, rel=0.01)
