"""Adapters in a plain model: chosen layers, trained weights, and the merged model."""

from __future__ import annotations

import sys
from typing import Any

import peft
import pytest
import torch
from coldstill.data.errors import ColdstillError
from coldstill.stages.config import LoraConfig
from coldstill.stages.students.adapters import adapt, adapted_layers, merge_adapters
from conftest import FAMILIES, VOCABULARY, make_model
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers
from small_pruning import logits


def disturb(model: Any, scale: float = 0.1) -> None:
    """Change the adapters, which start as zero."""
    torch.manual_seed(5)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=scale)


@pytest.mark.parametrize("name", list(FAMILIES))
def test_all_linear_chooses_the_same_layers_as_peft(name: str) -> None:
    model = make_model(name, VOCABULARY)
    theirs = peft.LoraConfig(target_modules="all-linear")
    _maybe_include_all_linear_layers(theirs, model)
    ours = adapted_layers(model, "all-linear", "teacher.lora")
    assert set(ours) == theirs.target_modules
    assert len(ours) >= 4


def test_layers_are_chosen_by_the_end_of_their_names() -> None:
    model = make_model("llama", VOCABULARY)
    found = adapted_layers(model, ("self_attn.q_proj", "up_proj"), "teacher.lora")
    assert found == [
        f"model.layers.{layer}.{name}"
        for layer in (0, 1)
        for name in ("self_attn.q_proj", "mlp.up_proj")
    ]


@pytest.mark.parametrize("target", ["lm_head", "proj", "embed_tokens", "layers"])
def test_other_layers_than_linear_ones_below_the_head_are_refused(target: str) -> None:
    model = make_model("llama-tied", VOCABULARY)
    before = list(model.state_dict())
    with pytest.raises(
        ColdstillError,
        match=rf"^teacher\.lora\.targets: no linear .* '{target}'; choose among down_proj, gate",
    ):
        adapt(model, LoraConfig(targets=("q_proj", target)), 0, "teacher.lora")
    assert list(model.state_dict()) == before


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "gemma2"])
def test_adapters_start_as_zero_are_trained_alone_and_merged_exactly(name: str) -> None:
    model = make_model(name, VOCABULARY + 16)
    base = {key: value.clone() for key, value in model.state_dict().items()}
    before = logits(model)
    wrapper = adapt(model, LoraConfig(rank=4, alpha=8.0), 3, "teacher.lora")
    assert torch.equal(logits(model), before)
    assert wrapper.get_base_model() is model
    learning = {key for key, weight in model.named_parameters() if weight.requires_grad}
    assert learning
    assert all("lora_" in key for key in learning)

    disturb(model)
    adapted = logits(model)
    assert float((adapted - before).abs().max()) > 1e-2
    merge_adapters(wrapper)
    assert float((logits(model) - adapted).abs().max()) < 1e-3 * float(adapted.abs().max())
    assert model.state_dict().keys() == base.keys()
    layers = set(adapted_layers(model, "all-linear", "teacher.lora"))
    for key, value in model.state_dict().items():
        layer, _, part = key.rpartition(".")
        assert torch.equal(value, base[key]) != (layer in layers and part == "weight"), key
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == model.config.tie_word_embeddings


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merged_weight_follows_the_formula_and_is_rounded_once(dtype: torch.dtype) -> None:
    model = make_model("llama", VOCABULARY).to(dtype)
    weight = model.model.layers[0].self_attn.q_proj.weight.detach().clone()
    wrapper = adapt(model, LoraConfig(rank=4, alpha=6.0, targets=("q_proj",)), 0, "teacher.lora")
    disturb(model, 1e-2)
    layer = model.model.layers[0].self_attn.q_proj
    assert layer.lora_A["default"].weight.dtype == torch.float32
    product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    merge_adapters(wrapper)
    merged = model.model.layers[0].self_attn.q_proj.weight
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    expected = (weight.float() + 6.0 / 4 * product).to(dtype)
    torch.testing.assert_close(merged, expected, rtol=1e-5, atol=1e-6)


def test_the_seed_determines_the_adapters() -> None:
    def first(seed: int) -> torch.Tensor:
        model = make_model("llama", VOCABULARY)
        adapt(model, LoraConfig(), seed, "teacher.lora")
        weight: torch.Tensor = model.model.layers[0].self_attn.q_proj.lora_A["default"].weight
        return weight

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))


def test_without_peft_the_error_names_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ColdstillError) as caught:
        adapt(make_model("llama", VOCABULARY), LoraConfig(), 0, "teacher.lora")
    assert str(caught.value) == (
        "teacher.lora: needs the package 'peft', which is not installed; "
        "pip install 'coldstill[lora]'"
    )
