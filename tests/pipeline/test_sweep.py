"""Grids of students on one store: names of points, training, comparison, and resuming."""

from __future__ import annotations

import json
import re
import shutil
import signal
from typing import TYPE_CHECKING, Any

import pytest
from coldstill.data.errors import ColdstillError
from coldstill.pipeline.recipe.reading import split_key
from coldstill.pipeline.recipe.reference import student_keys
from coldstill.pipeline.recipe.tables import NAME_PATTERN
from coldstill.pipeline.steps.sweep import Grid, points_of, read_grids
from compared import models_of
from safetensors.torch import load_file

if TYPE_CHECKING:
    from desk import Desk, Processes

pytest_plugins = ("desk",)

STUDENTS = ("small", "small-learning_rate-0.003")


def values(text: str) -> tuple[Any, ...]:
    (grid,) = read_grids([f"students.small.train.x={text}"], STUDENTS)
    return grid.values


def names(*grids: tuple[str, list[Any]], student: str = "small") -> list[str]:
    made = [Grid(student=student, key=tuple(k.split(".")), values=tuple(v)) for k, v in grids]
    return [point.name for point in points_of(made)]


def test_values_are_toml_or_bare_words() -> None:
    cases: dict[str, tuple[Any, ...]] = {
        "1e-3,3e-3": (1e-3, 3e-3),
        "1, 2 ,3": (1, 2, 3),
        "cosine,linear": ("cosine", "linear"),
        "0.5,cosine,true": (0.5, "cosine", True),
        '"a,b","c"': ("a,b", "c"),
        "[0,3],[0,1,2]": ([0, 3], [0, 1, 2]),
        "{every=2},[0,3]": ({"every": 2}, [0, 3]),
        '{weight=1,schedule="wsd"},0.5': ({"weight": 1, "schedule": "wsd"}, 0.5),
        "./a,ORG/NAME": ("./a", "ORG/NAME"),
    }
    assert {text: values(text) for text in cases} == cases
    for text in ('"a,b",c', "1]\nother = [2", "[0,3", "a,,b", "", ","):
        with pytest.raises(ColdstillError, match="expected values separated by commas, as in TOML"):
            values(text)


def test_keys_that_cannot_be_swept_are_refused() -> None:
    for text, message in (
        ("seed=1,2", "another seed of the recipe would need another store; sweep students.NAME"),
        ("logits.head=1,2", "only keys below students. can be swept: another logits.head would n"),
        ("students=1", "expected a student's key, students.NAME.KEY=V1,V2"),
        ("students.small=1", "expected a student's key, students.NAME.KEY=V1,V2"),
        ("students.smal.train.steps=1", "no student 'smal' (have: small, small-learning_rate-0.0"),
        ("students.small.train.steps", "expected students.NAME.KEY=V1,V2"),
        ("students.small.=1", "expected students.NAME.KEY=V1,V2"),
        ("=1", "expected students.NAME.KEY=V1,V2"),
    ):
        with pytest.raises(ColdstillError) as error:
            read_grids([text], STUDENTS)
        assert str(error.value).startswith(f"--grid {text}: {message}")
    key = "students.small.train"
    with pytest.raises(ColdstillError, match="this key has a grid already; give all its values in"):
        read_grids([f"{key}.steps=1", f"{key}.warmup=0", f"{key}.steps=2"], STUDENTS)
    pair = [f"{key}.steps=1", f"{key}={{steps=2}}"]
    for order in (pair, pair[::-1]):
        with pytest.raises(ColdstillError, match="steps is a part of train, which has a grid too"):
            read_grids(order, STUDENTS)
    with pytest.raises(ColdstillError, match="two points would both be called small-steps-1"):
        names(("train.steps", [1, "1"]))
    with pytest.raises(ColdstillError, match="1,001 points are more than 1,000; take fewer values"):
        names(("train.steps", [*range(1001)]))


def test_a_name_of_a_student_can_contain_dots() -> None:
    parts = ["students", "small-learning_rate-0.003", "train", "steps"]
    assert split_key(".".join(parts), STUDENTS) == parts
    assert split_key('students."a.b".train.steps', ()) == ["students", "a.b", "train", "steps"]
    steps = ["students", "small", "train", "steps"]
    assert split_key("students.small.train.steps", STUDENTS) == steps
    assert split_key("students.small.", STUDENTS) is None
    assert split_key("students.small", STUDENTS) == ["students", "small"]
    # grids of one student make a product, grids of several do not
    grids = [
        "students.small.train.steps=1,2",
        "students.small-learning_rate-0.003.train.steps=5,6",
        "students.small.train.learning_rate=1e-3,3e-3",
    ]
    assert [point.name for point in points_of(read_grids(grids, STUDENTS))] == [
        f"small-learning_rate-{rate}-steps-{steps}"
        for rate, steps in (
            ("0.001", 1), ("0.001", 2), ("0.003", 1), ("0.003", 2), ("0.003", 5), ("0.003", 6),
        )
    ]  # fmt: skip


