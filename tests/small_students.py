"""Students of a small store: jobs, interrupted trainings and refusals."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from coldstill.data.errors import ColdstillError
from coldstill.stages.config import TrainConfig
from coldstill.stages.objective_config import ObjectiveConfig
from coldstill.stages.students.job import StudentJob
from coldstill.stages.students.pruning.layers import TeacherWeights
from safetensors.torch import load_file
from small_runs import LENGTH
from small_trainings import lines

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from coldstill.stages.report import Report, Reporter

STEP = 4 * LENGTH
"""Tokens of a step."""


class KilledError(Exception):
    """Stands for anything that ends a process."""


def student_job(folder: Path, teacher: Path | None = None, **changes: Any) -> StudentJob:
    """Six steps of a student; `train` among the changes is of these."""
    train = {"steps": 6, "batch_tokens": STEP, "learning_rate": 3e-3, "log_every": 1}
    settings: dict[str, Any] = {
        "name": "small",
        "architecture": None,
        "model": None,
        "teacher": None if teacher is None else TeacherWeights(name=str(teacher)),
        "objective": ObjectiveConfig(cross_entropy=0.5),
        "config": TrainConfig(**(train | changes.pop("train", {}))),
        "seed": 5,
        "folder": folder,
    }
    return StudentJob(**(settings | changes))


def saved(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a trained student."""
    weights: dict[str, torch.Tensor] = load_file(folder / "model" / "model.safetensors")
    return weights


def refusal(call: Callable[[], Any], folder: Path) -> str:
    """The one line of a refusal, which must write nothing into the folder."""
    before = sorted(folder.rglob("*"))
    with pytest.raises(ColdstillError) as error:
        call()
    assert "\n" not in str(error.value)
    assert sorted(folder.rglob("*")) == before
    return str(error.value)


def killed_at(step: int, stage: str = "train-student small") -> Reporter:
    """A reporter that ends the training of a stage after a step."""

    def report(report: Report) -> None:
        if report.stage == stage and report.total and report.done >= step * STEP:
            raise KilledError

    return report


def expect_same_training(ours: Path, theirs: Path) -> None:
    """Metrics, weights and configuration of both students must be equal."""
    assert lines(ours) == lines(theirs)
    weights, others = saved(ours), saved(theirs)
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, others[name]), name
    config, other = ((folder / "model" / "config.json").read_bytes() for folder in (ours, theirs))
    assert config == other
