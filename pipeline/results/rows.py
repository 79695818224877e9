"""The comparison: what every model of a run, or of several, is worth, side by side."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ...data.errors import ColdstillError
from ...data.files import read_json
from ..steps.evaluation import is_older
from ..steps.export import export_rows, stale_exports
from .columns import CACHED_BYTES
from .names import labelled, run_labels, visible

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from ..recipe.run_folder import Run, StudentFolder
    from .columns import Row

_FIGURES = (
    "parameters", "bytes", "loss", "perplexity", "kl", "agreement", "accuracy", "acceptance", "ece",
)  # fmt: skip
"""What every row has; other keys are newer, or not always known."""
_BIN = {"count", "confidence", "accuracy"}
_SPEED = {
    "batch", "first_token_seconds", "prefill_tokens_per_second", "token_seconds",
    "token_seconds_p95", "decode_tokens_per_second",
}  # fmt: skip


def compared_rows(runs: Sequence[Run]) -> list[Row]:
    """A row for each teacher, then one for every evaluated student, the lowest loss first, each
    followed by its exports.

    Raises
        ColdstillError: a run has nothing evaluated yet or is named twice, or figures are damaged
    """
    _expect_each_once(runs)
    teachers: list[Row] = []
    students: list[Row] = []
    exports: dict[str, list[Row]] = {}
    for run, label in zip(runs, run_labels(runs), strict=True):
        names = _evaluated(run)
        teacher = _read(run.teacher_evaluation, "teacher", label)
        if not any(_same_figures(teacher, other) for other in teachers):
            teachers.append(teacher)
        for name in names:
            row = _read(run.student(name).evaluation, name, label)
            if is_older(run.student(name)):
                row["older_than_weights"] = True
            students.append(row)
            exports[row["name"]] = _exports(run.student(name), row)
    if len(teachers) == 1:
        teachers[0]["name"] = "teacher"  # everybody's
    for student in sorted(students, key=lambda row: float(row["loss"])):
        teachers += [student, *exports[student["name"]]]
    return teachers


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
    if not path.exists():
        raise ColdstillError(f"{path}: not there; run coldstill evaluate")
    try:
        row = read_json(path)
    except ColdstillError:
        row = None
    if not isinstance(row, dict) or not _is_whole(row):
        raise ColdstillError(f"{path}: damaged; delete it and run coldstill evaluate")
    role = "teacher" if name == "teacher" else "student"
    label = {"run": run_label} if run_label else {}
    label["name"] = labelled(run_label, visible(name))
    return {**row, **label, "role": role}


def _exports(folder: StudentFolder, student: Row) -> list[Row]:
    """A row for each format that a student was exported to, in the order of formats."""
    if stale := stale_exports(folder, student):
        student["stale_exports"] = stale
    run = {"run": student["run"]} if "run" in student else {}
    rows = [{**row, **run, "role": "export"} for row in export_rows(folder, student)]
    if not all(map(_is_whole, rows)):
        raise ColdstillError(
            f"{folder.exports}: damaged figures; delete the export and run coldstill export"
        )
    return rows


def _is_whole(row: Mapping[str, Any]) -> bool:
    figures = [row.get(key) for key in _FIGURES]
    words = [row.get(key, "") for key in ("machine", "dtype", "runtime")]
    if row.get("role") == "export":
        figures += [row.get(key) for key in ("sample_positions", "kl_from_student")]
    optional = [row.get(key) for key in (CACHED_BYTES, "bits_per_byte", "flops_per_token")]
    bins, speeds = row.get("calibration", []), row.get("generation", [])
    return (
        all(_is_number(value) for value in figures)
        and row["bytes"] >= 0
        and all(isinstance(word, str) for word in words)
        and all(value is None or _is_number(value) for value in optional)
        and isinstance(speeds, list)
        and all(isinstance(s, dict) and s.keys() >= _SPEED for s in speeds)
        and all(_is_number(speed[key]) for speed in speeds for key in _SPEED)
        and all(_is_number(speed.get("memory_bytes") or 0) for speed in speeds)
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
