"""Weights that change over training: what they are in each step, and what becomes of the loss."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from coldstill.stages.config import ObjectiveConfig, WeightConfig
from coldstill.stages.training.metrics import read_metrics
from coldstill.stages.training.objective import CurrentStep, terms_at, terms_of, weight_at
from pydantic import TypeAdapter, ValidationError
from small_trainings import train_small

if TYPE_CHECKING:
    from pathlib import Path

    from coldstill.data.store.reader import StoreReader

OBJECTIVE: TypeAdapter[ObjectiveConfig] = TypeAdapter(ObjectiveConfig)


def over(weight: WeightConfig, steps: int) -> list[float]:
    return [weight_at(weight, step, steps) for step in range(steps)]


def test_each_schedule_has_its_weights() -> None:
    assert over(WeightConfig(weight=0.7), 3) == [0.7, 0.7, 0.7]
    falling = WeightConfig(weight=0.2, schedule="linear", start=1.0)
    assert over(falling, 5) == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])
    assert over(falling, 1) == [0.2]  # the first step is also the last
    wsd = WeightConfig(weight=0.9, schedule="wsd", warmup=0.3, decay=0.2, end=0.1)
    assert over(wsd, 10) == pytest.approx([0, 0.3, 0.6, 0.9, 0.9, 0.9, 0.9, 0.9, 0.5, 0.1])
    rounded = WeightConfig(weight=1.0, schedule="wsd", warmup=0.07, decay=0.0)
    assert 0.07 * 100 > 7  # in binary; a rounding error is not a step
    assert over(rounded, 100).index(1.0) == 7


@pytest.mark.parametrize(("warmup", "decay"), [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (0.5, 0.5)])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 100])
def test_a_weight_stays_between_its_ends(warmup: float, decay: float, steps: int) -> None:
    weight = WeightConfig(
        weight=0.9, schedule="wsd", start=0.2, end=0.1, warmup=warmup, decay=decay
    )
    weights = over(weight, steps)
    assert min(weights) >= 0.1
    assert max(weights) <= 0.9 + 1e-12
    if decay and steps > 1:
        assert weights[-1] == pytest.approx(0.1)
    if warmup:
        assert weights[0] == pytest.approx(0.2)


def test_a_constant_weight_is_stored_as_a_number() -> None:
    plain = OBJECTIVE.validate_python({"kl": {"weight": 0.5, "schedule": "constant"}})
    assert plain.kl == 0.5
    changing = OBJECTIVE.validate_python({"kl": {"weight": 0.5, "schedule": "linear", "start": 1}})
    assert changing.kl == WeightConfig(weight=0.5, schedule="linear", start=1.0)
    again = OBJECTIVE.validate_json(OBJECTIVE.dump_json(changing))
    assert again == changing


@pytest.mark.parametrize(
    ("weight", "said"),
    [
        ({"weight": 1.0, "start": 0.5}, "start belongs to schedule 'linear' or 'wsd'"),
        ({"weight": 1.0, "schedule": "linear", "end": 0.5}, "end belongs to schedule 'wsd'"),
        (
            {"weight": 1.0, "schedule": "wsd", "warmup": 0.7, "decay": 0.6},
            "are shares of the same steps",
        ),
        ({"weight": -1.0}, "greater than or equal to 0"),
        ({"schedule": "wsd"}, "missing|Field required|required"),
        ({"weight": 1.0, "schedule": "cosine"}, "'constant', 'linear' or 'wsd'"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(weight: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        OBJECTIVE.validate_python({"kl": weight})


def test_a_loss_is_used_if_its_weight_is_ever_positive(store: StoreReader) -> None:
    weights = {
        "kl": {"weight": 0.0, "schedule": "linear", "start": 1.0},
        "cross_entropy": {"weight": 1.0, "schedule": "linear", "start": 0.0},
        "jsd": {"weight": 0.0, "schedule": "wsd"},
    }
    objective = OBJECTIVE.validate_python(weights)
    terms = terms_of(objective, store.manifest.capture, "here")
    assert [term.loss.name for term in terms] == ["kl", "cross_entropy"]
    current = CurrentStep(3)
    seen = []
    for current.step in range(3):
        seen.append([term.weight for term in terms_at(terms, current)])
    assert seen == [[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]]


def test_training_follows_the_schedule_and_tells_of_it(store: StoreReader, tmp_path: Path) -> None:
    objective = ObjectiveConfig(
        kl=WeightConfig(weight=0.25, schedule="linear", start=1.0), cross_entropy=0.5
    )
    train_small(store, tmp_path / "whole", steps=4, objective=objective)
    lines = read_metrics(tmp_path / "whole")
    assert [line["weight_kl"] for line in lines] == pytest.approx([1.0, 0.75, 0.5, 0.25])
    for line in lines:
        expected = line["weight_kl"] * line["kl"] + 0.5 * line["cross_entropy"]
        assert line["loss"] == pytest.approx(expected, rel=1e-6)


def test_a_schedule_resumes_with_the_training(store: StoreReader, tmp_path: Path) -> None:
    """From a checkpoint the weights are those of an uninterrupted training, bit for bit."""
    settings: dict[str, Any] = {
        "steps": 4,
        "checkpoint_every": 2,
        "objective": ObjectiveConfig(kl=WeightConfig(weight=0.25, schedule="linear", start=1.0)),
    }
    whole = train_small(store, tmp_path / "run", **settings)
    checkpoints = tmp_path / "run" / "checkpoints"
    for path in sorted(checkpoints.glob("checkpoint-4/*")):
        path.unlink()
    (checkpoints / "checkpoint-4").rmdir()
    again = train_small(store, tmp_path / "run", **settings)
    assert all(torch.equal(again[name], weight) for name, weight in whole.items())
