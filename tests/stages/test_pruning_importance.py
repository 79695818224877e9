"""Scores are those of the published formulas, and they find what a trained model can spare."""

from __future__ import annotations

import dataclasses
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from coldstill.data.packing import TokenizedDocument, build_sequences
from coldstill.stages.isolation import model_inputs
from coldstill.stages.output_head import connect_head
from coldstill.stages.pruning.importance import loss_without_layers, measure, sample_loss
from coldstill.stages.pruning.sample import sample_of
from coldstill.stages.pruning.surgery import choose, cut
from coldstill.stages.student.layers import cut_to_layers
from conftest import VOCABULARY
from small_pruning import anatomy, pruning_model, random_importance, whole_sample
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

if TYPE_CHECKING:
    from collections.abc import Iterator

    from coldstill.data.reader import StoreReader
    from coldstill.data.schema import Sequences
    from coldstill.stages.pruning.anatomy import Anatomy, Sizes
    from coldstill.stages.pruning.importance import Importance
    from numpy.typing import NDArray


def alone(model: Any, store: StoreReader, names: list[str]) -> dict[str, list[torch.Tensor]]:
    """[T, X] what goes into the named modules (out of them, of norms and layers), one sequence at a
    time, so that nothing is padded."""
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
    """First the mean over a sequence, then the norm over sequences."""
    means_NX = torch.stack([row_TX.abs().mean(0) for row_TX in rows])
    return means_NX.square().sum(0).sqrt()


def test_scores_are_those_of_the_formulas(store: StoreReader) -> None:
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
    assert len(lengths) > 3  # so that padding would be seen, and the order of means and norms
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
        if after is not None:  # what the last one puts out goes through the norm first
            before_NX, after_NX = torch.cat(seen[layer]), torch.cat(seen[after])
            turned = 1 - functional.cosine_similarity(before_NX, after_NX, dim=1).mean()
            assert float(importance.layers_L[number]) == pytest.approx(float(turned), rel=1e-4)
    channels_D = torch.stack([score(seen[norm]) for norm in norms]).sum(0)
    torch.testing.assert_close(importance.channels_D.double(), channels_D, rtol=1e-4, atol=0)


def test_the_loss_without_a_layer_is_that_of_the_model_that_lacks_it(store: StoreReader) -> None:
    model = pruning_model("qwen3")
    head, sample = connect_head(model, VOCABULARY), whole_sample(store)
    losses = loss_without_layers(head, anatomy(model), sample, "test")
    whole = sample_loss(head, sample, "test")
    for layer in range(3):
        without = cut_to_layers(model, [i for i in range(3) if i != layer], "test")
        expected = sample_loss(connect_head(without, VOCABULARY), sample, "test")
        assert float(losses[layer]) == pytest.approx(expected, rel=1e-5)
        assert abs(expected - whole) > 1e-3
    assert sample_loss(head, sample, "test") == whole  # nothing stays behind


def test_a_sample_is_a_function_of_the_seed(store: StoreReader) -> None:
    rows = [sample_of(store, 7, seed, "positions").rows.tolist() for seed in (0, 0, 1)]
    assert rows[0] == rows[1] != rows[2]
    assert all(len(set(each)) == 7 and each == sorted(each) for each in rows)
    assert len(sample_of(store, 10_000, 0, "positions")) == len(store)


KINDS, LENGTH, TOKENS = 2, 24, 64


def two_kinds_of_text(count: int, seed: int, kinds: tuple[int, ...]) -> NDArray[np.int64]:
    """[count, LENGTH] tokens that follow from the last two, four times in five; each kind of text
    has a half of the vocabulary."""
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
    """Stands for a sample."""

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


@pytest.fixture(scope="module", params=[0, 1])
def trained(request: pytest.FixtureRequest) -> Any:
    """A model that has learned two kinds of text."""
    torch.manual_seed(request.param)
    config = AutoConfig.for_model(
        "llama", vocab_size=TOKENS, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64,
        bos_token_id=None, eos_token_id=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.1)
    data = torch.from_numpy(two_kinds_of_text(2048, 1, (0, 1)))
    steps = 160
    for step in range(steps):
        batch = data[torch.randint(0, len(data), (32,))]
        logits = model(batch, use_cache=False).logits[:, :-1].flatten(0, 1)
        loss = functional.cross_entropy(logits, batch[:, 1:].flatten())
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        for group in optimizer.param_groups:
            group["lr"] = 5e-3 * min(1, (step + 1) / 20) * (1 - step / steps)
        optimizer.step()
    return model.eval()


def magnitudes(model: Any, built: Anatomy) -> Importance:
    """What is cut where nobody looks at activations: the sum of the squares of all weights that
    belong to a part."""
    sizes, width = built.sizes, built.head_width
    importance = random_importance(sizes)
    scores = {key: torch.zeros_like(getattr(importance, key)) for key in
              ("channels_D", "neurons_LF", "heads_LH")}  # fmt: skip
    for name, weight in model.named_parameters():
        axes = built.axes(name) or ()
        layer = int(name.split(".")[2]) if name.startswith("model.layers") else 0
        for axis, kind in enumerate(axes):
            if weight.dim() == 1 or kind == "free":
                continue
            squares = weight.detach().square().sum(1 - axis)
            if kind == "hidden":
                scores["channels_D"] += squares
            elif kind == "feed_forward":
                scores["neurons_LF"][layer] += squares
            else:
                scores["heads_LH"][layer] += squares.view(sizes.heads, width).sum(1)
    changes: dict[str, Any] = {**scores}
    return dataclasses.replace(importance, **changes)


@pytest.mark.parametrize(
    "sizes",
    [{"feed_forward": 64}, {"hidden": 48}, {"hidden": 48, "feed_forward": 64}],
    ids=["neurons", "channels", "both"],
)
def test_importance_beats_random_and_magnitude_on_held_out_loss(
    sizes: dict[str, int], trained: Any
) -> None:
    """For the one kind of text that is asked for: no weight tells which parts that needs."""
    built = anatomy(trained)
    target = dataclasses.replace(built.sizes, **sizes)
    head = connect_head(trained, TOKENS)
    importance = measure(head, built, texts_of_one_kind(2), "test")
    heldout = texts_of_one_kind(3)
    whole = sample_loss(head, heldout, "test")
    assert whole < 0.6 * np.log(TOKENS)  # it has learned something

    def rise(scores: Importance, target: Sizes = target) -> float:
        small = cut(trained, built, choose(built, target, scores), "test")
        return sample_loss(connect_head(small, TOKENS), heldout, "test") - whole

    ours = rise(importance)
    by_chance = statistics.median(rise(random_importance(built.sizes, seed)) for seed in range(5))
    assert 0 < ours < 0.85 * by_chance
    assert ours < 0.95 * rise(magnitudes(trained, built))
