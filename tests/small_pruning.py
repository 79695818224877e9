"""Small models of every family that can be pruned, and a calibration set."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from coldstill.stages.students.pruning.anatomy import Anatomy, anatomy_of
from coldstill.stages.students.pruning.importance import CalibrationSet, Importance
from conftest import FAMILIES, VOCABULARY, make_model

if TYPE_CHECKING:
    from coldstill.data.store.reader import StoreReader
    from coldstill.stages.students.pruning.anatomy import Sizes

ROWS = VOCABULARY + 16
TOKENS = torch.randint(0, VOCABULARY, (2, 90), generator=torch.Generator().manual_seed(3))
"""Longer than the sliding windows of the families."""
_GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 2}
_KINDS = ["sliding_attention", "full_attention", "sliding_attention"]
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128},
    "gpt2-untied": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128, "n_inner": 80,
                    "tie_word_embeddings": False},
    "llama": {"num_attention_heads": 4, "num_key_value_heads": 4},
    "llama-biased": {**_GROUPED, "tie_word_embeddings": True, "attention_bias": True,
                     "mlp_bias": True},
    "mistral": {**_GROUPED, "sliding_window": 64},
    "qwen2": _GROUPED,
    "qwen2-tied": {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 16,
                   "tie_word_embeddings": True},
    "qwen3": {**_GROUPED, "head_dim": 16, "tie_word_embeddings": True},
    "gemma": {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16},
    "gemma-untied": {**_GROUPED, "head_dim": 16, "tie_word_embeddings": False},
    "gemma2": {**_GROUPED, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 64,
               "layer_types": _KINDS},
    "gemma3_text": {**_GROUPED, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 64,
                    "layer_types": _KINDS},
    "gpt_neox": {"num_attention_heads": 4, "rotary_pct": 0.25},
    "gpt_neox-tied": {"num_attention_heads": 4, "tie_word_embeddings": True,
                      "use_parallel_residual": False},
}  # fmt: skip
"""Three layers each; some with grouped heads, biases, or norms of queries and keys."""
every_model = pytest.mark.parametrize("name", MODELS)


def pruning_model(name: str, seed: int = 0, depth: int = 3) -> Any:
    """One of `MODELS` with random weights, including norms and biases."""
    settings = MODELS[name]
    layers = {} if name.startswith("gpt2") else {"num_hidden_layers": depth}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, name, {**layers, **settings})
        model = make_model(name, ROWS, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def anatomy(model: Any) -> Anatomy:
    shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    heads = model.config.num_attention_heads
    return anatomy_of(model.config.model_type, heads, shapes, "students.small.prune")


def random_importance(sizes: Sizes, seed: int = 0) -> Importance:
    generator = torch.Generator().manual_seed(seed)
    return Importance(
        channels_D=torch.rand(sizes.hidden, generator=generator),
        neurons_LF=torch.rand(sizes.layers, sizes.feed_forward, generator=generator),
        heads_LH=torch.rand(sizes.layers, sizes.heads, generator=generator),
        layers_L=torch.rand(sizes.layers, generator=generator),
        loss=0.0,
    )


def magnitude_importance(model: Any, built: Anatomy) -> Importance:
    """Scores without activations: the sum of squares of a part's weights. Keys and values belong to
    all query heads of their group."""
    sizes, width = built.sizes, built.head_width
    importance = random_importance(sizes)
    scores = {key: torch.zeros_like(getattr(importance, key)) for key in
              ("channels_D", "neurons_LF", "heads_LH", "layers_L")}  # fmt: skip
    for name, weight in model.named_parameters():
        axes = built.axes(name) or ()
        inside = name.startswith("model.layers")
        layer = int(name.split(".")[2]) if inside else 0
        if inside:
            scores["layers_L"][layer] += weight.detach().square().sum()
        for axis, kind in enumerate(axes):
            if weight.dim() == 1 or kind == "free":
                continue
            squares = weight.detach().square().sum(1 - axis)
            if kind == "hidden":
                scores["channels_D"] += squares
            elif kind == "feed_forward":
                scores["neurons_LF"][layer] += squares
            else:
                by_head = squares.view(-1, width).sum(1)
                scores["heads_LH"][layer] += by_head.repeat_interleave(sizes.heads // len(by_head))
    changes: dict[str, Any] = {**scores}
    return dataclasses.replace(importance, **changes)


def whole_sample(store: StoreReader) -> CalibrationSet:
    return CalibrationSet(store=store, rows=np.arange(len(store)), isolation="positions")


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    out: torch.Tensor = model(input_ids=TOKENS, use_cache=False).logits
    return out


def expect_same_function(ours: Any, theirs: Any, tolerance: float = 1e-5) -> None:
    """Both models must have equal logits that are not constant."""
    expected, found = logits(theirs), logits(ours)
    scale = float(expected.abs().max())
    assert float(expected.std()) > 0.02 * scale
    assert float((found - expected).abs().max()) < tolerance * scale
