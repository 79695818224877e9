"""The steps of a run as functions: what the command line calls, and what programs can call.

A result that exists already is kept, so every function can be called again. All of them raise
`coldstill.ColdstillError` for anything that the user can correct, with a message of one line.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ...data.errors import ColdstillError
from ...stages.report import silent
from ..quiet import quiet
from ..recipe.work import open_work

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ...stages.export.record import ExportRecord
    from ...stages.report import Reporter
    from ..recipe.work import Work
    from ..results.figures import ModelFigures
    from .pruning import Cut


@dataclass(frozen=True, slots=True, kw_only=True)
class Stores:
    """The two stores of a run: folders, or addresses such as s3://bucket/store."""

    logits: str | Path
    """Store that students are trained from."""
    heldout: str | Path
    """Store that students are evaluated on."""


def run(
    recipe: str | Path,
    *,
    settings: Sequence[str] = (),
    runs: str | Path = "runs",
    report: Reporter | None = None,
) -> list[ModelFigures]:
    """Run a whole recipe: teacher, logits, students with their rounds, evaluation and comparison.

    Finished steps are kept, so the function can be called again.

    recipe    name of a built-in recipe, TOML file, or folder of a run
    settings  overrides such as "seed=3" or "students.small.train.steps=500"; values are TOML
    runs      folder that holds the runs
    report    called with every progress report; if None, nothing is printed

    Returns the rows of the comparison: the teacher first, then the students by held-out loss, the
    lowest first. Losses and divergences are in nats per position.

    Raises
        ColdstillError: the recipe or its corpus is wrong, or a step fails; before the first step,
            settings of later steps are checked too
    """
    from ..planning.checks import (
        expect_holding_formats,
        expect_packable_students,
        expect_trainable,
        expect_usable_students,
    )
    from ..planning.teachable import expect_teachable_students
    from . import capture, evaluation, rounds, students, teacher
    from .evaluation import compare_runs

    with _work(recipe, settings, runs, report) as work:
        expect_trainable(work.recipe, work.recipe.students, teacher=True)
        expect_packable_students(work)
        expect_holding_formats(work)
        expect_usable_students(work)
        expect_teachable_students(work)
        teacher.train_teacher(work)
        capture.teacher_logits(work)
        students.train_students(work, ())
        rounds.finish_rounds(work)
        evaluation.evaluate(work, ())
        return compare_runs([work.run], None, work.report)


def train_teacher(
    recipe: str | Path,
    *,
    settings: Sequence[str] = (),
    runs: str | Path = "runs",
    report: Reporter | None = None,
) -> str:
    """Train or correct the teacher if the recipe asks for it.

    `recipe`, `settings`, `runs` and `report` are those of `coldstill.run`.

    Returns the teacher: its folder, or the hub name of an existing model.

    Raises
        ColdstillError: it was trained with other settings, or the training cannot start
        StoppedError: the process received SIGTERM; a checkpoint is saved
    """
    from .teacher import train_teacher as step

    with _work(recipe, settings, runs, report) as work:
        step(work)
        return work.teacher_model


def teacher_logits(
    recipe: str | Path,
    *,
    settings: Sequence[str] = (),
    runs: str | Path = "runs",
    report: Reporter | None = None,
    other_engine: bool = False,
) -> Stores:
    """Stage one: run the teacher over the corpus and store its logits; trains it first if needed.

    `recipe`, `settings`, `runs` and `report` are those of `coldstill.run`. With `other_engine`,
    stores that another engine of the teacher began are continued.

    Returns the two stores, of the training split and of the held-out split.

    Raises
        ColdstillError: the teacher or the corpus cannot be read, or a store was made with other
            settings
        StoppedError: the process received SIGTERM; finished shards are kept
    """
    from .capture import teacher_logits as step

    with _work(recipe, settings, runs, report) as work:
        step(work, other_engine=other_engine)
        return Stores(logits=work.run.logits, heldout=work.run.heldout)


def prune_students(
    recipe: str | Path,
    *,
    students: Sequence[str] = (),
    settings: Sequence[str] = (),
    runs: str | Path = "runs",
    report: Reporter | None = None,
) -> dict[str, tuple[Cut, ...]]:
    """Cut students out of the teacher; `train_students` trains them, and cuts them if needed.

    students  names; all that the recipe prunes if empty

    `recipe`, `settings`, `runs` and `report` are those of `coldstill.run`.

    Returns the cuts of each student, the first cut first.

    Raises
        ColdstillError: a student has no `prune`, its sizes do not fit the teacher, or the store
            or the teacher is missing
    """
    from .pruning import prune_students as step

    with _work(recipe, settings, runs, report, _variant(students)) as work:
        return step(work, students)