def test_equal_points_have_one_name_and_others_differ() -> None:
    first, second = ("train.steps", [1, 2]), ("train.learning_rate", [0.1, 0.2])
    assert names(first, second) == names(second, first)
    assert set(names(first, second)) < set(names(first, (second[0], [0.1, 0.2, 0.3])))
    for one, other, name in (
        (3e-3, 0.003, "0.003"), (1, 1.0, "1"), (1e3, 1000, "1000"), (0.00001, 1e-5, "1e-5"),
        (-0.5, -5e-1, "-0.5"),
    ):  # fmt: skip
        assert names(("train.learning_rate", [one, other])) == [f"small-learning_rate-{name}"]
    table, same = {"weight": 1.0, "start": 1e-1}, {"start": 0.1, "weight": 1}
    assert len(names(("objective.kl", [table, same]))) == 1
    assert len(names(("objective.kl", [table, {**table, "start": 0.2}]))) == 2
    keys = sorted(".".join(key) for key in student_keys())
    assert {"train.steps", "objective.jsd.schedule", "layers.every"} <= set(keys)
    assert len({names((key, [1]))[0] for key in keys}) == len(keys)
    long = [(f"train.trainer.{letter * 30}", [1, 2]) for letter in "abcdefgh"]
    found = names(*long)
    assert len(set(found)) == 2**8
    assert all(re.fullmatch("small-[0-9a-f]{8}", name) for name in found)
    assert names(*long) == found


def test_a_key_is_named_by_its_shortest_unique_end() -> None:
    suffixes = {
        "train.learning_rate": "learning_rate",
        "train.warmup": "train.warmup",  # a changing weight has this key too
        "train.schedule": "train.schedule",
        "objective.kl": "kl",
        "objective.kl.weight": "kl.weight",
        "layers": "layers",
        "architecture.layers": "architecture.layers",
        "architecture.hidden": "hidden",
        "lora.rank": "rank",
        "train.trainer.adam_beta1": "adam_beta1",
        "train.trainer.weight_decay": "trainer.weight_decay",
    }
    found = {key: names((key, [1])) for key in suffixes}
    assert found == {key: [f"small-{suffix}-1"] for key, suffix in suffixes.items()}


def test_every_value_gives_a_valid_folder_name() -> None:
    words = ((True, "true"), ("cosine", "cosine"), ("50%", "50pct"), ("12.5%", "12.5pct"))
    others = ([0.5], {"every": 2}, "../up/ORG/NAME", "two words", "x" * 40, list(range(40)))
    for value, pattern in (*words, ([0, 3], "0_3"), *((value, "[0-9a-f]{8}") for value in others)):
        (name,) = names(("objective.kl", [value]))
        assert re.fullmatch(f"small-kl-{pattern}", name)
        assert re.fullmatch(NAME_PATTERN, name)


TRAIN = "students.small.train"
SWEEP = ("sweep", "r.toml")
RATES = ("--grid", f"{TRAIN}.learning_rate=1e-3,3e-3")
STEPS = ("--grid", f"{TRAIN}.steps=2,3")


def student_names(desk: Desk) -> set[str]:
    return {path.name for path in (desk.run / "students").iterdir()}


def weights(desk: Desk, name: str) -> bytes:
    path = desk.run / "students" / name / "model" / "model.safetensors"
    return b"".join(tensor.numpy().tobytes() for _, tensor in sorted(load_file(path).items()))


def trained(output: str) -> list[str]:
    """The students that were trained, in order."""
    lines = [line for line in output.splitlines() if line.endswith("parameters trained")]
    return [line.removeprefix("train-student ").partition(":")[0] for line in lines]


