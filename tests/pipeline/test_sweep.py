"""A grid of students on one store: trained, measured, told side by side, and made again."""

from __future__ import annotations

import json
import re
import shutil
import signal
from typing import TYPE_CHECKING, Any

import pytest
from compared import models_of
from safetensors.torch import load_file

if TYPE_CHECKING:
    from pathlib import Path

    from desk import Desk, Processes

pytest_plugins = ("desk",)

TRAIN = "students.small.train"
SWEEP = ("sweep", "r.toml")
RATES = ("--grid", f"{TRAIN}.learning_rate=1e-3,3e-3")
STEPS = ("--grid", f"{TRAIN}.steps=2,3")


def names(desk: Desk) -> set[str]:
    return {path.name for path in (desk.run / "students").iterdir()}


def weights(desk: Desk, name: str) -> bytes:
    path = desk.run / "students" / name / "model" / "model.safetensors"
    return b"".join(tensor.numpy().tobytes() for _, tensor in sorted(load_file(path).items()))


def trained(said: str) -> list[str]:
    """Who was trained, in order."""
    lines = [line for line in said.splitlines() if line.endswith("parameters trained")]
    return [line.removeprefix("train-student ").partition(":")[0] for line in lines]


def test_a_grid_is_trained_measured_and_listed_by_loss(finished: Desk) -> None:
    before = weights(finished, "small")
    result = finished.done(*SWEEP, *RATES, *STEPS)
    # a point that is the recipe's own student in everything is that student
    missing = [
        "small-learning_rate-0.001-steps-2",
        "small-learning_rate-0.003-steps-2",
        "small-learning_rate-0.003-steps-3",
    ]
    assert "sweep: 4 points, 1 of them trained already\n" in result.stderr
    assert trained(result.stderr) == missing
    assert names(finished) == {"small", "baseline", *missing}
    assert weights(finished, "small") == before
    teacher, *students = models_of(result.stdout)
    assert teacher == "teacher"
    assert {*students} == {"small", *missing}, "no other student"
    head, _, _, *rows = result.stdout.split("\n\n")[0].splitlines()
    end = head.index("  loss") + len("  loss")
    losses = [float(line[:end].split()[-1]) for line in rows]
    assert losses == sorted(losses)
    # and compare knows all of the run
    assert len(json.loads(finished.done("compare", "r.toml", "--json").stdout)) == 2 + 4


def test_a_point_equals_the_student_trained_by_hand(finished: Desk) -> None:
    finished.done(*SWEEP, "--grid", f"{TRAIN}.learning_rate=3e-3", "--grid", f"{TRAIN}.steps=2")
    setting = [f"{TRAIN}.learning_rate=0.003", f"{TRAIN}.steps=2"]
    options = [part for one in setting for part in ("--set", one)]
    finished.done("train-student", "r.toml", "--student", "by-hand", *options)
    point = "small-learning_rate-0.003-steps-2"
    assert weights(finished, point) == weights(finished, "by-hand")
    assert weights(finished, point) != weights(finished, "small")


def test_a_repeated_grid_changes_nothing_and_a_larger_one_trains_new_points(
    finished: Desk,
) -> None:
    finished.done(*SWEEP, *RATES)
    before = finished.snapshot()
    again = finished.done(*SWEEP, *RATES)
    assert "train-student small-learning_rate-0.003: already trained: runs/r/" in again.stderr
    assert trained(again.stderr) == []
    comparison = {f"runs/r/comparison.{kind}" for kind in ("json", "md", "html")}
    after = finished.snapshot()
    assert {name: after[name] for name in after if name not in comparison} == {
        name: before[name] for name in before if name not in comparison
    }
    more = finished.done(*SWEEP, "--grid", f"{TRAIN}.learning_rate=0.003,1e-3,1e-2")
    assert trained(more.stderr) == ["small-learning_rate-0.01"]


def test_a_killed_sweep_resumes_at_its_last_point(finished: Desk, processes: Processes) -> None:
    grid = ("--grid", f"{TRAIN}.steps=2,12,4")
    students = finished.run / "students"
    sign = students / "small-steps-12" / "checkpoints" / "checkpoint-2" / "whole.json"
    code, said = processes.stopped(finished, signal.SIGKILL, sign, *SWEEP, *grid)
    assert code == -signal.SIGKILL
    assert trained("\n".join(said)) == ["small-steps-2"]
    assert not (students / "small-steps-4").exists()
    # the run's own record knows the points that were begun
    assert {"small-steps-2", "small-steps-12"} <= resolved(finished).keys()
    shorter = finished.done(*SWEEP, "--grid", f"{TRAIN}.steps=2,4")
    assert trained(shorter.stderr) == ["small-steps-4"]
    assert "small-steps-12" in resolved(finished)
    ended = finished.done(*SWEEP, *grid)
    assert trained(ended.stderr) == ["small-steps-12"]
    assert "train-student small-steps-12: going on from step " in ended.stderr


