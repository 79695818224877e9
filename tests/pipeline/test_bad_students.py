"""Students that cannot be trained, and checkpoints of other trainings: clear refusals."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import pytest
from coldstill.stages.objective_config import WeightConfig
from coldstill.stages.training.objective import weight_at
from conftest import make_model

if TYPE_CHECKING:
    from pathlib import Path

    from desk import Desk

pytest_plugins = ("desk",)

STUDENT = ("train-student", "r.toml")
SMALL = (*STUDENT, "--student", "small")
NEW = (*STUDENT, "--student", "n", "--set")
NO_WEIGHT = "all weights are 0, so there is nothing to learn; give one"


def add_student(desk: Desk, *lines: str) -> None:
    """Add the student `n` to the recipe."""
    student = "\n".join(["[students.n]", *lines])
    desk.edit("[students.baseline]", f"{student}\n[students.baseline]")


@pytest.mark.slow
def test_an_untrainable_student_is_refused_and_can_be_corrected(finished: Desk) -> None:
    trainer = "train.trainer={%s}"
    for setting, message in (
        ("architecture.heads=3", "students.n.architecture: hidden = 32 is not a multiple of heads"),
        ("architecture.kv_heads=3", "heads = 2 is not a multiple of kv_heads = 3"),
        ("architecture.family=lama", "students.n.architecture: cannot make a 'lama' model: "),
        (
            "architecture.context=16",
            "error: students.n: its context of 16 tokens is shorter than the store's sequences of "
            "32",
        ),
        ("objective.temperature=2", "temperature 2.0 was not captured (captured: 1.0)"),
        (trainer % "stepps=3", "train.trainer: "),
        (trainer % "optim='none'", "train.trainer: "),
        (trainer % "eval_strategy='steps'", "'eval_strategy' would change nothing: "),
        (trainer % "max_steps=2", "train.trainer: 'max_steps' follows from the keys of train its"),
        ("train.micro_batch_tokens=96", "cannot be shared out as 3 per forward pass"),
    ):
        assert message in finished.refused(*NEW, f"students.small.{setting}")
    finished.done(*NEW, "students.small.architecture.heads=4")
    assert (finished.run / "students" / "n" / "model").is_dir()


@pytest.mark.slow
def test_a_missing_model_or_a_tokenizer_without_bytes_is_refused(finished: Desk) -> None:
    add_student(finished, 'like = "small"', 'model = "./other"')
    train = (*STUDENT, "--student", "n")
    assert finished.refused(*train) == "error: students.n.model: no folder ./other"
    folder = finished.root / "other"
    make_model("llama", 320).save_pretrained(folder)
    for path in (finished.root / "teacher").glob("tokenizer*"):
        shutil.copy(path, folder)
    table = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = table["model"]["vocab"]
    first, second = [token for token, i in vocabulary.items() if i in (70, 71)]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    table["decoder"] = None
    finished.write("other/tokenizer.json", json.dumps(table))
    line = finished.coldstill(*train).stderr.splitlines()[-1]
    assert "error: the tokenizer of students.n: the bytes of its tokens cannot be known" in line


@pytest.mark.slow
def test_unknown_students_are_refused(finished: Desk) -> None:
    line = finished.refused(*STUDENT, "--student", "smal")
    assert line.startswith("error: r: no student 'smal' (have: small, baseline); ")
    line = finished.refused("evaluate", "r.toml", "--student", "smal")
    assert "student 'smal' is not trained (trained: baseline, small)" in line


@pytest.mark.slow
def test_an_objective_with_zero_weights_is_refused(finished: Desk) -> None:
    wsd = 'schedule = "wsd"'
    for objective in (
        "{ kl = 0.0, cross_entropy = 0.0 }",
        "{ kl = -0.0 }",
        "{ kl = 1e-400 }",
        "{ kl = { weight = 0 } }",
        '{ kl = { weight = 0, schedule = "linear" } }',
        f"{{ kl = {{ weight = 0, {wsd} }}, jsd = 0 }}",
        f"{{ kl = {{ weight = 0, start = 1, {wsd}, warmup = 0.0 }} }}",
        f"{{ kl = {{ weight = 0, end = 1, {wsd}, decay = 0.0 }} }}",
        f"{{ kl = {{ weight = 0, end = 1, {wsd}, warmup = 1.0, decay = 0.0 }} }}",
    ):
        line = finished.refused(*NEW, f"students.small.objective={objective}")
        assert line == f"error: students.n.objective: {NO_WEIGHT}, such as kl = 1.0"
    # one such student stops all of them before any is trained
    add_student(finished, 'like = "small"', "objective = { kl = 0 }")
    assert f"students.n.objective: {NO_WEIGHT}" in finished.refused(*STUDENT, "--all")


@pytest.mark.slow
def test_weights_that_are_zero_in_every_step_are_refused(finished: Desk) -> None:
    for weight, steps in (
        ('{ weight = 0, start = 1, schedule = "linear" }', 1),
        ('{ weight = 1, schedule = "wsd" }', 1),
        ('{ weight = 0, end = 1, schedule = "wsd", warmup = 0.9 }', 2),
    ):
        settings = (f"students.small.train.steps={steps}", "--set")
        line = finished.refused(*NEW, *settings, f"students.small.objective.kl={weight}")
        named = "the only step" if steps == 1 else f"all {steps} steps"
        assert line == (
            f"error: students.n.objective: all weights are 0 in {named}, so there is nothing to "
            "learn; change their schedules or train.steps"
        )
    # a second weight above 0 is enough
    objective = f"{{ kl = {weight}, cross_entropy = 0.1 }}"
    finished.done(*NEW, *settings, f"students.small.objective={objective}")
    starts_at_zero = WeightConfig(weight=1.0, schedule="linear")
    assert [weight_at(starts_at_zero, step, 3) for step in range(3)] == [0.0, 0.5, 1.0]


@pytest.mark.slow
def test_wrong_weights_of_teachers_are_refused_and_zero_weights_change_nothing(
    finished: Desk,
) -> None:
    no_weight = "teachers: all weights are 0; set at least one above 0"
    for teachers, message in (
        ("[{ weight = 0 }]", no_weight),
        ('[{ weight = 0.0 }, { logits = "o", weight = 0 }]', no_weight),
        ('[{ logits = "o", weight = -1 }]', "weight: input should be greater than or equal to 0"),
        ('[{ logits = "o", weight = nan }]', "weight: input should be "),
        (
            '[{ logits = "o", weight = 1.5 }]',
            "the sum of the weights is 1.5, so the run's own store",
        ),
    ):
        line = finished.refused(*NEW, f"students.small.teachers={teachers}")
        assert line.startswith("error: r.toml: students.n")
        assert message in line
    for weight in (0.5, 1):
        both = f'{{ teachers = [{{ logits = "o", weight = {weight} }}], objective.branches = 1 }}'
        line = finished.refused(*NEW, f'students.n = {both[:-1]}, like = "small" }}')
        assert "branches is of the run's own teacher alone, and others have a share" in line
    shutil.copytree(finished.run / "logits", finished.root / "o")
    finished.done(*NEW, 'students.small.teachers=[{ logits = "o", weight = 0 }]')
    metrics = [finished.run / "students" / name / "metrics.jsonl" for name in ("n", "small")]
    losses = [
        [json.loads(line)["loss"] for line in path.read_text().splitlines()] for path in metrics
    ]
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_a_student_trained_with_other_settings_or_without_a_record_is_refused(
    finished: Desk,
) -> None:
    line = finished.refused(*STUDENT, "--set", "students.small.train.steps=4")
    assert line == (
        "error: runs/r/students/small: students.small was trained with student.train.steps = 3, "
        "now 4; train another under a new name (--student NEW), or delete this folder to train it "
        "again"
    )
    # one wrong student stops all before any is trained
    shutil.rmtree(finished.run / "students" / "baseline")
    line = finished.refused(*STUDENT, "--set", "students.small.train.weight_decay=0.2")
    assert "student.train.weight_decay = 0.1, now 0.2" in line
    (finished.run / "students" / "small" / "student.json").unlink()
    line = finished.refused(*SMALL)
    assert line.startswith("error: runs/r/students/small/model: students.small has no student.json")


@pytest.fixture
def half(finished: Desk) -> Desk:
    """A desk whose student `small` was killed after a checkpoint."""
    folder = finished.run / "students" / "small"
    shutil.rmtree(folder / "model")
    shutil.rmtree(folder / "checkpoints" / "checkpoint-3")
    return finished


def whole(desk: Desk) -> Path:
    """The record of the last checkpoint."""
    return desk.run / "students" / "small" / "checkpoints" / "checkpoint-2" / "whole.json"


def test_a_checkpoint_of_another_student_is_refused_with_the_key(half: Desk) -> None:
    assert json.loads(whole(half).read_text())["settings"] == half.json(
        "students", "small", "student.json"
    )
    shutil.copytree(half.run / "students" / "small", half.run / "students" / "n")
    path = half.run / "students" / "n" / "student.json"
    record = json.loads(path.read_text())
    record["student"]["train"]["learning_rate"] = 0.003  # as if only the checkpoints were copied
    for recorded in (True, False):
        path.unlink()
        if recorded:
            path.write_text(json.dumps(record))
        assert half.refused(*NEW, "students.small.train.learning_rate=0.003") == (
            "error: runs/r/students/n/checkpoints/checkpoint-2: is of another training, with "
            "student.train.learning_rate = 0.001, now 0.003; train under a new name, or delete "
            "runs/r/students/n to train it again"
        )


@pytest.mark.slow
def test_a_deleted_record_does_not_let_another_recipe_resume(half: Desk) -> None:
    (half.run / "students" / "small" / "student.json").unlink()
    for setting, message in (
        ("objective.cross_entropy=1", "student.objective.cross_entropy = 0.0, now 1.0"),
        ("architecture.layers=2", "student.architecture.layers = 1, now 2"),
        ("train.seed=4", "seed = 0, now 4"),
        ("train.trainer={adam_beta1=0.8}", "student.train.trainer.adam_beta1 = None, now 0.8"),
    ):
        line = half.refused(*SMALL, "--set", f"students.small.{setting}")
        assert f"is of another training, with {message}; " in line
    # the same recipe resumes and writes the record again
    assert "resuming from step 2" in half.done(*SMALL).stderr
    assert half.json("students", "small", "student.json")["seed"] == 0


@pytest.mark.slow
def test_a_checkpoint_of_an_older_version_needs_the_record(half: Desk) -> None:
    checkpoint = json.loads(whole(half).read_text())
    assert checkpoint.pop("settings")["seed"] == 0
    whole(half).write_text(json.dumps(checkpoint))
    path = half.run / "students" / "small" / "student.json"
    record = json.loads(path.read_text())
    path.unlink()
    assert half.refused(*SMALL) == (
        "error: runs/r/students/small/checkpoints/checkpoint-2: students.small has no student.json "
        "beside it, so its settings are unknown; put that file back, or delete "
        "runs/r/students/small to train it again"
    )
    record["student"]["train"]["seed"] = None  # older versions wrote this for the recipe's seed
    path.write_text(json.dumps(record))
    assert "resuming from step 2" in half.done(*SMALL).stderr


@pytest.mark.slow
def test_layers_prepared_for_another_recipe_are_refused(finished: Desk) -> None:
    start = finished.run / "students" / "n" / "start"
    shutil.copytree(finished.root / "teacher", start)
    add_student(finished, "layers = [0]", "train = { steps = 1, batch_tokens = 256 }")
    line = finished.refused(*STUDENT, "--student", "n")
    assert line.startswith("error: runs/r/students/n/start: students.n has no student.json beside")
    shutil.rmtree(start)
    finished.done(*STUDENT, "--student", "n")


@pytest.mark.slow
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
