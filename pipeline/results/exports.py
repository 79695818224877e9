"""The rows of a student's exports, from the record that each export keeps."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ...data.errors import ColdstillError
from .figures import ModelFigures, Quality, Record, Speed

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from ..recipe.run_folder import StudentFolder

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

    Raises
        ColdstillError: a record is damaged
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

    def moved(key: str, most: float = math.inf) -> float:
        value: float = getattr(student, key) + getattr(theirs, key) - getattr(ours, key)
        return min(most, max(0.0, value))

    loss = moved("loss")
    bits = student.bits_per_byte
    same = ("parameters", "positions", "flops_per_token", "heldout", "weights")
    labels: dict[str, Any] = {"run": student.run} if student.run else {}
    return ModelFigures(
        name=f"{student.name} ({name})",
        role="export",
        of=student.name,
        format=name,
        loss=loss,
        perplexity=math.exp(loss),
        bits_per_byte=bits * loss / student.loss if bits else None,
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