def resolved(desk: Desk) -> dict[str, Any]:
    students: dict[str, Any] = desk.json("recipe.resolved.json")["recipe"]["students"]
    return students


def test_two_students_are_swept_independently(finished: Desk) -> None:
    objective = "students.baseline.objective.cross_entropy=1,0.5"
    schedule = f"{TRAIN}.schedule=cosine,linear"
    told = json.loads(
        finished.done(*SWEEP, "--grid", schedule, "--grid", objective, "--json").stdout
    )
    assert told[0]["name"] == "teacher"
    assert told[0]["settings"] == {}
    assert {row["name"]: row["settings"] for row in told[1:]} == {
        "small": {f"{TRAIN}.schedule": "cosine"},
        "small-train.schedule-linear": {f"{TRAIN}.schedule": "linear"},
        "baseline": {"students.baseline.objective.cross_entropy": 1},
        "baseline-cross_entropy-0.5": {"students.baseline.objective.cross_entropy": 0.5},
    }
    assert all(row["loss"] > 0 for row in told)
    # what it takes over from another student it still does
    assert resolved(finished)["baseline-cross_entropy-0.5"]["train"]["steps"] == 3


def test_the_student_itself_is_a_point_only_if_the_grid_has_it(finished: Desk) -> None:
    shutil.rmtree(finished.run / "students" / "small")
    finished.done(*SWEEP, "--grid", f"{TRAIN}.steps=1")
    assert names(finished) == {"baseline", "small-steps-1"}
    result = finished.done(*SWEEP, "--grid", f"{TRAIN}.seed=0,1")
    assert trained(result.stderr) == ["small", "small-seed-1"]


def test_a_dry_run_lists_names_and_settings_and_changes_nothing(finished: Desk) -> None:
    before = finished.snapshot()
    result = finished.done(*SWEEP, *RATES, *STEPS, "--dry-run")
    assert result.stderr == "sweep: 4 points, 1 of them trained already\n"
    assert [line.split("  ") for line in result.stdout.splitlines()][2:] == [
        ["small-learning_rate-0.003-steps-2", "train.learning_rate = 0.003", "train.steps = 2"],
        ["small-learning_rate-0.003-steps-3", "train.learning_rate = 0.003", "train.steps = 3"],
    ]
    assert result.stdout.splitlines()[1].endswith("train.steps = 3  (trained)")
    facts = json.loads(finished.done(*SWEEP, *RATES, "--dry-run", "--json").stdout)
    assert facts[1] == {
        "name": "small-learning_rate-0.003",
        "settings": {f"{TRAIN}.learning_rate": 0.003},
        "trained": False,
    }
    assert finished.snapshot() == before


def test_a_dry_run_needs_no_store_and_a_sweep_does(desk: Desk) -> None:
    assert "small-learning_rate-0.003" in desk.done(*SWEEP, *RATES, "--dry-run").stdout
    assert "no store there; make it first with coldstill teacher-logits r" in desk.refused(
        *SWEEP, *RATES
    )


@pytest.mark.parametrize(
    ("grid", "said"),
    [
        (f"{TRAIN}.stepps=1,2", "r.toml: students.small-stepps-1.train: unknown key 'stepps'; did"),
        (f"{TRAIN}.steps=3,0", "r.toml: students.small-steps-0.train.steps: input should be great"),
        (f"{TRAIN}.steps=3,2020-01-01", "-[0-9a-f]{8}.train.steps: input should be a va"),
        ("students.small.layers=[0],[1]", "small-layers-0: needs one of 'architecture', 'model', "),
        ("students.small.objective.kl=1,0", "students.small-kl-0.objective: all weights are 0, so"),
        ("students.small.objective.temperature=1,2", "temperature 2.0 was not captured"),
        ("students.small.architecture.heads=2,3", "hidden = 32 is not a multiple of heads = 3"),
        (f"{TRAIN}.micro_batch_tokens=256,96", "cannot be shared out as 3 per forward pass"),
        ("students.small.train.schedule.x=1,2", "--grid students.small: 'schedule' is a value, n"),
        ("seed=0,1", "another seed of the recipe would need another store"),
    ],
)
def test_one_wrong_point_stops_all_before_any_is_trained(
    finished: Desk, grid: str, said: str
) -> None:
    if "schedule.x" in grid:
        finished.edit("log_every = 1", 'log_every = 1, schedule = "cosine"')
    assert re.search(said, finished.refused(*SWEEP, "--grid", grid))


