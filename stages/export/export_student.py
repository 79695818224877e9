"""Write a student in other formats; each counts as done only when its runtime says what it says.

`FOLDER/export.json` tells what was written from what, what was compared with what result, and what
it costs to run. An export that says something else leaves nothing behind.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from ...data.errors import ColdstillError
from ...data.files import json_bytes, read_json, remove_scratch, whole_folder
from ..models import teacher_identity
from ..report import Report, Reporter, silent
from .contract import expect_known, expect_packages
from .ground import ground_of
from .job import RECORD
from .record import checked_record

if TYPE_CHECKING:
    from pathlib import Path

    from ...data.reader import StoreReader
    from .contract import Format
    from .ground import Ground
    from .job import ExportJob

STAGE = "export"


def export_student(job: ExportJob, store: StoreReader, report: Reporter = silent) -> None:
    """Write a student in every format that is asked for and not there yet.

    store  the held-out one

    Raises
        ColdstillError: a package is missing, a format does not know the student, an export of
            other weights stands there, or its runtime says something else than the student; what
            was finished before is kept
    """
    for name, form in job.formats.items():
        expect_packages(name, form)
    identity = teacher_identity(
        str(job.model), f"students.{job.name}", dtype="auto", revision="main"
    )
    known = {
        "name": job.name,
        "family": identity.family,
        "parameters": identity.parameters,
        "fingerprint": identity.fingerprint,
    }
    missing = {
        name: form
        for name, form in job.formats.items()
        if not _is_done(job.folder / name, name, known, job.heldout, report)
    }
    if not missing:
        return
    ground = ground_of(job, store, known)
    for name, form in missing.items():
        expect_known(name, form, ground.source)
    remove_scratch(job.folder)  # of exports that were killed
    for name, form in missing.items():
        _export(name, form, job.folder / name, ground, report)


def _is_done(
    folder: Path, name: str, known: dict[str, Any], heldout: str, report: Reporter
) -> bool:
    """Whether an export is there and whole, of this very student.

    Raises
        ColdstillError: it is of other weights, or something else stands there
    """
    if not folder.exists():
        return False
    record = read_json(folder / RECORD)
    found = record.get("student", {}) if isinstance(record, dict) else {}
    if found.get("fingerprint") != known["fingerprint"]:
        raise ColdstillError(
            f"{folder}: written from other weights (SHA-256 {str(found.get('fingerprint'))[:12]}, "
            f"the student's are {known['fingerprint'][:12]}); delete that folder to write it anew"
        )
    note = f"already exported: {folder}"
    if record.get("heldout") != heldout:
        note += " (checked on another held-out store; delete that folder to check it on this one)"
    report(Report(stage=f"{STAGE} {known['name']} {name}", note=note))
    return True


def _export(name: str, form: Format, folder: Path, ground: Ground, report: Reporter) -> None:
    stage = f"{STAGE} {ground.source.name} {name}"
    try:
        with whole_folder(folder) as scratch:
            notes = form.write(ground.source, scratch)
            record, figures = checked_record(stage, form, scratch, ground, report)
            record["notes"] = list(notes)
            (scratch / RECORD).write_bytes(json_bytes(record))
    except BaseException:
        with contextlib.suppress(OSError):  # there are others, or somebody else's files
            folder.parent.rmdir()
        raise
    for note in notes:
        report(Report(stage=stage, note=note))
    report(Report(stage=stage, note=figures))
