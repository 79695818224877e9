"""Importance scores follow the published formulas."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from coldstill.stages.models.isolation import model_inputs
from coldstill.stages.models.output_head import connect_head
from coldstill.stages.students.pruning.cutting import choose
from coldstill.stages.students.pruning.importance import (
    calibration_set,
    judge_layers_by_loss,
    measure,
    sample_loss,
)
from coldstill.stages.students.pruning.layers import cut_to_layers
from conftest import VOCABULARY
from small_pruning import anatomy, pruning_model, whole_sample
from torch.nn import functional

if TYPE_CHECKING:
    from coldstill.data.store.reader import StoreReader
    from coldstill.stages.students.pruning.importance import CalibrationSet


def alone(model: Any, store: StoreReader, names: list[str]) -> dict[str, list[torch.Tensor]]:
    """[T, X] input of each named module (output of norms), one sequence at a time without
    padding."""
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in names}

    def listen(name: str) -> Any:
        def hook(module: Any, inputs: Any, named: Any, output: Any) -> None:
            states = output if "norm" in name else inputs[0]
            seen[name].append(states[0].detach().double())

        return hook

    hooks = [
        model.get_submodule(name).register_forward_hook(listen(name), with_kwargs=True)
        for name in names
    ]
    with torch.no_grad():
        for row in range(len(store)):
            sequence = store.read(np.array([row])).sequences
            model(**model_inputs(sequence, "positions", torch.float32), use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


def score(rows: list[torch.Tensor]) -> torch.Tensor:
    """The mean over each sequence, then the norm over sequences."""
    means_NX = torch.stack([row_TX.abs().mean(0) for row_TX in rows])
    return means_NX.square().sum(0).sqrt()


def test_scores_follow_the_formulas(store: StoreReader) -> None:
    model = pruning_model("llama-biased")
    importance = measure(
        connect_head(model, VOCABULARY), anatomy(model), whole_sample(store), "test"
    )
    layers = [f"model.layers.{i}" for i in range(3)]
    readers = ("input_layernorm", "post_attention_layernorm")
    norms = [*(f"{layer}.{norm}" for layer in layers for norm in readers), "model.norm"]
    outs = [f"{layer}.{out}" for layer in layers for out in ("mlp.down_proj", "self_attn.o_proj")]
    seen = alone(model, store, [*norms, *outs, *layers])
    lengths = {len(row) for row in seen["model.norm"]}
    assert len(lengths) > 3  # otherwise padding and the order of mean and norm would not matter
    for number, layer in enumerate(layers):
        neurons_F = score(seen[f"{layer}.mlp.down_proj"])
        torch.testing.assert_close(
            importance.neurons_LF[number].double(), neurons_F, rtol=1e-4, atol=0
        )
        all_at_once_F = torch.cat(seen[f"{layer}.mlp.down_proj"]).abs().mean(0)
        order, other = neurons_F.argsort(), all_at_once_F.argsort()
        assert not torch.equal(order, other)
        heads_H = score(seen[f"{layer}.self_attn.o_proj"]).view(4, 8).norm(dim=1)
        torch.testing.assert_close(importance.heads_LH[number].double(), heads_H, rtol=1e-4, atol=0)
        after = layers[number + 1] if number < 2 else None
        if after is not None:  # the last layer's output goes through the norm first
            before_NX, after_NX = torch.cat(seen[layer]), torch.cat(seen[after])
            turned = 1 - functional.cosine_similarity(before_NX, after_NX, dim=1).mean()
            assert float(importance.layers_L[number]) == pytest.approx(float(turned), rel=1e-4)
    channels_D = torch.stack([score(seen[norm]) for norm in norms]).sum(0)
    torch.testing.assert_close(importance.channels_D.double(), channels_D, rtol=1e-4, atol=0)


def one_after_another(
    model: Any, sample: CalibrationSet, keep: int
) -> tuple[list[int], list[dict[int, float]]]:
    """Removed layers in order, found by cutting the model, and the losses of each round by removed
    layer."""
    removed: list[int] = []
    rounds = []
    while 5 - len(removed) > keep:
        losses = {}
        for layer in set(range(5)) - set(removed):
            rest = [i for i in range(5) if i not in (*removed, layer)]
            without = connect_head(cut_to_layers(model, rest, "test"), VOCABULARY)
            losses[layer] = sample_loss(without, sample, "test")
        rounds.append(losses)
        removed.append(min(losses, key=losses.__getitem__))
    return removed, rounds


@pytest.mark.parametrize("keep", [4, 3, 1])
def test_by_the_loss_layers_are_removed_one_after_another(keep: int, store: StoreReader) -> None:
    model = pruning_model("llama", seed=3, depth=5)
    built, head, sample = anatomy(model), connect_head(model, VOCABULARY), whole_sample(store)
    whole = sample_loss(head, sample, "test")
    importance = measure(head, built, sample, "test")
    passes: list[str] = []
    judged = judge_layers_by_loss(
        importance, head, built, sample, keep, "judge", lambda report: passes.append(report.part)
    )
    removed, rounds = one_after_another(model, sample, keep)
    assert list(judged.removed) == removed
    scores = {layer: loss - whole for losses in rounds for layer, loss in losses.items()}
    assert judged.layers_L.tolist() == pytest.approx([scores[i] for i in range(5)], abs=1e-4)
    assert len(set(passes)) == sum(len(losses) for losses in rounds)
    kept = choose(built, dataclasses.replace(built.sizes, layers=keep), judged).layers
    assert kept == [layer for layer in range(5) if layer not in removed]
    at_once = sorted(range(5), key=lambda layer: rounds[0][layer])[: 5 - keep]
    assert (set(at_once) == set(removed)) == (keep == 4)  # for other counts the order matters
    assert sample_loss(head, sample, "test") == whole  # all hooks are removed


def test_a_calibration_set_depends_on_the_seed(store: StoreReader) -> None:
    rows = [calibration_set(store, 7, seed, "positions").rows.tolist() for seed in (0, 0, 1)]
    assert rows[0] == rows[1] != rows[2]
    assert all(len(set(each)) == 7 and each == sorted(each) for each in rows)
    assert len(calibration_set(store, 10_000, 0, "positions")) == len(store)
