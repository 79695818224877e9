"""The last step: a finished student written for other runtimes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ... import __version__
from ...data.errors import ColdstillError
from ...data.files import read_json
from ...data.places.claims import claimed
from ...data.places.place import place_at
from ...data.store.layout import MANIFEST
from ...data.store.manifest import read_manifest
from ..results.figures import REMEASURE, ModelFigures
from .evaluation import evaluate, heldout_identity, is_evaluated
from .retokenize import trained_store
from .students import open_made

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ...stages.export.record import ExportRecord
    from ..recipe.work import Work


def export(
    work: Work, name: str, formats: Sequence[str], output: Path | None = None
) -> list[ExportRecord]:
    """Export a trained student in the named formats below its folder or `output`."""
    from ...stages.export import FORMATS
    from ...stages.export.contract import chosen_formats
    from ...stages.export.export_student import ExportJob, export_student
    from ...stages.export.model_card import Facts

    chosen = chosen_formats(formats, FORMATS)
    student = work.run.student(name)
    _expect_trained(work, name)
    heldout = trained_store(work, name, open_made(work.run.heldout, work), "heldout")
    if not is_evaluated(student, heldout_identity(heldout.manifest)):
        evaluate(work, [name])  # for the model card
    logits = place_at(work.run.logits)
    job = ExportJob(
        name=name,
        model=student.model,
        facts=Facts(
            version=__version__,
            manifest=read_manifest(logits) if logits.exists(MANIFEST) else None,
            heldout=heldout.manifest,
            settings=read_json(student.settings),
            evaluation=_figures(student.evaluation),
            teacher=_figures(work.run.teacher_evaluation),
        ),
        formats=chosen,
        folder=student.exports if output is None else output,
        heldout=heldout_identity(heldout.manifest),
        own_code=work.recipe.trusts(name),
    )
    # removes the folders that it made if they stay empty
    with claimed(job.folder / ".exporting") as ours:
        if not ours:
            raise ColdstillError(f"{job.folder}: another process is exporting to it; wait for it")
        return export_student(job, heldout, work.report)


def _expect_trained(work: Work, name: str) -> None:
    names = work.run.student_names
    student = work.run.student(name)
    if name not in names and not student.root.is_dir():
        raise ColdstillError(
            f"{work.run.root}: no student '{name}' (have: {', '.join(names) or 'none'})"
        )
    if not student.model.exists():
        raise ColdstillError(
            f"{student.root}: not trained to its end, so there is nothing to export; run coldstill "
            f"train-student {work.named} --student {name}"
        )


def _figures(evaluation: Path) -> dict[str, Any] | None:
    if not evaluation.exists():
        return None
    return ModelFigures.read(evaluation, REMEASURE).to_json()
