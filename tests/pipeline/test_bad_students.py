"""What is refused of students: weights that add up to nothing, and what another training left."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
from coldstill.stages.config import WeightConfig
from coldstill.stages.training.objective import weight_at

if TYPE_CHECKING:
    from pathlib import Path

    from desk import Desk

pytest_plugins = ("desk",)

STUDENT = ("train-student", "r.toml")
NEW = (*STUDENT, "--student", "n", "--set")


@pytest.mark.parametrize(
    "objective",
    [
        "{ kl = 0 }",
        "{ kl = 0.0, cross_entropy = 0.0 }",
        "{ kl = -0.0 }",
        "{ kl = 1e-400 }",
        "{ kl = { weight = 0 } }",
        '{ kl = { weight = 0, schedule = "linear" } }',
        '{ kl = { weight = 0, schedule = "wsd" }, jsd = 0 }',
        '{ kl = { weight = 0, start = 1, schedule = "wsd", warmup = 0.0 } }',
        '{ kl = { weight = 0, end = 1, schedule = "wsd", decay = 0.0 } }',
    ],
)
def test_an_objective_with_zero_weights_is_refused(finished: Desk, objective: str) -> None:
    assert finished.refused(*NEW, f"students.small.objective={objective}") == (
        "error: students.n.objective: all weights are 0, so there is nothing to learn; give one, "
        "such as kl = 1.0"
    )


@pytest.mark.parametrize(
    ("weight", "steps"),
    [
        ('{ weight = 0, start = 1, schedule = "linear" }', 1),
        ('{ weight = 1, schedule = "wsd" }', 1),
        ('{ weight = 0, end = 1, schedule = "wsd", warmup = 1.0, decay = 0.0 }', 1),
        ('{ weight = 0, end = 1, schedule = "wsd", warmup = 0.9 }', 2),
    ],
)
def test_weights_that_are_zero_in_every_step_are_refused(
    finished: Desk, weight: str, steps: int
) -> None:
    options = ("--set", f"students.small.objective.kl={weight}")
    line = finished.refused(*NEW, f"students.small.train.steps={steps}", *options)
    if "decay = 0.0" in weight:  # known without the steps
        assert "all weights are 0, so there is nothing to learn; give one" in line
        return
    named = "the only step" if steps == 1 else f"all {steps} steps"
    assert line == (
        f"error: students.n.objective: all weights are 0 in {named}, so there is nothing to learn; "
        "change their schedules or train.steps"
    )
    # something that counts beside it is enough
    also = ("--set", "students.small.objective.cross_entropy=0.1")
    finished.done(*NEW, f"students.small.train.steps={steps}", *options, *also)


def test_a_weight_that_only_starts_at_zero_is_accepted() -> None:
    weight = WeightConfig(weight=1.0, schedule="linear")
    assert [weight_at(weight, step, 3) for step in range(3)] == [0.0, 0.5, 1.0]


@pytest.mark.parametrize(
    ("teachers", "said"),
    [
        ("[{ weight = 0 }]", "teachers: all weights are 0; set at least one above 0"),
        (
            '[{ weight = 0.0 }, { logits = "o", weight = 0 }]',
            "teachers: all weights are 0; set at least one above 0",
        ),
        ('[{ logits = "o", weight = -1 }]', "weight: input should be greater than or equal to 0"),
        ('[{ logits = "o", weight = nan }]', "weight: input should be "),
        (
            '[{ logits = "o", weight = 1.5 }]',
            "the sum of the weights is 1.5, so the run's own store",
        ),
    ],
)
def test_wrong_weights_of_teachers_are_refused(finished: Desk, teachers: str, said: str) -> None:
    line = finished.refused(*NEW, f"students.small.teachers={teachers}")
    assert line.startswith("error: r.toml: students.n")
    assert said in line


def test_teachers_with_weight_zero_change_nothing(finished: Desk) -> None:
    shutil.copytree(finished.run / "logits", finished.root / "o")
    finished.done(*NEW, 'students.small.teachers=[{ logits = "o", weight = 0 }]')
    lines = [
        (finished.run / "students" / name / "metrics.jsonl").read_text().splitlines()
        for name in ("n", "small")
    ]
    losses = [[json.loads(line)["loss"] for line in each] for each in lines]
    assert losses[0] == losses[1]


def test_an_empty_objective_stops_all_students_before_training(finished: Desk) -> None:
    finished.edit(
        "[students.baseline]",
        "[students.a]\nlike = 'small'\n[students.b]\nlike = 'small'\nobjective = { kl = 0 }\n"
        "[students.baseline]",
    )
    assert "students.b.objective: all weights are 0" in finished.refused(*STUDENT, "--all")


@pytest.fixture
def half(finished: Desk) -> Desk:
    """A desk whose student `small` was killed after a checkpoint."""
    folder = finished.run / "students" / "small"
    shutil.rmtree(folder / "model")
    shutil.rmtree(folder / "checkpoints" / "checkpoint-3")
    assert (folder / "checkpoints" / "checkpoint-2" / "whole.json").exists()
    return finished


def whole(desk: Desk, student: str = "small") -> Path:
    return desk.run / "students" / student / "checkpoints" / "checkpoint-2" / "whole.json"


def without_settings(path: Path) -> None:
    """As checkpoints of older versions are."""
    said: dict[str, Any] = json.loads(path.read_text())
    assert said.pop("settings")["seed"] == 0
    path.write_text(json.dumps(said))


def test_a_checkpoint_records_its_settings(half: Desk) -> None:
    said = json.loads(whole(half).read_text())
    assert said["settings"] == half.json("students", "small", "student.json")
    half.done(*STUDENT, "--student", "small")


@pytest.mark.parametrize("recorded", [True, False])
def test_a_checkpoint_of_another_student_is_refused_with_the_key(
    half: Desk, recorded: bool
) -> None:
    folder = half.run / "students"
    shutil.copytree(folder / "small", folder / "n")
    record = json.loads((folder / "n" / "student.json").read_text())
    record["student"]["train"]["learning_rate"] = 0.003  # as if only the checkpoints were copied
    (folder / "n" / "student.json").unlink()
    if recorded:
        (folder / "n" / "student.json").write_text(json.dumps(record))
    line = half.refused(*NEW, "students.small.train.learning_rate=0.003")
    assert line == (
        "error: runs/r/students/n/checkpoints/checkpoint-2: is of another training, with "
        "student.train.learning_rate = 0.001, now 0.003; train under a new name, or delete "
        "runs/r/students/n to train it again"
    )


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("objective.cross_entropy=1", "student.objective.cross_entropy = 0.0, now 1.0"),
        ("architecture.layers=2", "student.architecture.layers = 1, now 2"),
        ("train.seed=4", "seed = 0, now 4"),
        ("train.trainer={adam_beta1=0.8}", "student.train.trainer.adam_beta1 = None, now 0.8"),
    ],
)
def test_a_deleted_record_does_not_let_another_recipe_resume(
    half: Desk, setting: str, said: str
) -> None:
    (half.run / "students" / "small" / "student.json").unlink()
    line = half.refused(*STUDENT, "--student", "small", "--set", f"students.small.{setting}")
    assert f"is of another training, with {said}; " in line
    # the same one goes on, and has its record again
    assert "going on from step 2" in half.done(*STUDENT, "--student", "small").stderr
    assert half.json("students", "small", "student.json")["seed"] == 0


def test_a_checkpoint_of_an_older_version_needs_the_record(half: Desk) -> None:
    without_settings(whole(half))
    record = half.run / "students" / "small" / "student.json"
    text = record.read_text()
    record.unlink()
    line = half.refused(*STUDENT, "--student", "small")
    assert line == (
        "error: runs/r/students/small/checkpoints/checkpoint-2: students.small has no student.json "
        "beside it, so its settings are unknown; put that file back, or delete "
        "runs/r/students/small to train it again"
    )
    older = json.loads(text)
    older["student"]["train"]["seed"] = None  # as it was written where the recipe's seed counts
    record.write_text(json.dumps(older))
    assert "going on from step 2" in half.done(*STUDENT, "--student", "small").stderr


def test_a_model_without_a_record_is_never_replaced(finished: Desk) -> None:
    (finished.run / "students" / "small" / "student.json").unlink()
    line = finished.refused(*STUDENT, "--student", "small")
    assert line.startswith("error: runs/r/students/small/model: students.small has no student.json")


def test_layers_prepared_for_another_recipe_are_refused(finished: Desk) -> None:
    start = finished.run / "students" / "n" / "start"
    shutil.copytree(finished.root / "teacher", start)
    finished.edit(
        "[students.baseline]",
        "[students.n]\nlayers = [0]\ntrain = { steps = 1, batch_tokens = 256 }\n"
        "[students.baseline]",
    )
    line = finished.refused(*STUDENT, "--student", "n")
    assert line.startswith("error: runs/r/students/n/start: students.n has no student.json beside")
    shutil.rmtree(start)
    finished.done(*STUDENT, "--student", "n")


def test_a_teachers_checkpoint_of_another_recipe_is_refused(desk: Desk) -> None:
    text = (desk.root / "r.toml").read_text(encoding="utf-8")
    line = next(line for line in text.splitlines() if line.startswith("model = "))
    made = "architecture = { layers = 1, hidden = 32, heads = 2 }\ntokenizer = { vocabulary = 300 }"
    desk.edit(line, f"{made}\ntrain = {{ steps = 2, batch_tokens = 256, checkpoint_every = 1 }}")
    desk.done("train-teacher", "r.toml")
    shutil.rmtree(desk.run / "teacher" / "model")
    (desk.run / "teacher" / "teacher.json").unlink()
    line = desk.refused("train-teacher", "r.toml", "--set", "teacher.train.learning_rate=0.1")
    assert "teacher/checkpoints/checkpoint-2: is of another training, with " in line
    assert "train.learning_rate = 0.001, now 0.1; " in line
    desk.done("train-teacher", "r.toml")