@pytest.mark.slow
def test_a_grid_is_trained_measured_listed_by_loss_and_resumed(finished: Desk) -> None:
    before = weights(finished, "small")
    result = finished.done(*SWEEP, *RATES, *STEPS)
    # a point that equals the recipe's own student in everything is that student
    missing = [
        "small-learning_rate-0.001-steps-2",
        "small-learning_rate-0.003-steps-2",
        "small-learning_rate-0.003-steps-3",
    ]
    assert "sweep: 4 points, 1 of them trained already\n" in result.stderr
    assert trained(result.stderr) == missing
    assert student_names(finished) == {"small", "baseline", *missing}
    assert weights(finished, "small") == before
    teacher, *students = models_of(result.stdout)
    assert teacher == "teacher"
    assert {*students} == {"small", *missing}, "no other student"
    head, _, _, *rows = result.stdout.split("\n\n")[0].splitlines()
    end = head.index("  loss") + len("  loss")
    losses = [float(line[:end].split()[-1]) for line in rows]
    assert losses == sorted(losses)
    # compare shows all students of the run
    assert len(json.loads(finished.done("compare", "r.toml", "--json").stdout)) == 2 + 4
    # a point equals the student trained by hand
    settings = [f"--set={TRAIN}.learning_rate=0.003", f"--set={TRAIN}.steps=2"]
    finished.done("train-student", "r.toml", "--student", "by-hand", *settings)
    assert weights(finished, missing[1]) == weights(finished, "by-hand") != before
    # a repeated grid changes nothing, also from the run's folder; a larger one trains new points
    snapshot = finished.snapshot()
    for recipe in ("r.toml", "runs/r"):
        again = finished.done("sweep", recipe, *RATES, *STEPS)
        assert f"train-student {missing[1]}: already trained: runs/r/" in again.stderr
        assert trained(again.stderr) == []
    changed = {name for name, content in finished.snapshot().items() if snapshot[name] != content}
    assert changed <= {f"runs/r/comparison.{kind}" for kind in ("json", "md", "html")}
    more = finished.done(*SWEEP, "--grid", f"{TRAIN}.learning_rate=0.003,1e-3,1e-2")
    assert trained(more.stderr) == ["small-learning_rate-0.003", "small-learning_rate-0.01"]
    of_a_point = ("--grid", "students.small-learning_rate-0.003.train.steps=2,3")
    assert trained(finished.done("sweep", "runs/r", *of_a_point).stderr) == []
    # the student itself is a point only if the grid has it
    shutil.rmtree(finished.run / "students" / "small")
    assert trained(finished.done(*SWEEP, "--grid", f"{TRAIN}.steps=1").stderr) == ["small-steps-1"]
    result = finished.done(*SWEEP, "--grid", f"{TRAIN}.seed=0,1")
    assert trained(result.stderr) == ["small", "small-seed-1"]


@pytest.mark.slow
def test_a_killed_sweep_resumes_at_its_last_point(finished: Desk, processes: Processes) -> None:
    grid = ("--grid", f"{TRAIN}.steps=2,12,4")
    students = finished.run / "students"
    sign = students / "small-steps-12" / "checkpoints" / "checkpoint-2" / "whole.json"
    code, lines = processes.stopped(finished, signal.SIGKILL, sign, *SWEEP, *grid)
    assert code == -signal.SIGKILL
    assert trained("\n".join(lines)) == ["small-steps-2"]
    assert not (students / "small-steps-4").exists()
    # the run's own record has the points that were begun
    assert {"small-steps-2", "small-steps-12"} <= resolved(finished).keys()
    shorter = finished.done(*SWEEP, "--grid", f"{TRAIN}.steps=2,4")
    assert trained(shorter.stderr) == ["small-steps-4"]
    assert "small-steps-12" in resolved(finished)
    ended = finished.done(*SWEEP, *grid)
    assert trained(ended.stderr) == ["small-steps-12"]
    assert "train-student small-steps-12: resuming from step " in ended.stderr


def resolved(desk: Desk) -> dict[str, Any]:
    students: dict[str, Any] = desk.json("recipe.resolved.json")["recipe"]["students"]
    return students


@pytest.mark.slow
def test_two_students_are_swept_independently(finished: Desk) -> None:
    objective = "students.baseline.objective.cross_entropy=1,0.5"
    schedule = f"{TRAIN}.schedule=cosine,linear"
    rows = json.loads(
        finished.done(*SWEEP, "--grid", schedule, "--grid", objective, "--json").stdout
    )
    assert rows[0]["name"] == "teacher"
    assert rows[0]["settings"] == {}
    assert {row["name"]: row["settings"] for row in rows[1:]} == {
        "small": {f"{TRAIN}.schedule": "cosine"},
        "small-train.schedule-linear": {f"{TRAIN}.schedule": "linear"},
        "baseline": {"students.baseline.objective.cross_entropy": 1},
        "baseline-cross_entropy-0.5": {"students.baseline.objective.cross_entropy": 0.5},
    }
    assert all(row["loss"] > 0 for row in rows)
    # inherited settings stay
    assert resolved(finished)["baseline-cross_entropy-0.5"]["train"]["steps"] == 3


