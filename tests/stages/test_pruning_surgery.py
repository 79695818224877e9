"""Pruning removes parts of a model and changes nothing else, in every family."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from coldstill.data.errors import ColdstillError
from coldstill.stages.models.output_head import connect_head
from coldstill.stages.students.pruning.anatomy import FAMILIES, anatomy_of
from coldstill.stages.students.pruning.cutting import cut, kept_parts
from coldstill.stages.students.pruning.importance import measure_importance
from coldstill.stages.students.pruning.layers import skip_layer
from conftest import VOCABULARY
from small_pruning import (
    anatomy,
    every_model,
    expect_same_function,
    logits,
    pruning_model,
    random_importance,
    whole_sample,
)
from transformers import AutoModelForCausalLM

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from coldstill.data.store.reader import StoreReader
    from coldstill.stages.students.pruning.anatomy import Anatomy, Sizes
    from coldstill.stages.students.pruning.cutting import Kept

WHERE = "students.small.prune"


def smaller(model: Any, sizes: Sizes, seed: int = 0) -> tuple[Any, Kept]:
    """The model cut to random parts of these sizes."""
    built = anatomy(model)
    kept = kept_parts(built, sizes, random_importance(built.sizes, seed))
    return cut(model, built, kept, WHERE), kept


@every_model
def test_pruning_to_the_full_size_is_the_identity_bit_for_bit(name: str) -> None:
    model = pruning_model(name)
    before = logits(model)
    same, _ = smaller(model, anatomy(model).sizes)
    assert torch.equal(logits(same), before)
    weights = model.state_dict()
    assert same.state_dict().keys() == weights.keys()
    for key, weight in same.state_dict().items():
        assert torch.equal(weight, weights[key]), key
    ours, theirs = same.config.to_dict(), model.config.to_dict()
    derived = {"head_dim", "n_inner"}  # the family derives these
    assert all(ours[key] == theirs[key] for key in theirs.keys() - derived)


@contextlib.contextmanager
def masked(model: Any, built: Anatomy, kept: Kept) -> Iterator[None]:
    """The whole model with the removed heads, neurons and layers masked."""
    width, hooks = built.head_width, []

    def zero(places: torch.Tensor) -> Any:
        def hook(module: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            mask = torch.zeros(inputs[0].shape[-1])
            mask[places] = 1
            return (inputs[0] * mask, *inputs[1:])

        return hook

    for number, layer in enumerate(model.get_submodule(built.layout.layers)):
        if number not in kept.layers:
            hooks.append(layer.register_forward_hook(skip_layer, with_kwargs=True))
            continue
        place = kept.layers.index(number)
        heads = (kept.heads[place][:, None] * width + torch.arange(width)).flatten()
        for part, places in (
            (built.layout.attention_out, heads),
            (built.layout.feed_forward_out, kept.neurons[place]),
        ):
            hooks.append(layer.get_submodule(part).register_forward_pre_hook(zero(places)))
    yield
    for hook in hooks:
        hook.remove()


@pytest.mark.slow
@every_model
def test_a_pruned_model_computes_what_the_masked_model_computes(name: str, tmp_path: Path) -> None:
    model = pruning_model(name)
    built = anatomy(model)
    whole = built.sizes
    # the next test cuts heads of families in which hidden depends on them
    heads = whole.heads if built.layout.bound else whole.heads // 2
    sizes = dataclasses.replace(
        whole,
        layers=2,
        feed_forward=24,
        heads=heads,
        kv_heads=heads if whole.kv_heads == whole.heads else whole.kv_heads,
    )
    small, kept = smaller(model, sizes)
    with masked(model, built, kept):
        expect_same_function(small, model)
    assert anatomy(small).sizes == sizes
    assert small.num_parameters() == built.parameters(sizes)

    small.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(model)
    assert torch.equal(logits(again), logits(small))
    words = torch.arange(5)[None]
    assert again.generate(words, max_new_tokens=3, do_sample=False).shape == (1, 8)
    written = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert written["model_type"] == built.name
    if not built.layout.bound:
        assert written["head_dim"] == built.head_width


def dead(model: Any, built: Anatomy, seed: int) -> tuple[Sizes, dict[str, list[set[int]]], int]:
    """Make some neurons, heads, channels and a layer dead. Returns the remaining sizes, the living
    parts by kind, and the dead layer."""
    layout, whole, width = built.layout, built.sizes, built.head_width
    random = torch.Generator().manual_seed(seed)
    group = whole.heads // whole.kv_heads

    def some(count: int, of: int) -> torch.Tensor:
        return torch.randperm(of, generator=random)[:count].sort().values

    idle = 1
    groups = max(1, whole.kv_heads * 3 // 4)
    heads = groups * group
    hidden = heads * width if layout.bound else 20
    alive: dict[str, list[set[int]]] = {"neurons": [], "groups": [], "channels": []}
    live = some(hidden, whole.hidden)
    alive["channels"].append(set(live.tolist()))
    with torch.no_grad():
        for number, layer in enumerate(model.get_submodule(layout.layers)):
            neurons, kept = some(40, whole.feed_forward), some(groups, whole.kv_heads)
            alive["neurons"].append(set(neurons.tolist()))
            alive["groups"].append(set(kept.tolist()))
            _zero_neurons(layer, neurons, whole.feed_forward)
            _zero_values(layer, kept, whole.kv_heads, width)
            if number == idle:
                for part in (layout.attention_out, layout.feed_forward_out):
                    for weight in layer.get_submodule(part).parameters():
                        weight.zero_()
        _zero_channels(model, built, live)
    sizes = dataclasses.replace(
        whole, layers=2, hidden=hidden, feed_forward=40, heads=heads, kv_heads=groups
    )
    return sizes, alive, idle


def _zero_neurons(layer: Any, alive: torch.Tensor, count: int) -> None:
    gone = torch.ones(count, dtype=torch.bool)
    gone[alive] = False
    for name, weight in layer.named_parameters():
        if any(part in name for part in ("gate_proj", "up_proj", "dense_h_to_4h")):
            weight[gone] = 0
        elif "c_fc" in name:
            weight[..., gone] = 0


def _zero_values(layer: Any, alive: torch.Tensor, groups: int, width: int) -> None:
    """Set the values of heads to zero, so that their output is zero."""
    for name, weight in layer.named_parameters():
        for group in set(range(groups)) - set(alive.tolist()):
            if "v_proj" in name:
                weight[group * width : (group + 1) * width] = 0
            elif "query_key_value" in name:  # each head: query, key, value
                weight[(3 * group + 2) * width : (3 * group + 3) * width] = 0
            elif "c_attn" in name:  # all queries, all keys, all values
                start = (2 * groups + group) * width
                weight[..., start : start + width] = 0


def _zero_channels(model: Any, built: Anatomy, live: torch.Tensor) -> None:
    """Write nothing to the dead channels. A channel of a LayerNorm is dead only if it always equals
    the mean, so the living channels get the mean 0."""
    centred = built.name in ("gpt2", "gpt_neox")
    gone = torch.ones(built.sizes.hidden, dtype=torch.bool)
    gone[live] = False
    tables = ("embed_tokens", "wte", "wpe", "embed_in")
    written = ("o_proj", "down_proj", "c_proj", "attention.dense", "dense_4h_to_h")
    for name, weight in model.named_parameters():
        transposed = "c_proj.weight" in name or any(table in name for table in tables)
        if any(part in name for part in (*tables, *written)):
            rows = weight.t() if transposed else weight
            rows[gone] = 0
            if centred:
                rows[live] -= rows[live].mean(0, keepdim=True)
        elif centred and name.endswith("bias") and ("norm" in name or "ln_" in name):
            weight[gone] = 0


@pytest.mark.slow
@every_model
def test_exactly_the_dead_parts_are_removed_and_the_function_stays(
    name: str, store: StoreReader
) -> None:
    model = pruning_model(name, seed=1)
    built = anatomy(model)
    sizes, alive, idle = dead(model, built, seed=5)
    importance = measure_importance(
        connect_head(model, VOCABULARY), built, whole_sample(store), "test"
    )
    kept = kept_parts(built, sizes, importance)
    assert kept.layers == [layer for layer in range(3) if layer != idle]
    assert set(kept.hidden.tolist()) == alive["channels"][0]
    for place, layer in enumerate(kept.layers):
        assert set(kept.neurons[place].tolist()) == alive["neurons"][layer]
        assert set(kept.kv_heads[place].tolist()) == alive["groups"][layer]
    small = cut(model, built, kept, WHERE)
    assert small.num_parameters() == built.parameters(sizes)
    expect_same_function(small, model, 2e-5)


def test_groups_are_ranked_by_the_norm_of_their_heads() -> None:
    model = anatomy(pruning_model("qwen2"))
    whole = dataclasses.replace(model.sizes, layers=1, heads=6, kv_heads=3)
    scores = torch.tensor([[5.0, 0.1, 3.0, 3.0, 0.0, 4.0]])  # norms 5.0, 4.2 and 4.0
    importance = dataclasses.replace(random_importance(whole), heads_LH=scores)
    for heads, kv_heads, expected in (
        (6, 3, [0, 1, 2, 3, 4, 5]),
        (4, 2, [0, 1, 2, 3]),  # neither the largest of a group counts,
        (2, 1, [0, 1]),  # nor the smallest, nor the sum
        (3, 3, [0, 2, 5]),  # of equal heads the first
        (2, 2, [0, 2]),
        (1, 1, [0]),
    ):
        sizes = dataclasses.replace(whole, heads=heads, kv_heads=kv_heads)
        kept = kept_parts(dataclasses.replace(model, sizes=whole), sizes, importance)
        assert kept.heads[0].tolist() == expected
        assert kept.kv_heads[0].tolist() == sorted({head // 2 for head in expected})


def test_a_half_precision_model_is_cut_to_fp32(store: StoreReader) -> None:
    model = pruning_model("llama-biased").to(torch.bfloat16)
    built = anatomy(model)
    sizes = dataclasses.replace(built.sizes, feed_forward=16)
    importance = measure_importance(
        connect_head(model, VOCABULARY), built, whole_sample(store), "test"
    )
    kept = kept_parts(built, sizes, importance)
    small = cut(model, built, kept, WHERE)
    assert small.dtype == torch.float32
    down = "model.layers.1.mlp.down_proj.weight"
    old, new = model.state_dict()[down], small.state_dict()[down]
    assert torch.equal(new, old[:, kept.neurons[1]].float())
    assert not torch.equal(old[:, :16].float(), new)


def test_an_unknown_family_is_refused() -> None:
    with pytest.raises(ColdstillError) as error:
        anatomy_of("bloom", 4, {}, WHERE)
    assert str(error.value) == (
        f"students.small.prune: cannot prune a 'bloom' model (have: {', '.join(FAMILIES)}); "
        "students.NAME.layers, such as { keep = 4 }, removes layers of any family"
    )


def test_a_model_that_differs_from_its_family_is_refused() -> None:
    shapes = anatomy(pruning_model("llama")).shapes
    changes: list[tuple[str, tuple[int, ...], str]] = [
        ("model.layers.0.self_attn.sinks", (4,), "self_attn.sinks is unknown"),
        ("model.layers.1.mlp.up_proj.weight", (70, 32), "is (70, 32), expected (64, 32)"),
        ("model.embed_tokens.weight", (32,), "it has no model.embed_tokens.weight of 2 axes"),
    ]
    for name, shape, reason in changes:
        with pytest.raises(ColdstillError, match="cannot prune this 'llama' model: ") as error:
            anatomy_of("llama", 4, {**shapes, name: shape}, WHERE)
        assert reason in str(error.value)
    for heads, reason in ((None, "no number of heads"), (3, "not divisible by its 3 heads")):
        with pytest.raises(ColdstillError, match=reason):
            anatomy_of("llama", heads, shapes, WHERE)
