"""The record of a run: its recipe as written and as understood, with every student it has."""

from __future__ import annotations

import json
import shutil
import threading
from typing import TYPE_CHECKING, Any

import pytest
from coldstill.data.places.claims import claimed
from coldstill.pipeline.recipe.reading import load_recipe
from coldstill.pipeline.recipe.run_folder import open_run, record_recipe

if TYPE_CHECKING:
    from desk import Desk

pytest_plugins = ("desk",)

STUDENT = ("train-student", "r.toml")


def resolved(desk: Desk) -> dict[str, Any]:
    recipe: dict[str, Any] = desk.json("recipe.resolved.json")["recipe"]
    return recipe


def variant(desk: Desk, name: str, *settings: str) -> None:
    options = [part for setting in settings for part in ("--set", setting)]
    desk.done(*STUDENT, "--student", name, *options)


def test_students_of_earlier_commands_stay_in_the_record(finished: Desk) -> None:
    variant(finished, "a", "students.small.train.steps=1")
    variant(finished, "b", "students.small.objective.cross_entropy=0.5")
    students = resolved(finished)["students"]
    assert students.keys() == {"small", "baseline", "a", "b"}
    assert students["a"]["train"]["steps"] == 1
    assert students["b"]["objective"]["cross_entropy"] == 0.5
    assert (finished.run / "recipe.toml").read_bytes() == (finished.root / "r.toml").read_bytes()
    loaded = load_recipe(str(finished.run)).recipe
    for name in ("small", "baseline", "a", "b"):
        made = finished.json("students", name, "student.json")["student"]
        beside = {"like", "teachers", "trust_remote_code"}  # not part of what it learns
        table = loaded.student(name).model_dump(mode="json", exclude=beside)
        assert table | {"train": table["train"] | {"seed": 0}} == made


def test_a_student_edited_in_the_recipe_stays_as_it_was_trained(finished: Desk) -> None:
    finished.edit("steps = 3", "steps = 4")
    finished.refused(*STUDENT, "--student", "small")
    variant(finished, "a", "students.small.train.log_every=2")
    students = resolved(finished)["students"]
    assert students["small"]["train"]["steps"] == 3
    assert students["a"]["train"]["steps"] == 4
    assert "steps = 4" in (finished.run / "recipe.toml").read_text()
    finished.done("train-student", "runs/r", "--all")


def test_a_student_of_another_seed_has_it_in_the_record_and_the_run_keeps_its_own(
    finished: Desk,
) -> None:
    variant(finished, "a", "students.small.train.steps=1", "seed=5")
    recipe = resolved(finished)
    assert recipe["seed"] == 0
    assert recipe["students"]["a"]["train"]["seed"] == 5
    assert recipe["students"]["small"]["train"]["seed"] is None
    finished.done("train-student", "runs/r", "--student", "a")
    finished.done(*STUDENT, "--student", "a", "--set", "students.small.train.steps=1",
                  "--set", "students.small.train.seed=5")  # fmt: skip
    line = finished.refused(*STUDENT, "--student", "a", "--set", "students.small.train.steps=1")
    assert "students.a was trained with seed = 5, now 0; " in line


def test_older_records_of_students_are_read(finished: Desk) -> None:
    path = finished.run / "students" / "small" / "student.json"
    record = json.loads(path.read_text())
    record["student"]["train"]["seed"] = None
    del record["student"]["train"]["compile"]
    path.write_text(json.dumps(record))
    assert "already trained" in finished.done(*STUDENT, "--student", "small").stderr
    variant(finished, "a", "students.baseline.train.steps=1")
    assert resolved(finished)["students"]["small"]["train"]["seed"] is None


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"student": {"stepps": 1}, "seed": 0}'])
def test_an_invalid_record_of_a_student_is_ignored(finished: Desk, content: str) -> None:
    before = resolved(finished)["students"]["small"]
    for name in ("small", "strange (copy)", "unknown"):
        folder = finished.run / "students" / name
        folder.mkdir(exist_ok=True)
        (folder / "student.json").write_text(content)
    shutil.copy(
        finished.run / "students" / "baseline" / "student.json",
        finished.run / "students" / "strange (copy)",
    )
    variant(finished, "a", "students.baseline.train.steps=1")
    students = resolved(finished)["students"]
    assert students.keys() == {"small", "baseline", "a"}
    assert students["small"] == before
    finished.done("plan", "runs/r")


def test_records_are_written_one_after_the_other(finished: Desk) -> None:
    loaded = load_recipe(str(finished.root / "r.toml"))
    run = open_run(finished.root / "runs", "r", loaded)
    other = threading.Thread(target=record_recipe, args=(run, loaded))
    with claimed(run.recording) as ours:
        assert ours
        other.start()
        other.join(0.2)
        assert other.is_alive()
        run.student("late").root.mkdir()
        shutil.copy(run.student("small").settings, run.student("late").settings)
    other.join(30)
    assert "late" in resolved(finished)["students"]
    assert not run.recording.exists()
