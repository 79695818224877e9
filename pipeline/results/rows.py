"""The comparison: the figures of every model of one run or of several, in their order."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ...data.errors import ColdstillError
from ...stages.models.model_files import weight_files_in
from .figures import REMEASURE, ModelFigures, Quality, Record, Speed

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from ..recipe.run_folder import Run, StudentFolder


def run_labels(runs: Sequence[Run]) -> list[str]:
    """Labels before the names of models: empty for one run, otherwise the shortest ends of the
    folders that differ."""
    if len(runs) == 1:
        return [""]
    paths = [run.root.resolve().parts for run in runs]
    for length in range(1, max(map(len, paths)) + 1):
        ends = ["/".join(parts[-length:]) for parts in paths]
        if len(set(ends)) == len(ends):
            break
    return [visible(end) for end in ends]


def labelled(run_label: str, name: str) -> str:
    """Name of a model in every output."""
    return f"{run_label}/{name}" if run_label else name


def visible(text: str) -> str:
    """A name without control characters, so that it cannot move a terminal's cursor."""
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in text)


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
    ordered = sorted(students, key=lambda pair: pair[0].own_loss)
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
        raise ColdstillError(f"{path}: does not exist; run coldstill evaluate")
    figures = ModelFigures.read(path, REMEASURE)
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


_REMEDY = "delete its folder and run coldstill export"


class _Measured(Quality):
    positions: int


class _Sample(Record):
    """The student and its export on the same held-out sample."""

    student: _Measured
    export: _Measured


class _Costs(Record):
    bytes: int
    dtype: str
    generation: tuple[Speed, ...]
    machine: str
    runtime: str


class _Check(Record):
    kl: float


class _Student(Record):
    fingerprint: str | None = None


class _Made(Record):
    """The part of a record that names the weights an export was made from."""

    student: _Student = _Student()


class _Checked(Record):
    """The part of a record that holds figures."""

    sample: _Sample
    check: _Check
    costs: _Costs


def export_rows(folder: StudentFolder, student: ModelFigures) -> list[ModelFigures]:
    """A row for each export of the weights that the student's figures are of.

    Quality is the student's on the whole held-out store plus the difference between both on the
    sample that the export was checked on, so that the sample's own noise does not matter.
    """
    rows = []
    for name, path in _records(folder):
        if _Made.read(path, _REMEDY).student.fingerprint == student.weights:
            record = _Checked.read(path, _REMEDY)
            try:
                rows.append(_row(name, record, student))
            except (ValueError, OverflowError) as error:
                raise ColdstillError(f"{path}: damaged; {_REMEDY}") from error
    return rows


def stale_exports(folder: StudentFolder, student: ModelFigures) -> tuple[str, ...]:
    """Formats of exports that were made from other weights: these have no row."""
    return tuple(
        name
        for name, path in _records(folder)
        if _Made.read(path, _REMEDY).student.fingerprint != student.weights
    )


def _records(folder: StudentFolder) -> Iterator[tuple[str, Path]]:
    """Format and record of each finished export."""
    from ...stages.export import FORMATS
    from ...stages.export.contract import RECORD

    for name in FORMATS:
        path = folder.exports / name / RECORD
        if path.exists():
            yield name, path


def _row(name: str, record: _Checked, student: ModelFigures) -> ModelFigures:
    ours, theirs = record.sample.student, record.sample.export

    def moved(key: str, most: float = math.inf) -> Any:
        values = getattr(student, key), getattr(theirs, key), getattr(ours, key)
        if None in values:
            return None
        return min(most, max(0.0, values[0] + values[1] - values[2]))

    loss: float = moved("loss")
    bits = student.bits_per_byte
    same = ("parameters", "positions", "flops_per_token", "heldout", "weights", "caveats")
    labels: dict[str, Any] = {"run": student.run} if student.run else {}
    return ModelFigures(
        name=f"{student.name} ({name})",
        role="export",
        of=student.name,
        format=name,
        loss=loss,
        perplexity=math.exp(loss),
        bits_per_byte=bits * loss / student.own_loss if bits else None,
        kl=moved("kl"),
        agreement=moved("agreement", 1.0),
        accuracy=moved("accuracy", 1.0),
        acceptance=moved("acceptance", 1.0),
        ece=moved("ece", 1.0),
        calibration=theirs.calibration,
        cached_bytes_per_position=student.cached_bytes_per_position,
        sample_positions=theirs.positions,
        kl_from_student=record.check.kl,
        **{key: getattr(student, key) for key in same},
        **{key: getattr(record.costs, key) for key in type(record.costs).model_fields},
        **labels,
    )
