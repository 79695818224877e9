"""The run folder: its places and its records, and the steps as functions."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import coldstill
import coldstill.pipeline.recipe.run_folder
import pytest
from coldstill.data.errors import ColdstillError
from coldstill.data.places.claims import claimed
from coldstill.pipeline.recipe.reading import load_recipe
from coldstill.pipeline.recipe.run_folder import Run, open_run, record_recipe
from coldstill.pipeline.steps import interface
from transformers.utils import logging

if TYPE_CHECKING:
    from coldstill.stages.report import Report
    from desk import Desk

pytest_plugins = ("desk",)


def test_every_place_lies_inside_the_run(tmp_path: Path) -> None:
    run = open_run(tmp_path, "r")
    places = [getattr(run, name) for name in dir(Run) if not name.startswith("_")]
    # beside it, because it is there before the run is
    paths = [p for p in places if isinstance(p, Path) and p != run.preparing]
    assert run.preparing == tmp_path / ".r.preparing"
    assert len(paths) >= 9
    assert all(path.is_relative_to(tmp_path / "r") for path in paths)
    assert run.student("s").model == tmp_path / "r" / "students" / "s" / "model"
    assert not run.root.exists(), "naming a run must not make it"


@pytest.mark.slow
def test_the_recipe_and_the_environment_are_recorded(finished: Desk) -> None:
    assert (finished.run / "recipe.toml").read_bytes() == (finished.root / "r.toml").read_bytes()
    stored = finished.json("recipe.resolved.json")
    loaded = load_recipe(str(finished.root / "r.toml"))
    assert stored["recipe"] == json.loads(loaded.recipe.model_dump_json())
    assert Path(stored["base"]).is_absolute()
    machine = finished.json("env.json")
    assert machine["torch"] == version("torch")
    assert machine["coldstill"] == coldstill.__version__
    assert {"python", "platform", "transformers", "pyarrow", "numpy", "tokenizers"} <= set(machine)


def test_only_begun_students_are_named_in_order(tmp_path: Path) -> None:
    run = open_run(tmp_path, "r")
    assert run.student_names == []
    for name in ("b", "a", "empty"):
        run.student(name).root.mkdir(parents=True)
    for name in ("b", "a"):
        run.student(name).settings.write_text("{}", encoding="utf-8")
    assert run.student_names == ["a", "b"]


def test_a_run_inside_a_source_room_is_refused(tmp_path: Path) -> None:
    source = Path(coldstill.pipeline.recipe.run_folder.__file__).resolve().parents[2]
    for room in ("pipeline", "stages", "data", "tests"):
        (tmp_path / room).symlink_to(source / room)
        for runs, name in ((source / room, "r"), (tmp_path / room, "r"), (source, room)):
            with pytest.raises(ColdstillError, match=rf"own source \({room}/\); choose another"):
                open_run(runs, name)
        assert open_run(source / "runs", room).root == source / "runs" / room


STUDENT = ("train-student", "r.toml")


def resolved(desk: Desk) -> dict[str, Any]:
    recipe: dict[str, Any] = desk.json("recipe.resolved.json")["recipe"]
    return recipe


def variant(desk: Desk, name: str, *settings: str) -> None:
    options = [part for setting in settings for part in ("--set", setting)]
    desk.done(*STUDENT, "--student", name, *options)


@pytest.mark.slow
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
        beside = {"like", "teachers", "trust_remote_code", "rounds"}  # not part of what it learns
        table = loaded.student(name).model_dump(mode="json", exclude=beside)
        assert table | {"train": table["train"] | {"seed": 0}} == made


@pytest.mark.slow
def test_an_edited_student_and_an_older_record_stay_as_they_were_trained(finished: Desk) -> None:
    path = finished.run / "students" / "small" / "student.json"
    record = json.loads(path.read_text())
    record["student"]["train"]["seed"] = None
    del record["student"]["train"]["compile"]
    path.write_text(json.dumps(record))
    assert "already trained" in finished.done(*STUDENT, "--student", "small").stderr
    finished.edit("steps = 3", "steps = 4")
    finished.refused(*STUDENT, "--student", "small")
    variant(finished, "a", "students.small.train.log_every=2")
    students = resolved(finished)["students"]
    assert students["small"]["train"]["seed"] is None
    assert students["small"]["train"]["steps"] == 3
    assert students["a"]["train"]["steps"] == 4
    assert "steps = 4" in (finished.run / "recipe.toml").read_text()
    finished.done("train-student", "runs/r", "--all")


@pytest.mark.slow
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


@pytest.mark.slow
def test_an_invalid_record_of_a_student_is_ignored(finished: Desk) -> None:
    before = resolved(finished)["students"]["small"]
    folders = [finished.run / "students" / name for name in ("small", "strange (copy)", "unknown")]
    for number, content in enumerate(("", "[]", "{}", '{"student": {"stepps": 1}, "seed": 0}')):
        for folder in folders:
            folder.mkdir(exist_ok=True)
            (folder / "student.json").write_text(content)
        shutil.copy(finished.run / "students" / "baseline" / "student.json", folders[1])
        variant(finished, f"a{number}", "students.baseline.train.steps=1")
    students = resolved(finished)["students"]
    assert students.keys() == {"small", "baseline", "a0", "a1", "a2", "a3"}
    assert students["small"] == before
    finished.done("plan", "runs/r")


@pytest.mark.slow
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


EXAMPLE = Path(coldstill.__file__).parent / "pipeline" / "examples" / "run_a_recipe.py"


@pytest.mark.slow
def test_the_example_runs_a_recipe_from_its_first_step(desk: Desk) -> None:
    settings = ("students.small.train.steps=2", "evaluation.sequences=4", "logits.sequences=8")
    result = subprocess.run(
        [sys.executable, str(EXAMPLE), "r.toml", "out", *settings],
        cwd=desk.root,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert "8 sequences of model" in lines
    losses = {
        line.partition(":")[0]: float(line.split("held-out loss ")[1].split()[0])
        for line in lines
        if "held-out loss " in line
    }
    assert losses.keys() == {"small", "baseline"}
    ranked = ["teacher", *sorted(losses, key=losses.__getitem__)]
    assert [line.partition(":")[0] for line in lines[-3:]] == ranked
    assert f"model in {Path('out') / 'r' / 'students' / 'small' / 'model'}" in result.stdout


@pytest.mark.slow
def test_steps_return_paths_and_results_and_print_nothing(
    finished: Desk, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe, runs = finished.root / "r.toml", finished.root / "runs"
    run = runs / "r"
    logging.enable_progress_bar()
    before = logging.get_verbosity()
    reports: list[Report] = []
    stores = interface.teacher_logits(recipe, runs=runs, report=reports.append)
    assert stores == interface.Stores(logits=run / "logits", heldout=run / "heldout")
    assert [report.note for report in reports if "complete" in report.note]
    assert interface.train_teacher(recipe, runs=runs) == str(finished.root / "teacher")
    students = {name: run / "students" / name for name in ("small", "baseline")}
    models = interface.train_students(recipe, runs=runs)
    assert models == {name: folder / "model" for name, folder in students.items()}
    figures = interface.evaluate(recipe, students=["small"], runs=runs)
    assert figures == {"small": students["small"] / "evaluation.json"}
    page = finished.root / "page.html"
    rows = interface.compare(recipe, runs=runs, page=page)
    assert {row.name for row in rows} == {"teacher", *students}
    assert page.is_file()
    assert interface.run(recipe, runs=runs) == interface.compare(run, runs=runs)
    variant = ["students.small.train.steps=1"]
    made = interface.train_students(recipe, students=["new"], settings=variant, runs=runs)
    assert made == {"new": run / "students" / "new" / "model"}
    assert made["new"].is_dir()
    with pytest.raises(ColdstillError, match="has no 'prune'"):
        interface.prune_students(recipe, students=["small"], runs=runs)
    with pytest.raises(ColdstillError, match="nowhere: no recipe file"):
        interface.export("nowhere", "small", ["hf"], runs=runs)
    assert logging.is_progress_bar_enabled()
    assert logging.get_verbosity() == before
    logging.disable_progress_bar()
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_commands_print_the_next_command_with_the_same_options(finished: Desk) -> None:
    shorter = ("--set", "students.small.train.steps=1", "--student", "new")
    result = finished.done("train-student", "r.toml", *shorter)
    following = "coldstill evaluate r.toml --set students.small.train.steps=1 --student new"
    assert result.stderr.splitlines()[-1] == f"next: {following}"
    result = finished.done("compare", "r.toml", "--runs", "runs/.")
    assert result.stderr.splitlines()[-1] == "next: coldstill report r.toml --runs runs/."
    assert "next: " not in finished.done("compare", "r.toml", "--json").output