def train_students(
    recipe: str | Path,
    *,
    students: Sequence[str] = (),
    settings: Sequence[str] = (),
    runs: str | Path = "runs",
    report: Reporter | None = None,
) -> dict[str, Path]:
    """Stage two: train students from the store, without the teacher.

    students  names; all students of the recipe if empty. A single unknown name makes a variant of
              the one student that `settings` change.

    `recipe`, `settings`, `runs` and `report` are those of `coldstill.run`.

    A student with rounds makes the trainings that are due; its model exists after the last one.

    Returns the folder of each student's model.

    Raises
        ColdstillError: no store, an unknown student, or a student trained with other settings
        DivergedError: a loss or gradient is NaN or infinite
        StoppedError: the process received SIGTERM; a checkpoint is saved
    """
    from .students import train_students as step

    with _work(recipe, settings, runs, report, _variant(students)) as work:
        step(work, students)
        return {name: work.run.student(name).model for name in students or work.recipe.students}


def evaluate(
    recipe: str | Path,
    *,
    students: Sequence[str] = (),
    settings: Sequence[str] = (),
    runs: str | Path = "runs",
    report: Reporter | None = None,
) -> dict[str, Path]:
    """Measure trained students on held-out documents, without the teacher.

    students  names; all trained students if empty

    `recipe`, `settings`, `runs` and `report` are those of `coldstill.run`.

    Returns the file with the figures of each student.

    Raises
        ColdstillError: a student is not trained, or the held-out store is missing
    """
    from .evaluation import evaluate as step

    _expect_list("students", students)
    with _work(recipe, settings, runs, report) as work:
        step(work, students)
        measured = [
            name for name in work.run.student_names if work.run.student(name).model.exists()
        ]
        return {name: work.run.student(name).evaluation for name in students or measured}


def compare(
    recipe: str | Path,
    *others: str | Path,
    page: str | Path | None = None,
    settings: Sequence[str] = (),
    runs: str | Path = "runs",
    report: Reporter | None = None,
) -> list[ModelFigures]:
    """Compare all models of one run or of several.

    The comparison of a single run is also written into its folder as JSON, Markdown and HTML.

    others  further recipes or runs; `settings` is for a single run only
    page    HTML file to write

    `recipe`, `settings`, `runs` and `report` are those of `coldstill.run`.

    Returns a row of figures for each model: teachers first, then students by held-out loss in nats.

    Raises
        ColdstillError: nothing is evaluated yet, a record is damaged, or `page` is a folder
    """
    from .evaluation import compare_runs

    _expect_list("settings", settings)
    works = [open_work(one, settings, runs, report or silent) for one in (recipe, *others)]
    file = None if page is None else Path(page)
    return compare_runs([work.run for work in works], file, report or silent)


def export(
    recipe: str | Path,
    student: str,
    formats: Sequence[str],
    *,
    output: str | Path | None = None,
    settings: Sequence[str] = (),
    runs: str | Path = "runs",
    report: Reporter | None = None,
) -> list[ExportRecord]:
    """Write a trained student in other formats and check each export against the student.

    formats  names of `coldstill.stages.export.FORMATS`, such as "hf" or "onnx"
    output   folder for the exports; the student's own folder if None

    `recipe`, `settings`, `runs` and `report` are those of `coldstill.run`.

    Returns the record of each export, the content of its `export.json`.

    Raises
        ColdstillError: unknown format, the student is not trained, or an export failed
    """
    from .export import export as step

    _expect_list("formats", formats)
    with _work(recipe, settings, runs, report) as work:
        return step(work, student, formats, None if output is None else Path(output))


@contextlib.contextmanager
def _work(
    recipe: str | Path,
    settings: Sequence[str],
    runs: str | Path,
    report: Reporter | None,
    student: str | None = None,
) -> Iterator[Work]:
    _expect_list("settings", settings)
    work = open_work(recipe, settings, runs, report or silent, student)
    with quiet():
        yield work


def _variant(students: Sequence[str]) -> str | None:
    _expect_list("students", students)
    return students[0] if len(students) == 1 else None


def _expect_list(name: str, value: Sequence[str]) -> None:
    """Raise ColdstillError for a string, whose letters would count as the entries."""
    if isinstance(value, str):
        raise ColdstillError(f"{name} = {value!r}: expected a list of strings, such as [{value!r}]")
