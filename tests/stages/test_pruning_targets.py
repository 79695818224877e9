"""Target sizes follow the recipe and the limits of the model."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import pytest
import torch
from coldstill.data.errors import ColdstillError
from coldstill.stages.config import ArchitectureConfig
from coldstill.stages.planning.model_sizes import anatomy_of_table
from coldstill.stages.students.pruning.config import PruneConfig
from coldstill.stages.students.pruning.shapes import all_target_sizes, target_sizes
from small_pruning import anatomy
from transformers import AutoConfig, AutoModelForCausalLM

if TYPE_CHECKING:
    from coldstill.stages.students.pruning.anatomy import Anatomy, Sizes

WHERE = "students.small.prune"


def built(**changes: Any) -> Anatomy:
    """Twelve layers of width 512: 36 million parameters, 8 of them embeddings."""
    table: dict[str, Any] = {"layers": 12, "hidden": 512, "heads": 8, "kv_heads": 4}
    table |= {"feed_forward": 1024, "tied": True} | changes
    return anatomy_of_table(ArchitectureConfig(**table), 16_000, 256, WHERE)


def sizes(model: Anatomy, **asked: Any) -> Sizes:
    whole = model.parameters(model.sizes)
    return target_sizes(model, PruneConfig(**asked), whole, WHERE)


def refused(model: Anatomy, **asked: Any) -> str:
    with pytest.raises(ColdstillError) as error:
        sizes(model, **asked)
    assert "\n" not in str(error.value)
    return str(error.value).removeprefix(f"{WHERE}: ")


def test_given_sizes_are_used() -> None:
    model = built()
    cases: list[tuple[dict[str, Any], dict[str, int]]] = [
        ({"layers": 5}, {"layers": 5}),
        ({"hidden": 384, "feed_forward": 700}, {"hidden": 384, "feed_forward": 700}),
        ({"heads": 4}, {"heads": 4}),
        ({"kv_heads": 2}, {"heads": 4, "kv_heads": 2}),
        ({"heads": 2, "kv_heads": 2}, {"heads": 2, "kv_heads": 2}),
        ({"layers": 12, "hidden": 512, "feed_forward": 1024, "heads": 8, "kv_heads": 4}, {}),
        ({"parameters": "100%"}, {}),
    ]
    for given, changed in cases:
        assert sizes(model, **given) == dataclasses.replace(model.sizes, **changed)


def test_key_value_heads_with_one_query_head_are_removed_with_it() -> None:
    model = built(kv_heads=8)
    assert sizes(model, heads=4) == dataclasses.replace(model.sizes, heads=4, kv_heads=4)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_heads_and_channels_are_bound_if_the_configuration_has_no_head_width(family: str) -> None:
    model = built(family=family, kv_heads=8)
    six = dataclasses.replace(model.sizes, hidden=384, heads=6, kv_heads=6)
    for asked in ({"hidden": 384}, {"hidden": 384, "heads": 6}, {"hidden": 384, "kv_heads": 6}):
        assert sizes(model, **asked) == six
    assert sizes(model, heads=8) == model.sizes
    assert refused(model, hidden=400) == (
        f"hidden = 400: hidden of a '{family}' model is heads times 64, the width of its heads, "
        "which pruning keeps; choose hidden = 384 or 448"
    )
    assert refused(model, hidden=384, heads=4).startswith(
        "hidden = 384 and heads = 4: hidden of a "
    )
    # fewer heads would make the whole model narrower
    for name in ("heads", "kv_heads"):
        assert refused(model, **{name: 6}) == (
            f"{name} = 6: hidden of a '{family}' model is heads times 64, the width of its heads, "
            "so it would fall from 512 too; add hidden = 384 to accept that, or keep the heads"
        )
    by_heads = sizes(model, heads=6, parameters="60%")
    assert (by_heads.hidden, by_heads.heads, by_heads.kv_heads) == (384, 6, 6)
    half = sizes(model, parameters="50%")
    assert half.hidden == 64 * half.heads == 64 * half.kv_heads


IMPOSSIBLE: list[tuple[dict[str, Any], str]] = [
    ({"layers": 13}, "layers = 13, the model to cut has 12 layers; choose at most this"),
    ({"hidden": 520}, "hidden = 520, the model to cut has 512 channels; choose at most"),
    ({"feed_forward": 2048}, "feed_forward = 2048, the model to cut has 1024 neurons; c"),
    ({"heads": 16}, "heads = 16, the model to cut has 8 heads; choose at most this"),
    ({"kv_heads": 8}, "kv_heads = 8, the model to cut has 4 key-value heads; choose at"),
    ({"heads": 6}, "heads = 6 cannot be divided among 4 key-value heads; choose 4 or 8, or"),
    ({"heads": 2}, "heads = 2 cannot be divided among 4 key-value heads; choose 4 or 8, or"),
    ({"heads": 8, "kv_heads": 2}, "heads = 8 are 4 to each of 2 key-value heads, the model "),
    (
        {"hidden": 500},
        "hidden = 500 is not a multiple of its 8 heads, as a 'llama' configurat"
        "ion requires; choose 496 or 504",
    ),
    (
        {"hidden": 511, "kv_heads": 3},
        "a multiple of its 6 heads, as a 'llama' configuration requires; choose 510",
    ),  # 516 is more than there is
    (
        {"kv_heads": 3},
        "kv_heads = 3: hidden, which is 512, is not a multiple of 6 heads, as a 'llama' "
        "configuration requires; add hidden = 510, or choose other kv_heads",
    ),
    ({"heads": 6, "kv_heads": 3}, "heads = 6: hidden, which is 512, is not a multiple of 6 he"),
    ({"parameters": 10**9}, "parameters = 1,000,000,000, the model to cut has 36,"),
    ({"parameters": 1}, "parameters = 1 are too few for this 'llama' model; it needs at least"),
    ({"parameters": "1%", "hidden": 512}, "are too few for this 'llama' model; it needs at"),
]


def test_impossible_sizes_are_refused() -> None:
    for given, reason in IMPOSSIBLE:
        assert reason in refused(built(), **given), given


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2", "gpt_neox"])
def test_a_budget_is_kept_and_almost_used(family: str) -> None:
    model = built(family=family, **({} if family in ("llama", "mistral") else {"kv_heads": 8}))
    whole = model.parameters(model.sizes)
    for share in (90, 75, 60, 50, 40, 30, 25, 20, 15, 10, 5):
        found = sizes(model, parameters=f"{share}%")
        assert sizes(model, parameters=whole * share // 100) == found
        used = model.parameters(found) / (whole * share / 100)
        # other families change the residual stream in steps of whole heads, here an eighth
        assert (0.95 if family in ("llama", "mistral") else 0.85) < used <= 1
        assert found.feed_forward % 4 == 0
        assert found.feed_forward % 64 == 0 or share < 50
        assert found.hidden % found.heads == 0


def test_width_shrinks_before_depth_and_heads_stay() -> None:
    model, asked = built(), [f"{share}%" for share in range(95, 3, -1)]
    whole = model.sizes
    found = [sizes(model, parameters=share) for share in asked]
    assert {6, 7, 9, 10, 11, 12} <= {s.layers for s in found} <= set(range(6, 13))
    assert {(s.heads, s.kv_heads) for s in found} == {(8, 4)}
    for s in found:
        narrow = min(s.hidden / whole.hidden, s.feed_forward / whole.feed_forward)
        assert s.layers == 12 or narrow <= 0.35  # a quarter, and a step of the widths
        assert narrow >= 0.25 or s.layers <= 6
        # in proportion, up to the steps of the widths
        assert abs(s.hidden / whole.hidden - s.feed_forward / whole.feed_forward) <= 0.25
    counts = [model.parameters(s) for s in found]
    assert counts == sorted(counts, reverse=True)


def test_a_budget_chooses_the_sizes_that_are_not_given() -> None:
    model = built()
    whole = model.parameters(model.sizes)
    for given in ({"layers": 3}, {"hidden": 256}, {"feed_forward": 1024}, {"heads": 4},
                  {"hidden": 256, "layers": 6}):  # fmt: skip
        found = sizes(model, parameters="25%", **given)
        assert {name: getattr(found, name) for name in given} == given
        assert 0.9 * 0.25 * whole < model.parameters(found) <= 0.25 * whole


def test_a_chosen_hidden_is_a_multiple_of_the_given_heads() -> None:
    found = sizes(built(), kv_heads=3, parameters="50%")
    assert (found.heads, found.kv_heads, found.hidden % 6) == (6, 3, 0)


CHECKPOINTS: dict[str, tuple[str, dict[str, Any], dict[int, tuple[int, int, int]]]] = {
    "SmolLM-135M": (
        "llama",
        {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
         "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
         "tie_word_embeddings": True},
        {75: (30, 504, 1152), 50: (30, 360, 960), 25: (30, 216, 640), 10: (16, 144, 384)},
    ),
    "Qwen2.5-0.5B": (
        "qwen2",
        {"vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864,
         "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
         "tie_word_embeddings": True},
        {75: (24, 736, 4160), 50: (24, 576, 3136), 25: (24, 352, 2048), 10: (12, 224, 1216)},
    ),
    "Pythia-70m": (
        "gpt_neox",
        {"vocab_size": 50304, "hidden_size": 512, "intermediate_size": 2048,
         "num_hidden_layers": 6, "num_attention_heads": 8, "tie_word_embeddings": False},
        {75: (6, 384, 1792), 50: (6, 256, 2048), 25: (6, 128, 2048), 10: (3, 64, 544)},
    ),
    "GPT-2": (
        "gpt2",
        {"vocab_size": 50257, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024},
        {75: (12, 640, 2624), 50: (12, 512, 1856), 25: (12, 320, 1216), 10: (6, 192, 736)},
    ),
    "Llama-3.2-1B": (
        "llama",
        {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192,
         "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
         "tie_word_embeddings": True},
        {75: (16, 1728, 6784), 50: (16, 1344, 5184), 25: (16, 832, 3328), 10: (10, 512, 2048)},
    ),
    "Gemma-2-2b": (
        "gemma2",
        {"vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216,
         "num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4,
         "head_dim": 256},
        {75: (26, 1920, 7744), 50: (26, 1472, 6016), 25: (26, 896, 3968), 10: (15, 576, 2304)},
    ),
}  # fmt: skip
"""Real models, and layers, hidden and feed_forward at each share of their parameters."""
COARSE = {("Pythia-70m", 50), ("Pythia-70m", 25), ("Pythia-70m", 10)}
"""Three quarters of this model are embeddings, and their width has steps of an eighth."""


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_budgets_of_real_models_give_the_expected_sizes(name: str) -> None:
    family, settings, expected = CHECKPOINTS[name]
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings))
    model = anatomy(made)
    whole = model.sizes
    for share, least in expected.items():
        found = sizes(model, parameters=f"{share}%")
        assert (found.layers, found.hidden, found.feed_forward) == least
        used = model.parameters(found) / (model.parameters(whole) * share / 100)
        assert (0.93 if (name, share) in COARSE else 0.95) < used <= 1
        widths = found.hidden / whole.hidden, found.feed_forward / whole.feed_forward
        assert abs(widths[0] - widths[1]) <= 1 / 8 or (name, share) in COARSE
        assert max(widths) < 1 or (name, share) in COARSE


def test_shares_of_later_cuts_are_shares_of_the_teacher() -> None:
    model = built()
    whole = model.parameters(model.sizes)
    cuts = [PruneConfig(parameters="50%"), PruneConfig(parameters="25%"), PruneConfig(layers=2)]
    first, second, third = all_target_sizes(model, cuts, whole, WHERE)
    assert first == sizes(model, parameters="50%")
    assert 0.23 * whole < model.parameters(second) <= 0.25 * whole
    assert third == dataclasses.replace(second, layers=2)
    with pytest.raises(ColdstillError) as error:
        all_target_sizes(model, [*cuts, PruneConfig(hidden=512)], whole, WHERE)
    assert str(error.value).startswith(f"{WHERE} (4 of 4): hidden = 512, the model to cut ha")


def test_a_cut_without_sizes_is_refused() -> None:
    for given in ({}, {"layers_by": "loss"}):
        with pytest.raises(ValueError, match=r"needs sizes such as \{ hidden = 512, feed_forward"):
            PruneConfig(**given)  # type: ignore[arg-type]
