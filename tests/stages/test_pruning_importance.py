"""Importance follows the published formulas and beats chance and magnitude on a trained model."""

from __future__ import annotations

import dataclasses
import statistics
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from coldstill.data.prepared import TokenizedDocument, build_sequences
from coldstill.stages.models.inputs import model_inputs
from coldstill.stages.models.output_head import connect_head
from coldstill.stages.students.pruning.cutting import cut, kept_parts
from coldstill.stages.students.pruning.importance import (
    calibration_set,
    judge_layers_by_loss,
    measure_importance,
    sample_loss,
)
from coldstill.stages.students.pruning.layers import cut_to_layers
from conftest import VOCABULARY
from small_pruning import (
    anatomy,
    magnitude_importance,
    pruning_model,
    random_importance,
    whole_sample,
)
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

if TYPE_CHECKING:
    from collections.abc import Iterator

    from coldstill.data.schema import Sequences
    from coldstill.data.store.reader import StoreReader
    from coldstill.stages.models.output_head import OutputHead
    from coldstill.stages.students.pruning.anatomy import Anatomy, Sizes
    from coldstill.stages.students.pruning.importance import CalibrationSet, Importance
    from numpy.typing import NDArray


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
    importance = measure_importance(
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


@pytest.mark.slow
@pytest.mark.parametrize("keep", [4, 3, 1])
def test_by_the_loss_layers_are_removed_one_after_another(keep: int, store: StoreReader) -> None:
    model = pruning_model("llama", seed=3, depth=5)
    built, head, sample = anatomy(model), connect_head(model, VOCABULARY), whole_sample(store)
    whole = sample_loss(head, sample, "test")
    importance = measure_importance(head, built, sample, "test")
    passes: list[str] = []
    judged = judge_layers_by_loss(
        importance, head, built, sample, keep, "judge", lambda report: passes.append(report.part)
    )
    removed, rounds = one_after_another(model, sample, keep)
    assert list(judged.removed) == removed
    scores = {layer: loss - whole for losses in rounds for layer, loss in losses.items()}
    assert judged.layers_L.tolist() == pytest.approx([scores[i] for i in range(5)], abs=1e-4)
    assert len(set(passes)) == sum(len(losses) for losses in rounds)
    kept = kept_parts(built, dataclasses.replace(built.sizes, layers=keep), judged).layers
    assert kept == [layer for layer in range(5) if layer not in removed]
    at_once = sorted(range(5), key=lambda layer: rounds[0][layer])[: 5 - keep]
    assert (set(at_once) == set(removed)) == (keep == 4)  # for other counts the order matters
    assert sample_loss(head, sample, "test") == whole  # all hooks are removed


def test_a_calibration_set_depends_on_the_seed(store: StoreReader) -> None:
    rows = [calibration_set(store, 7, seed, "positions").rows.tolist() for seed in (0, 0, 1)]
    assert rows[0] == rows[1] != rows[2]
    assert all(len(set(each)) == 7 and each == sorted(each) for each in rows)
    assert len(calibration_set(store, 10_000, 0, "positions")) == len(store)


KINDS, LENGTH, TOKENS = 2, 24, 64


def two_kinds_of_text(count: int, seed: int, kinds: tuple[int, ...]) -> NDArray[np.int64]:
    """[count, LENGTH] tokens; four of five follow from the last two. Each kind of text has its half
    of the vocabulary."""
    half = TOKENS // KINDS
    table = np.random.default_rng(7).integers(0, half, (half, half))
    random = np.random.default_rng(seed)
    tokens = np.zeros((count, LENGTH), np.int64)
    tokens[:, :2] = random.integers(0, half, (count, 2))
    for t in range(2, LENGTH):
        follows = table[tokens[:, t - 1], tokens[:, t - 2] % 4]
        tokens[:, t] = np.where(
            random.random(count) < 0.8, follows, random.integers(0, half, count)
        )
    tokens += half * random.choice(kinds, (count, 1))
    return tokens


@dataclass(frozen=True, slots=True)
class Texts:
    """Replaces a calibration set."""

    sequences: Sequences
    isolation = "positions"

    def __len__(self) -> int:
        return len(self.sequences)

    def batches(self) -> Iterator[Sequences]:
        yield self.sequences


def texts_of_one_kind(seed: int) -> Any:
    learned = np.ones(LENGTH, np.bool_)
    rows = two_kinds_of_text(64, seed, (0,)).astype(np.int32)
    return Texts(
        build_sequences(0, [[TokenizedDocument(i, row, learned)] for i, row in enumerate(rows)])
    )


@dataclass(frozen=True, slots=True, eq=False)
class Trained:
    """A model trained on two kinds of text, with its scores and losses."""

    model: Any
    built: Anatomy
    head: OutputHead
    importance: Importance
    heldout: Any
    whole: float

    def rise(self, scores: Importance, target: Sizes) -> float:
        """Increase of the held-out loss when the model is cut by these scores."""
        small = cut(self.model, self.built, kept_parts(self.built, target, scores), "test")
        return sample_loss(connect_head(small, TOKENS), self.heldout, "test") - self.whole


def trained(seed: int) -> Trained:
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        "llama", vocab_size=TOKENS, hidden_size=64, intermediate_size=128, num_hidden_layers=5,
        num_attention_heads=8, num_key_value_heads=2, max_position_embeddings=64,
        bos_token_id=None, eos_token_id=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.1)
    data = torch.from_numpy(two_kinds_of_text(2048, 1, (0, 1)))
    steps = 120
    for step in range(steps):
        batch = data[torch.randint(0, len(data), (32,))]
        logits = model(batch, use_cache=False).logits[:, :-1].flatten(0, 1)
        loss = functional.cross_entropy(logits, batch[:, 1:].flatten())
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        for group in optimizer.param_groups:
            group["lr"] = 5e-3 * min(1, (step + 1) / 20) * (1 - step / steps)
        optimizer.step()
    built, head = anatomy(model.eval()), connect_head(model, TOKENS)
    importance, heldout = (
        measure_importance(head, built, texts_of_one_kind(2), "test"),
        texts_of_one_kind(3),
    )
    whole = sample_loss(head, heldout, "test")
    assert whole < 0.6 * np.log(TOKENS)  # the model has learned
    return Trained(model, built, head, importance, heldout, whole)


