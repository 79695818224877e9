"""Rules for memory against what a model really takes."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import pytest
import torch
from coldstill.stages.config import ArchitectureConfig, TrainConfig
from coldstill.stages.models.device import peak_memory
from coldstill.stages.planning.memory import capture_memory, training_memory
from coldstill.stages.planning.model_sizes import ModelSizes, sizes_of_table
from coldstill.stages.training.blocks import running_blocks
from transformers import AutoConfig, AutoModelForCausalLM

if TYPE_CHECKING:
    from collections.abc import Callable

V, T, ROWS = 512, 512, 4
TABLE = ArchitectureConfig(layers=4, hidden=256, heads=4, feed_forward=704)
CPU = torch.device("cpu")


def model_and_sizes() -> tuple[object, ModelSizes]:
    config = AutoConfig.for_model(
        "llama",
        vocab_size=V,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=704,
        max_position_embeddings=T,
        tie_word_embeddings=True,
    )
    return AutoModelForCausalLM.from_config(config), sizes_of_table(TABLE, V, T)


def packed() -> dict[str, torch.Tensor]:
    """Two documents to a sequence: the mask that keeps them apart takes memory too."""
    places = torch.arange(T).expand(ROWS, T).clone()
    places[:, T // 2 :] -= T // 2
    tokens = torch.randint(0, V, (ROWS, T), generator=torch.Generator().manual_seed(0))
    return {"input_ids": tokens, "position_ids": places}


def without_logits(sizes: ModelSizes) -> int:
    """Bytes of the chunk that the rules add: not taken here."""
    return 2 * 4 * ROWS * T * sizes.vocabulary


def least(call: Callable[[], Any]) -> int:
    """What a call takes: what else the process does at that moment can only add to it."""
    found = []
    for _ in range(5):
        with peak_memory(CPU) as memory:
            call()
        found.append(memory.bytes)
    return min(found)


def test_a_forward_pass_takes_about_what_the_rule_says() -> None:
    made, sizes = model_and_sizes()
    model: Any = made
    few = {name: value[:1, :64] for name, value in packed().items()}
    with torch.no_grad():
        model.base_model(**few, use_cache=False)
        taken = least(lambda: model.base_model(**packed(), use_cache=False))
    rule = capture_memory(sizes, "fp32", ROWS * T, T)
    foretold = rule - 4 * sizes.parameters - without_logits(sizes)
    assert taken == pytest.approx(foretold, rel=0.5)


def training_step(*, again: bool) -> int:
    """What the first step of a new model takes, gradients and the optimiser's state included."""
    model: Any = model_and_sizes()[0]
    model.train()
    few = {name: value[:1, :64] for name, value in packed().items()}
    model.base_model(**few, use_cache=False)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    with (
        running_blocks(model, TrainConfig(steps=1, gradient_checkpointing=again), "test"),
        peak_memory(CPU) as memory,
    ):
        output = model.base_model(**packed(), use_cache=False)
        output.last_hidden_state.square().sum().backward()
        optimizer.step()
    return memory.bytes


@pytest.mark.parametrize("again", [False, True], ids=["remembered", "computed-again"])
def test_a_training_step_takes_about_what_the_rule_says(again: bool) -> None:
    sizes = sizes_of_table(TABLE, V, T)
    rule = training_memory(sizes, "fp32", ROWS * T, T, again=again)
    foretold = rule - 4 * sizes.parameters - without_logits(sizes)
    taken = min(training_step(again=again) for _ in range(3))
    assert taken == pytest.approx(foretold, rel=0.35)


def test_what_counts_exactly_is_counted_exactly() -> None:
    sizes = sizes_of_table(TABLE, V, T)
    larger = dataclasses.replace(sizes, parameters=sizes.parameters + 1000)
    for precision, width in (("fp32", 4), ("bf16", 2), ("auto", 4)):
        grown = capture_memory(larger, precision, 8192, T) - capture_memory(
            sizes, precision, 8192, T
        )
        assert grown == 1000 * width
    half = dataclasses.replace(sizes, dtype="bfloat16")
    assert capture_memory(half, "auto", 8192, T) == capture_memory(sizes, "bf16", 8192, T)
    grown = training_memory(larger, "fp32", 8192, T) - training_memory(sizes, "fp32", 8192, T)
    assert grown == 16 * 1000
    frozen = [training_memory(s, "fp32", 8192, T, frozen=True) for s in (larger, sizes)]
    assert frozen[0] - frozen[1] == 4 * 1000
    adapted = training_memory(sizes, "fp32", 8192, T, frozen=True, adapters=1000)
    assert adapted - frozen[1] == 16 * 1000


def test_a_batch_is_whole_sequences_and_at_least_one() -> None:
    sizes = sizes_of_table(TABLE, V, T)
    assert capture_memory(sizes, "fp32", 2 * T + 5, T) == capture_memory(sizes, "fp32", 2 * T, T)
    assert training_memory(sizes, "fp32", 1, T) == training_memory(sizes, "fp32", T, T)
    assert training_memory(sizes, "fp32", 2 * T, T) > training_memory(sizes, "fp32", T, T)


def test_logits_are_never_held_for_more_than_a_chunk() -> None:
    wide = dataclasses.replace(sizes_of_table(TABLE, V, T), vocabulary=128_256)
    narrow = dataclasses.replace(wide, vocabulary=64_128)
    assert capture_memory(wide, "fp32", 8192, T) == capture_memory(narrow, "fp32", 8192, T)
