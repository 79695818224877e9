"""The memory rules are compared with the memory that a model takes."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import pytest
import torch
from coldstill.stages.config import ArchitectureConfig, TrainConfig
from coldstill.stages.models.device import peak_memory
from coldstill.stages.planning.memory import capture_memory, training_memory
from coldstill.stages.planning.model_sizes import sizes_of_table
from coldstill.stages.training.execution import running_blocks
from transformers import AutoConfig, AutoModelForCausalLM

if TYPE_CHECKING:
    from collections.abc import Callable

V, T, ROWS = 512, 512, 4
SIZES = sizes_of_table(
    ArchitectureConfig(layers=4, hidden=256, heads=4, feed_forward=704), vocabulary=V,
    sequence_length=T,
)  # fmt: skip
CPU = torch.device("cpu")
NOT_TAKEN = 4 * SIZES.parameters + 2 * 4 * ROWS * T * V
"""Bytes of the weights, which exist before, and of the chunk of logits, which is not computed."""


def small_model() -> Any:
    config = AutoConfig.for_model(
        "llama", vocab_size=V, hidden_size=256, num_hidden_layers=4, num_attention_heads=4,
        intermediate_size=704, max_position_embeddings=T, tie_word_embeddings=True,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


def packed() -> dict[str, torch.Tensor]:
    """Two documents in each sequence: the mask between them takes memory too."""
    positions = torch.arange(T).expand(ROWS, T).clone()
    positions[:, T // 2 :] -= T // 2
    tokens = torch.randint(0, V, (ROWS, T), generator=torch.Generator().manual_seed(0))
    return {"input_ids": tokens, "position_ids": positions}


def least(times: int, call: Callable[[], Any]) -> int:
    """Smallest memory of several calls: the rest of the process can only add to it."""
    found = []
    for _ in range(times):
        with peak_memory(CPU) as memory:
            call()
        found.append(memory.bytes)
    return min(found)


def test_a_forward_pass_takes_about_the_estimated_memory() -> None:
    model = small_model()
    few = {name: value[:1, :64] for name, value in packed().items()}
    with torch.no_grad():
        model.base_model(**few, use_cache=False)
        taken = least(5, lambda: model.base_model(**packed(), use_cache=False))
    assert taken == pytest.approx(capture_memory(SIZES, "fp32", ROWS * T, T) - NOT_TAKEN, rel=0.5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_training_step_takes_about_the_estimated_memory(checkpointing: bool) -> None:
    config = TrainConfig(steps=1, gradient_checkpointing=checkpointing)
    taken = []
    for _ in range(3):
        model = small_model()
        model.train()
        few = {name: value[:1, :64] for name, value in packed().items()}
        model.base_model(**few, use_cache=False)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        with running_blocks(model, config, "test"), peak_memory(CPU) as memory:
            output = model.base_model(**packed(), use_cache=False)
            output.last_hidden_state.square().sum().backward()
            optimizer.step()
        taken.append(memory.bytes)
    rule = training_memory(SIZES, "fp32", ROWS * T, T, checkpointing=checkpointing)
    assert min(taken) == pytest.approx(rule - NOT_TAKEN, rel=0.35)


def test_weights_gradients_and_optimiser_state_are_counted_exactly() -> None:
    larger = dataclasses.replace(SIZES, parameters=SIZES.parameters + 1000)
    for precision, width in (("fp32", 4), ("bf16", 2), ("auto", 4)):
        few, many = (capture_memory(sizes, precision, 8192, T) for sizes in (SIZES, larger))
        assert many - few == 1000 * width
    half = dataclasses.replace(SIZES, dtype="bfloat16")
    assert capture_memory(half, "auto", 8192, T) == capture_memory(SIZES, "bf16", 8192, T)
    grown = training_memory(larger, "fp32", 8192, T) - training_memory(SIZES, "fp32", 8192, T)
    assert grown == 16 * 1000
    frozen = [training_memory(s, "fp32", 8192, T, frozen=True) for s in (larger, SIZES)]
    assert frozen[0] - frozen[1] == 4 * 1000
    adapted = training_memory(SIZES, "fp32", 8192, T, frozen=True, adapters=1000)
    assert adapted - frozen[1] == 16 * 1000


def test_a_batch_has_whole_sequences_and_a_chunk_limits_the_logits() -> None:
    assert capture_memory(SIZES, "fp32", 2 * T + 5, T) == capture_memory(SIZES, "fp32", 2 * T, T)
    assert training_memory(SIZES, "fp32", 1, T) == training_memory(SIZES, "fp32", T, T)
    assert training_memory(SIZES, "fp32", 2 * T, T) > training_memory(SIZES, "fp32", T, T)
    wide, narrow = (dataclasses.replace(SIZES, vocabulary=v) for v in (131_072, 65_536))
    assert capture_memory(wide, "fp32", 8192, T) == capture_memory(narrow, "fp32", 8192, T)