@pytest.fixture(scope="module")
def pair() -> list[Trained]:
    """Two models, because a single result may be chance."""
    return [trained(seed) for seed in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "of_chance", "of_magnitude"),
    [
        ({"feed_forward": 64}, 0.4, 0.6),
        ({"hidden": 48}, 0.7, 0.9),
        ({"hidden": 48, "feed_forward": 64}, 0.85, 0.95),
        ({"heads": 4}, 0.85, 0.9),
        ({"heads": 4, "kv_heads": 1}, 0.95, 0.95),
    ],
    ids=["neurons", "channels", "both", "heads", "groups"],
)
def test_importance_beats_chance_and_magnitude_on_held_out_loss(
    sizes: dict[str, int], of_chance: float, of_magnitude: float, pair: list[Trained]
) -> None:
    """Measured on one kind of text only: no weight shows which parts that kind needs."""
    ours, by_chance, by_magnitude = 0.0, 0.0, 0.0
    for one in pair:
        target = dataclasses.replace(one.built.sizes, **sizes)
        whole = one.built.sizes
        ours += one.rise(one.importance, target)
        by_chance += statistics.median(
            one.rise(random_importance(whole, seed), target) for seed in range(7)
        )
        by_magnitude += one.rise(magnitude_importance(one.model, one.built), target)
    assert 0 < ours < of_chance * by_chance
    assert ours < of_magnitude * by_magnitude


@pytest.mark.slow
def test_layers_by_influence_beat_chance_and_layers_by_loss_beat_magnitude(
    pair: list[Trained],
) -> None:
    by_influence, by_loss, by_chance, by_magnitude = 0.0, 0.0, 0.0, 0.0
    for one in pair:
        target = dataclasses.replace(one.built.sizes, layers=3)

        def only(layers: tuple[int, ...], one: Trained = one) -> Importance:
            scores = torch.zeros(5)
            scores[list(layers)] = 1
            return dataclasses.replace(one.importance, layers_L=scores)

        judged = judge_layers_by_loss(
            one.importance, one.head, one.built, texts_of_one_kind(2), 3, "test"
        )
        by_influence += one.rise(one.importance, target)
        by_loss += one.rise(judged, target)
        by_magnitude += one.rise(magnitude_importance(one.model, one.built), target)
        every = [one.rise(only(layers), target) for layers in combinations(range(5), 3)]
        by_chance += statistics.median(every)
    assert 0 < by_loss < 0.9 * by_magnitude
    assert by_loss < 0.8 * by_chance
    assert by_influence < 0.95 * by_chance