def test_a_point_with_the_name_of_another_student_is_refused(finished: Desk) -> None:
    finished.edit("[students.baseline]", "[students.small-steps-2]\nlike = 'small'\n[students.b]")
    line = finished.refused(*SWEEP, "--grid", f"{TRAIN}.steps=2,3")
    assert line == (
        "error: --grid: students.small-steps-2 is in the recipe already, with train.steps = 3, now "
        "2; get another name with a --grid of that key too, or rename that student"
    )
    finished.edit("like = 'small'", "like = 'small'\ntrain = { steps = 2 }")
    told = finished.done(*SWEEP, "--grid", f"{TRAIN}.steps=2,3", "--dry-run").stdout
    assert [line.split()[0] for line in told.splitlines()] == ["small-steps-2", "small"]


def test_points_with_other_settings_are_refused_with_the_remedy(finished: Desk) -> None:
    finished.done(*SWEEP, "--grid", f"{TRAIN}.steps=2")
    other = ("--set", f"{TRAIN}.warmup=0.5", "--grid", f"{TRAIN}.steps=2")
    line = finished.refused(*SWEEP, *other)
    assert "students.small-steps-2 was trained with student.train.warmup = 0.05, now 0.5; " in line
    assert "under a new name (with a --grid of that key too)" in line
    result = finished.done(*SWEEP, *STEPS[:1], f"{TRAIN}.steps=2", "--grid", f"{TRAIN}.warmup=0.5")
    assert trained(result.stderr) == ["small-steps-2-train.warmup-0.5"]


def test_a_diverged_point_is_left_out_and_the_others_are_trained(finished: Desk) -> None:
    line = "train = { steps = 3, batch_tokens = 256, warmup = 0.0, gradient_clip = 0.0, trainer = {"
    finished.edit("[students.baseline]", "[students.sgd]\nlike = 'small'\n"
                  f"{line} optim = 'sgd' }} }}\n[students.baseline]")  # fmt: skip
    rate = "students.sgd.train.learning_rate"
    for _ in range(2):  # and once more when it goes on
        result = finished.coldstill(*SWEEP, "--grid", f"{rate}=1e-3,1e30,2e-3")
        assert isinstance(result.exception, SystemExit)
        assert result.exit_code == 1
        left_out = "sweep: warning: left out: train-student sgd-learning_rate-1e30: step 2: the "
        assert result.stderr.count(left_out) == 1
        assert result.stderr.splitlines()[-1] == (
            "error: sweep: 1 of 3 points left out because their loss became NaN or infinite: "
            "sgd-learning_rate-1e30; sweep lower learning rates, or leave these values out"
        )
        assert sorted(models_of(result.stdout)) == ["sgd", "sgd-learning_rate-0.002", "teacher"]
    alone = finished.coldstill(*SWEEP, "--grid", f"{rate}=1e30")
    assert alone.exit_code == 1
    assert alone.stdout == ""
    by_hand = ("train-student", "r.toml", "--student", "x", "--set", f"{rate}=1e30")
    assert "error: train-student x: step 2: the " in finished.coldstill(*by_hand).stderr


@pytest.mark.parametrize("gone", [".", "model"], ids=["all of it", "the model"])
def test_a_run_makes_each_of_its_students_again_from_its_own_recipe(
    finished: Desk, gone: str
) -> None:
    """Points of a sweep and variants made by hand, one with another seed; the file knows none."""
    finished.done(*SWEEP, *RATES)
    finished.done(
        "train-student", "r.toml", "--student", "seeded",
        "--set", f"{TRAIN}.steps=2", "--set", "seed=7",
    )  # fmt: skip
    finished.done(*SWEEP, "--grid", "students.baseline.train.steps=2")
    made = ("small-learning_rate-0.003", "seeded", "baseline-steps-2", "small")
    before = {name: weights(finished, name) for name in made}
    assert len(set(before.values())) == len(made)
    records = {name: finished.json("students", name, "student.json") for name in made}
    (finished.root / "r.toml").unlink()
    for name in made:
        shutil.rmtree(finished.run / "students" / name / gone)
        finished.done("train-student", "runs/r", "--student", name)
    assert {name: weights(finished, name) for name in made} == before
    assert {name: finished.json("students", name, "student.json") for name in made} == records
    assert trained(finished.done("train-student", "runs/r", "--all").stderr) == []
    # stage one is what it was: another student's seed is not the store's
    assert "teacher-logits" in finished.done("teacher-logits", "runs/r").stderr


def test_a_runs_folder_can_be_swept_and_knows_its_points(finished: Desk) -> None:
    finished.done(*SWEEP, *RATES)
    path: Path = finished.run
    result = finished.done("sweep", "runs/r", *RATES)
    assert trained(result.stderr) == []
    of_a_point = ("--grid", "students.small-learning_rate-0.003.train.steps=2,3")
    result = finished.done("sweep", "runs/r", *of_a_point)
    assert trained(result.stderr) == ["small-learning_rate-0.003-steps-2"]
    assert (path / "students" / "small-learning_rate-0.003-steps-2" / "model").is_dir()
