"""The comparison: the figures of every model of one run or of several, in their order."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...data.errors import ColdstillError
from ...stages.models.model_files import weight_files_in
from .exports import export_rows, stale_exports
from .figures import ModelFigures
from .names import labelled, run_labels, visible

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ..recipe.run_folder import Run, StudentFolder


def compared_rows(runs: Sequence[Run]) -> list[ModelFigures]:
    """A row for each teacher, then one for each evaluated student, the lowest loss first, each
    followed by its exports.

    Raises
        ColdstillError: a run has nothing evaluated yet or is named twice, or figures are damaged
    """
    _expect_each_once(runs)
    teachers: list[ModelFigures] = []
    students: list[tuple[ModelFigures, list[ModelFigures]]] = []
    for run, label in zip(runs, run_labels(runs), strict=True):
        names = _evaluated(run)
        teacher = _read(run.teacher_evaluation, "teacher", label)
        if not any(_same_teacher(teacher, other) for other in teachers):
            teachers.append(teacher)
        students += [_student(run.student(name), name, label) for name in names]
    if len(teachers) == 1:  # one teacher of all runs needs no run before its name
        teachers = [teachers[0].model_copy(update={"name": "teacher"})]
    ordered = sorted(students, key=lambda pair: pair[0].loss)
    return [*teachers, *(row for student, exports in ordered for row in (student, *exports))]


def _expect_each_once(runs: Sequence[Run]) -> None:
    seen: dict[Path, Path] = {}
    for run in runs:
        where = run.root.resolve()
        if where in seen:
            also = "" if seen[where] == run.root else f", also as {seen[where]}"
            raise ColdstillError(f"{run.root}: named twice{also}; name every run once")
        seen[where] = run.root


def _evaluated(run: Run) -> list[str]:
    names = [name for name in run.student_names if run.student(name).evaluation.exists()]
    if not names:
        raise ColdstillError(f"{run.root}: no student is evaluated yet; run coldstill evaluate")
    return names


def _read(path: Path, name: str, label: str) -> ModelFigures:
    if not path.exists():
        raise ColdstillError(f"{path}: not there; run coldstill evaluate")
    figures = ModelFigures.read(path, "delete it and run coldstill evaluate")
    role = "teacher" if name == "teacher" else "student"
    run = {"run": label} if label else {}
    return figures.model_copy(update={"name": labelled(label, visible(name)), "role": role, **run})


def _student(
    folder: StudentFolder, name: str, label: str
) -> tuple[ModelFigures, list[ModelFigures]]:
    row = _read(folder.evaluation, name, label)
    exports = export_rows(folder, row)
    marks: dict[str, object] = {"older_than_weights": True} if is_older(folder) else {}
    if stale := stale_exports(folder, row):
        marks["stale_exports"] = stale
    return row.model_copy(update=marks), exports


def is_older(folder: StudentFolder) -> bool:
    """Whether a student's weight files are newer than its figures, by the times of the files."""
    if not folder.evaluation.exists():
        return False
    measured = folder.evaluation.stat().st_mtime_ns
    return any(path.stat().st_mtime_ns > measured for path in weight_files_in(folder.model))


def _same_teacher(teacher: ModelFigures, other: ModelFigures) -> bool:
    """Whether two runs share one teacher evaluation; its speed may differ."""
    keys = ("heldout", "parameters", "loss", "accuracy")
    return all(getattr(teacher, key) == getattr(other, key) for key in keys)