@pytest.mark.slow
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


@pytest.mark.slow
def test_one_wrong_point_stops_all_before_any_is_trained(finished: Desk) -> None:
    finished.edit("log_every = 1", 'log_every = 1, schedule = "cosine"')
    for grid, message in (
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
    ):
        assert re.search(message, finished.refused(*SWEEP, "--grid", grid)), grid
    shutil.rmtree(finished.run)
    assert "small-learning_rate-0.003" in finished.done(*SWEEP, *RATES, "--dry-run").stdout
    line = finished.refused(*SWEEP, *RATES)
    assert "no store there; make it first with coldstill teacher-logits r" in line


@pytest.mark.slow
def test_a_point_with_the_name_of_another_student_is_refused(finished: Desk) -> None:
    finished.edit("[students.baseline]", "[students.small-steps-2]\nlike = 'small'\n[students.b]")
    line = finished.refused(*SWEEP, "--grid", f"{TRAIN}.steps=2,3")
    assert line == (
        "error: --grid: students.small-steps-2 is in the recipe already, with train.steps = 3, now "
        "2; get another name with a --grid of that key too, or rename that student"
    )
    finished.edit("like = 'small'", "like = 'small'\ntrain = { steps = 2 }")
    output = finished.done(*SWEEP, "--grid", f"{TRAIN}.steps=2,3", "--dry-run").stdout
    assert [line.split()[0] for line in output.splitlines()] == ["small-steps-2", "small"]


@pytest.mark.slow
def test_points_with_other_settings_are_refused_with_the_remedy(finished: Desk) -> None:
    finished.done(*SWEEP, "--grid", f"{TRAIN}.steps=2")
    other = ("--set", f"{TRAIN}.warmup=0.5", "--grid", f"{TRAIN}.steps=2")
    line = finished.refused(*SWEEP, *other)
    assert "students.small-steps-2 was trained with student.train.warmup = 0.05, now 0.5; " in line
    assert "under a new name (with a --grid of that key too)" in line
    result = finished.done(*SWEEP, *STEPS[:1], f"{TRAIN}.steps=2", "--grid", f"{TRAIN}.warmup=0.5")
    assert trained(result.stderr) == ["small-steps-2-train.warmup-0.5"]


@pytest.mark.slow
def test_a_diverged_point_is_left_out_and_the_others_are_trained(finished: Desk) -> None:
    line = "train = { steps = 3, batch_tokens = 256, warmup = 0.0, gradient_clip = 0.0, trainer = {"
    finished.edit("[students.baseline]", "[students.sgd]\nlike = 'small'\n"
                  f"{line} optim = 'sgd' }} }}\n[students.baseline]")  # fmt: skip
    rate = "students.sgd.train.learning_rate"
    for _ in range(2):  # the second time it resumes
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


@pytest.mark.slow
def test_a_run_makes_each_of_its_students_again_from_its_own_recipe(finished: Desk) -> None:
    """Points of a sweep and variants made by hand, one with another seed, and no recipe file."""
    finished.done(*SWEEP, *RATES)
    settings = (f"--set={TRAIN}.steps=2", "--set=seed=7")
    finished.done("train-student", "r.toml", "--student", "seeded", *settings)
    finished.done(*SWEEP, "--grid", "students.baseline.train.steps=2")
    made = ("small-learning_rate-0.003", "seeded", "baseline-steps-2", "small")
    before = {name: weights(finished, name) for name in made}
    assert len(set(before.values())) == len(made)
    records = {name: finished.json("students", name, "student.json") for name in made}
    (finished.root / "r.toml").unlink()
    for gone in (".", "model"):
        for name in made:
            shutil.rmtree(finished.run / "students" / name / gone)
            finished.done("train-student", "runs/r", "--student", name)
        assert {name: weights(finished, name) for name in made} == before
        assert {name: finished.json("students", name, "student.json") for name in made} == records
    assert trained(finished.done("train-student", "runs/r", "--all").stderr) == []
    # the first stage stays the same: the seed of a student is not the seed of the store
    assert "teacher-logits" in finished.done("teacher-logits", "runs/r").stderr
