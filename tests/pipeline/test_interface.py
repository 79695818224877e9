"""The steps as functions: what they return, and that they print nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import coldstill
import pytest
from coldstill.data.errors import ColdstillError
from coldstill.pipeline.steps import interface
from transformers.utils import logging

if TYPE_CHECKING:
    from coldstill.stages.report import Report
    from desk import Desk

pytest_plugins = ("desk",)

EXAMPLE = Path(coldstill.__file__).parent / "pipeline" / "examples" / "run_a_recipe.py"


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


def test_commands_print_the_next_command_with_the_same_options(finished: Desk) -> None:
    shorter = ("--set", "students.small.train.steps=1", "--student", "new")
    result = finished.done("train-student", "r.toml", *shorter)
    following = "coldstill evaluate r.toml --set students.small.train.steps=1 --student new"
    assert result.stderr.splitlines()[-1] == f"next: {following}"
    result = finished.done("compare", "r.toml", "--runs", "runs/.")
    assert result.stderr.splitlines()[-1] == "next: coldstill report r.toml --runs runs/."
    assert "next: " not in finished.done("compare", "r.toml", "--json").output
