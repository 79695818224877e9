"""The comparison: what every model of a run, or of several, is worth, side by side."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ...data.errors import ColdstillError
from ...data.files import read_json
from ..export import export_rows
from .names import labelled, run_labels, visible
from .table import CACHED_BYTES, COLUMNS, TOKEN_SECONDS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from ..run import Run, StudentFolder
    from .table import Row

_NEWER = (CACHED_BYTES, TOKEN_SECONDS, "bits_per_byte", "calibration")
"""Keys that figures of older versions lack."""
_BIN = {"count", "confidence", "accuracy"}
_SPEED = {"batch", "token_seconds"}


def compared_rows(runs: Sequence[Run]) -> list[Row]:
    """The same rows, and nothing is written.

    Raises
        ColdstillError: a run has nothing evaluated yet or is named twice, or figures are damaged
    """
    _expect_each_once(runs)
    teachers: list[Row] = []
    students: list[Row] = []
    for run, label in zip(runs, run_labels(runs), strict=True):
        names = _evaluated(run)
        teacher = _read(run.teacher_evaluation, "teacher", label)
        if not any(_same_figures(teacher, other) for other in teachers):
            teachers.append(teacher)
        for name in names:
            students.append(_read(run.student(name).evaluation, name, label))
            students += _exports(run.student(name), label)
    if len(teachers) == 1:
        teachers[0]["name"] = "teacher"  # everybody's
    return [*teachers, *sorted(students, key=lambda row: float(row["loss"]))]


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


def _read(path: Path, name: str, run_label: str) -> Row:
    """A row from its file; raises ColdstillError if a figure is missing or is no number."""
    row = read_json(path)
    if not isinstance(row, dict) or not _is_whole(row):
        raise ColdstillError(f"{path}: damaged; delete it and run coldstill evaluate")
    role = "teacher" if name == "teacher" else "student"
    label = {"run": run_label} if run_label else {}
    label["name"] = labelled(run_label, visible(name))
    return {**row, **label, "role": role, TOKEN_SECONDS: _alone(row)}


def _exports(folder: StudentFolder, run_label: str) -> list[Row]:
    """A row for each format that a student was exported to."""
    rows = []
    for row in export_rows(folder):
        if not _is_whole(row):
            raise ColdstillError(
                f"{folder.exports}: damaged figures; delete the export and run coldstill export"
            )
        name = labelled(run_label, visible(str(row["name"])))
        run = {"run": run_label} if run_label else {}
        rows.append({**row, **run, "name": name, "role": "export", TOKEN_SECONDS: _alone(row)})
    return rows


def _alone(row: Mapping[str, Any]) -> float | None:
    """Seconds a token where one text is written at a time."""
    speeds = row.get("generation") or ()
    return next((float(s["token_seconds"]) for s in speeds if s["batch"] == 1), None)


def _is_whole(row: Mapping[str, Any]) -> bool:
    figures = [row.get(key) for key, _ in COLUMNS if key not in ("name", *_NEWER)]
    optional = [row.get(key) for key in (CACHED_BYTES, "bits_per_byte", "flops_per_token")]
    bins, speeds = row.get("calibration", []), row.get("generation", [])
    return (
        all(_is_number(value) for value in figures)
        and all(value is None or _is_number(value) for value in optional)
        and isinstance(speeds, list)
        and all(isinstance(s, dict) and s.keys() >= _SPEED for s in speeds)
        and all(_is_number(speed[key]) for speed in speeds for key in _SPEED)
        and isinstance(bins, list)
        and all(isinstance(one, dict) and one.keys() >= _BIN for one in bins)
        and all(one[key] is None or _is_number(one[key]) for one in bins for key in _BIN)
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _same_figures(teacher: Row, other: Row) -> bool:
    """Whether two runs have one teacher evaluation: of one held-out store, speed may differ."""
    keys = ("heldout", "parameters", "loss", "accuracy")
    return all(teacher.get(key) == other.get(key) for key in keys)
