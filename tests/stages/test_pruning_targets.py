"""What a recipe asks for, as sizes a model can have."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import pytest
from coldstill.data.errors import ColdstillError
from coldstill.stages.config import ArchitectureConfig
from coldstill.stages.planning.pruned_sizes import anatomy_of_table
from coldstill.stages.pruning.config import PruneConfig
from coldstill.stages.pruning.surgery import choose, cut
from coldstill.stages.pruning.targets import all_target_sizes, target_sizes
from small_pruning import anatomy, every_model, pruning_model, random_importance

if TYPE_CHECKING:
    from coldstill.stages.pruning.anatomy import Anatomy, Sizes

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


@pytest.mark.parametrize(
    ("asked", "changed"),
    [
        ({"layers": 5}, {"layers": 5}),
        ({"hidden": 384, "feed_forward": 700}, {"hidden": 384, "feed_forward": 700}),
        ({"heads": 4}, {"heads": 4}),
        ({"kv_heads": 2}, {"heads": 4, "kv_heads": 2}),
        ({"heads": 2, "kv_heads": 2}, {"heads": 2, "kv_heads": 2}),
        ({"layers": 12, "hidden": 512, "feed_forward": 1024, "heads": 8, "kv_heads": 4}, {}),
        ({"parameters": "100%"}, {}),
    ],
    ids=str,
)
def test_sizes_are_taken_as_they_are(asked: dict[str, Any], changed: dict[str, int]) -> None:
    model = built()
    assert sizes(model, **asked) == dataclasses.replace(model.sizes, **changed)


def test_heads_with_keys_of_their_own_take_these_along() -> None:
    model = built(kv_heads=8)
    assert sizes(model, heads=4) == dataclasses.replace(model.sizes, heads=4, kv_heads=4)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_where_the_width_of_a_head_cannot_be_said_heads_and_channels_go_together(
    family: str,
) -> None:
    model = built(family=family, kv_heads=8)
    six = dataclasses.replace(model.sizes, hidden=384, heads=6, kv_heads=6)
    for asked in ({"hidden": 384}, {"heads": 6}, {"hidden": 384, "heads": 6}, {"kv_heads": 6}):
        assert sizes(model, **asked) == six
    assert refused(model, hidden=400) == (
        f"hidden = 400: hidden of a '{family}' model is heads times 64, the width of its heads, "
        "which pruning keeps; 384 and 448 are"
    )
    assert refused(model, hidden=384, heads=4).startswith(
        "hidden = 384 and heads = 4: hidden of a "
    )
    half = sizes(model, parameters="50%")
    assert half.hidden == 64 * half.heads == 64 * half.kv_heads


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"layers": 13}, "layers = 13, the model that is cut has 12 layers; choose at most that"),
        ({"hidden": 520}, "hidden = 520, the model that is cut has 512 channels; choose at most"),
        ({"feed_forward": 2048}, "feed_forward = 2048, the model that is cut has 1024 neurons; c"),
        ({"heads": 16}, "heads = 16, the model that is cut has 8 heads; choose at most that"),
        ({"kv_heads": 8}, "kv_heads = 8, the model that is cut has 4 key-value heads; choose at"),
        ({"heads": 6}, "heads = 6 cannot be shared out among 4 key-value heads; 4 and 8 can, or "),
        ({"heads": 2}, "heads = 2 cannot be shared out among 4 key-value heads; 4 and 8 can, or "),
        ({"heads": 8, "kv_heads": 2}, "heads = 8 are 4 to each of 2 key-value heads, the model "),
        ({"hidden": 500}, "hidden = 500 is not a multiple of heads = 8, which a 'llama' config"),
        ({"parameters": 10**9}, "parameters = 1,000,000,000, the model that is cut has 36,"),
        ({"parameters": 1}, "parameters = 1 leave nothing of this 'llama' model; the least it can"),
        ({"parameters": "1%", "hidden": 512}, "leave nothing of this 'llama' model; the least it"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(asked: dict[str, Any], said: str) -> None:
    assert said in refused(built(), **asked)


@pytest.mark.parametrize("share", [90, 75, 60, 50, 40, 30, 25, 20, 15, 10, 5])
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2", "gpt_neox"])
def test_a_budget_is_kept_and_nearly_used_up(family: str, share: int) -> None:
    model = built(family=family, **({} if family in ("llama", "mistral") else {"kv_heads": 8}))
    whole = model.parameters(model.sizes)
    found = sizes(model, parameters=f"{share}%")
    assert sizes(model, parameters=whole * share // 100) == found
    used = model.parameters(found) / (whole * share / 100)
    # the residual stream of the others goes in steps of whole heads, here of an eighth
    assert (0.95 if family in ("llama", "mistral") else 0.85) < used <= 1
    assert found.feed_forward % 4 == 0
    assert found.feed_forward % 64 == 0 or share < 50
    assert found.hidden % found.heads == 0


def test_width_goes_before_depth_and_heads_stay() -> None:
    model, asked = built(), [f"{share}%" for share in range(95, 3, -1)]
    whole = model.sizes
    found = [sizes(model, parameters=share) for share in asked]
    assert {6, 7, 9, 10, 11, 12} <= {s.layers for s in found} <= set(range(6, 13))
    assert {(s.heads, s.kv_heads) for s in found} == {(8, 4)}
    for s in found:
        narrow = min(s.hidden / whole.hidden, s.feed_forward / whole.feed_forward)
        assert s.layers == 12 or narrow <= 0.35  # a quarter, and a step of the widths
        assert narrow >= 0.25 or s.layers <= 6
        # in proportion, but for what the steps of the widths leave
        assert abs(s.hidden / whole.hidden - s.feed_forward / whole.feed_forward) <= 0.25
    counts = [model.parameters(s) for s in found]
    assert counts == sorted(counts, reverse=True)


def test_sizes_that_are_given_stay_and_a_budget_chooses_the_others() -> None:
    model = built()
    whole = model.parameters(model.sizes)
    for given in ({"layers": 3}, {"hidden": 256}, {"feed_forward": 1024}, {"heads": 4},
                  {"hidden": 256, "layers": 6}):  # fmt: skip
        found = sizes(model, parameters="25%", **given)
        assert {name: getattr(found, name) for name in given} == given
        assert 0.9 * 0.25 * whole < model.parameters(found) <= 0.25 * whole


def test_a_share_is_of_the_teacher_cut_after_cut() -> None:
    model = built()
    whole = model.parameters(model.sizes)
    cuts = [PruneConfig(parameters="50%"), PruneConfig(parameters="25%"), PruneConfig(layers=2)]
    first, second, third = all_target_sizes(model, cuts, whole, WHERE)
    assert first == sizes(model, parameters="50%")
    assert 0.23 * whole < model.parameters(second) <= 0.25 * whole
    assert third == dataclasses.replace(second, layers=2)
    with pytest.raises(ColdstillError) as error:
        all_target_sizes(model, [*cuts, PruneConfig(hidden=512)], whole, WHERE)
    assert str(error.value).startswith(f"{WHERE} (4 of 4): hidden = 512, the model that is cut ha")


@every_model
def test_a_model_is_counted_before_it_is_cut(name: str) -> None:
    model = pruning_model(name)
    made = anatomy(model)
    assert made.parameters(made.sizes) == model.num_parameters()
    for share in ("80%", "45%"):
        target = sizes(made, parameters=share)
        small = cut(model, made, choose(made, target, random_importance(made.sizes)), WHERE)
        assert small.num_parameters() == made.parameters(target)
        assert anatomy(small) == made.resized(target)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({}, "needs sizes such as { hidden = 512, feed_forward = 1536 }, or parameters, such as"),
        ({"layers_by": "loss"}, "needs sizes such as"),
    ],
)
def test_a_cut_of_nothing_is_refused(asked: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        PruneConfig(**asked)
