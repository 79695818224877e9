"""Exports trained students, and reads the records of exports."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ... import __version__
from ...data.errors import ColdstillError
from ...data.files import read_json
from ...data.places.claims import claimed
from ...data.places.opening import place_at
from ...data.store.layout import MANIFEST
from ...data.store.manifest import read_manifest
from ..results.columns import CACHED_BYTES
from .evaluation import evaluate, heldout_identity, is_evaluated
from .students import open_made

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from ...stages.export.record import ExportRecord
    from ..recipe.run_folder import StudentFolder
    from .work import Work

_COSTS = ("bytes", "dtype", "generation", "machine", "runtime")


def export(
    work: Work, name: str, formats: Sequence[str], output: Path | None = None
) -> list[ExportRecord]:
    """Export a trained student in the named formats below its folder or `output`.

    Raises
        ColdstillError: the format or the student does not exist, the student is not trained, or
            `export_student` fails
    """
    from ...stages.export import FORMATS
    from ...stages.export.contract import choose
    from ...stages.export.export_student import ExportJob, export_student
    from ...stages.export.model_card import Facts

    chosen = choose(formats, FORMATS)
    student = work.run.student(name)
    _expect_trained(work, name)
    heldout = open_made(work.run.heldout, work)
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
            evaluation=_read_if_there(student.evaluation),
            teacher=_read_if_there(work.run.teacher_evaluation),
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


def export_rows(folder: StudentFolder, trained: dict[str, Any]) -> list[dict[str, Any]]:
    """A row of the comparison for each export that lies in a student's folder.

    Quality is the student's on the whole held-out store, plus the difference between both on the
    sample that the export was checked on: a small difference is not lost in the sample's own noise.

    trained  the student's own row

    Raises
        ColdstillError: a record of one is damaged
    """
    rows = []
    for name, path, record in _records(folder):
        if _weights(record) != trained.get("weights"):
            continue
        try:
            rows.append(_row(name, record, trained))
        except (LookupError, TypeError, ValueError, OverflowError) as error:
            raise ColdstillError(
                f"{path}: damaged; delete its folder and run coldstill export"
            ) from error
    return rows


def stale_exports(folder: StudentFolder, trained: dict[str, Any]) -> list[str]:
    """Formats of exports that are of other weights than the student's figures: they have no row."""
    return [
        name for name, _, record in _records(folder) if _weights(record) != trained.get("weights")
    ]


def _records(folder: StudentFolder) -> Iterator[tuple[str, Path, dict[str, Any]]]:
    """Format, path and content of the record of each finished export."""
    from ...stages.export import FORMATS
    from ...stages.export.record import FILE

    for name in FORMATS:
        path = folder.exports / name / FILE
        if not path.exists():
            continue
        try:
            record = read_json(path)
        except ColdstillError:
            record = None
        if not isinstance(record, dict):
            raise ColdstillError(f"{path}: damaged; delete its folder and run coldstill export")
        yield name, path, record


def _weights(record: dict[str, Any]) -> Any:
    student = record.get("student")
    return student.get("fingerprint") if isinstance(student, dict) else None


def _row(name: str, record: dict[str, Any], trained: dict[str, Any]) -> dict[str, Any]:
    ours, theirs = record["sample"]["student"], record["sample"]["export"]

    def moved(key: str, most: float = math.inf) -> float:
        value = float(trained[key] + theirs[key] - ours[key])
        return min(most, max(0.0, value)) if math.isfinite(value) else value

    loss = moved("loss")
    bits = trained.get("bits_per_byte")
    return {
        **{key: trained.get(key) for key in ("parameters", "positions", "flops_per_token")},
        **{key: trained.get(key) for key in ("heldout", "weights", CACHED_BYTES)},
        **{key: record["costs"][key] for key in _COSTS},
        "name": f"{trained['name']} ({name})",
        "of": trained["name"],
        "format": name,
        "loss": loss,
        "perplexity": math.exp(loss),
        "bits_per_byte": bits * loss / trained["loss"] if bits else None,
        "kl": moved("kl"),
        **{key: moved(key, 1.0) for key in ("agreement", "accuracy", "acceptance", "ece")},
        "calibration": theirs["calibration"],
        "sample_positions": theirs["positions"],
        "kl_from_student": record["check"]["kl"],
    }


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


def _read_if_there(path: Path) -> dict[str, Any] | None:
    found = read_json(path) if path.exists() else None
    return found if isinstance(found, dict) else None
