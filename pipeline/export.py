"""The last step: a finished student written for other runtimes, and the rows that this gives."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .. import __version__
from ..data.claims import claimed
from ..data.errors import ColdstillError
from ..data.files import read_json
from ..data.layout import MANIFEST
from ..data.manifest import read_manifest
from ..data.place import place_at
from .comparison.table import CACHED_BYTES
from .evaluation import heldout_identity
from .students import open_made

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from .run import StudentFolder
    from .work import Work


def export(work: Work, name: str, formats: Sequence[str], output: Path | None = None) -> None:
    """Write a trained student in the formats named, below its folder or `output`.

    Raises
        ColdstillError: no such format or student, it is not trained, or what `export_student` finds
    """
    from ..stages.export import FORMATS
    from ..stages.export.contract import choose
    from ..stages.export.export_student import export_student
    from ..stages.export.job import ExportJob
    from ..stages.export.model_card import Facts

    chosen = choose(formats, FORMATS)
    student = work.run.student(name)
    _expect_trained(work, name)
    heldout = open_made(work.run.heldout, work)
    logits = place_at(work.run.logits)
    job = ExportJob(
        name=name,
        model=student.model,
        facts=Facts(
            version=__version__,
            manifest=read_manifest(logits) if logits.exists(MANIFEST) else None,
            settings=read_json(student.settings),
            evaluation=_read_if_there(student.evaluation),
            teacher=_read_if_there(work.run.teacher_evaluation),
        ),
        formats=chosen,
        folder=student.exports if output is None else output,
        heldout=heldout_identity(heldout.manifest),
    )
    with claimed(student.root / ".exporting") as ours:
        if not ours:
            raise ColdstillError(
                f"{student.root}: another process is exporting this student; wait for it"
            )
        export_student(job, heldout, work.report)


def export_rows(folder: StudentFolder) -> list[dict[str, Any]]:
    """A row of the comparison for each export that lies in a student's folder, with the keys of the
    student's own.

    Raises
        ColdstillError: a record of one is damaged
    """
    trained = _read_if_there(folder.evaluation) or {}
    rows = []
    for path in sorted(folder.exports.glob("*/export.json")):
        record = read_json(path)
        row = record.get("row") if isinstance(record, dict) else None
        if not isinstance(row, dict):
            raise ColdstillError(f"{path}: damaged; delete its folder and run coldstill export")
        rows.append({**row, CACHED_BYTES: trained.get(CACHED_BYTES)})
    return rows


def _expect_trained(work: Work, name: str) -> None:
    names = work.run.student_names
    student = work.run.student(name)
    if name not in names:
        raise ColdstillError(
            f"{work.run.root}: no student '{name}' there (have: {', '.join(names) or 'none'})"
        )
    if not student.model.exists():
        raise ColdstillError(
            f"{student.root}: its training is not finished, so there is nothing to export; finish "
            f"it with coldstill train-student {work.recipe.name} --student {name}"
        )


def _read_if_there(path: Path) -> dict[str, Any] | None:
    found = read_json(path) if path.exists() else None
    return found if isinstance(found, dict) else None
