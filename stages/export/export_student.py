"""Write a student in other formats; each counts as done only when its runtime says what it says.

`FOLDER/export.json` tells what was written from what, what was compared with what result, and what
it costs to run. An export that says something else leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...data.errors import ColdstillError
from ...data.files import SCRATCH_PREFIX, json_bytes, remove_scratch, told_where, whole_folder
from ..libraries import asking
from ..models.identity import teacher_identity
from ..report import Report, Reporter, silent
from . import FORMATS
from .checking import DiffersError, checked_base
from .contract import expect_known, expect_packages
from .ground import ground_of
from .job import RECORD
from .model_card import model_card
from .record import checked_record
from .standing import listed_files, standing

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ...data.store.reader import StoreReader
    from .contract import Format
    from .ground import Ground
    from .job import ExportJob

STAGE = "export"
PAGE = "README.md"
Record = dict[str, Any]


def export_student(job: ExportJob, store: StoreReader, report: Reporter = silent) -> list[Record]:
    """Write a student in every format that is asked for and not there yet, and check again what was
    checked without its own runtime where that is here now. What is known of each, in their order.

    store  the held-out one

    Raises
        ColdstillError: where there is one format and something is wrong with it: a package is
            missing, it does not know the student, an export of other weights or a damaged one
            stands there, or its runtime says something else than the student
        IncompleteError: the same of some of several formats; the others are done
    """
    remove_scratch(job.folder)  # of exports that were killed
    report(Report(stage=f"{STAGE} {job.name}", doing="read the student's weights"))
    identity = teacher_identity(
        str(job.model), f"students.{job.name}", dtype="auto", revision="main"
    )
    student = {
        "name": job.name,
        "family": identity.family,
        "parameters": identity.parameters,
        "fingerprint": identity.fingerprint,
    }
    found: dict[str, Record] = {}
    failed: dict[str, ColdstillError] = {}
    ground: Ground | None = None
    for name, form in job.formats.items():
        try:
            expect_packages(name, form)
            record = standing(job.folder / name, student)
            if record is None or not (record["checked_by_own_runtime"] or form.lacking):
                if ground is None:
                    report(Report(stage=f"{STAGE} {job.name}", doing="load the student"))
                    ground = ground_of(job, store, student)
                expect_known(name, form, ground.source)
                record = _Export(name, form, ground, job, report).done(record)
            else:
                _tell_of(name, form, record, job, report)
            found[name] = record
        except ColdstillError as error:
            failed[name] = error
    if failed:
        raise _failure(failed, found)
    return list(found.values())


class IncompleteError(ColdstillError):
    """Some of several exports could not be made; those that could are there."""

    def __init__(self, message: str, done: list[Record]) -> None:
        super().__init__(message)
        self.done = done


def _failure(failed: dict[str, ColdstillError], found: dict[str, Record]) -> ColdstillError:
    """The one error, or all of them in a line that says what was done."""
    first = next(iter(failed.values()))
    if not found and len({str(error) for error in failed.values()}) == 1:
        return first
    reasons = " | ".join(f"{name}: {error}" for name, error in failed.items())
    done = f"{', '.join(found)} done" if found else "none done"
    total = len(failed) + len(found)
    return IncompleteError(
        f"{len(failed)} of {total} exports failed ({done}): {reasons}", list(found.values())
    )


def _tell_of(name: str, form: Format, record: Record, job: ExportJob, report: Reporter) -> None:
    note = f"already exported: {job.folder / name}"
    if not record["checked_by_own_runtime"]:
        note += (
            f" (not checked by its own runtime, which is not here: pip install "
            f"'coldstill[{form.lacking}]')"
        )
    if record.get("heldout") != job.heldout:
        note += " (checked on another held-out store; delete that folder to check it on this one)"
    report(Report(stage=f"{STAGE} {job.name} {name}", note=note))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Base:
    """What a format is quantised from, written and checked."""

    folder: Path
    notes: tuple[str, ...]
    record: Record


@dataclass(frozen=True, slots=True, eq=False)
class _Export:
    """A student in one format."""

    name: str
    form: Format
    ground: Ground
    job: ExportJob
    report: Reporter

    @property
    def stage(self) -> str:
        """For reports."""
        return f"{STAGE} {self.job.name} {self.name}"

    def done(self, before: Record | None) -> Record:
        """Write and check it, or only check what stands there.

        before  what is known of that

        Raises
            ColdstillError: its runtime says something else than the student
        """
        folder = self.job.folder / self.name
        ground = self.ground.within(self.form.context(self.ground.source))
        asked = asking(
            f"--to {self.name}",
            "be done",
            where=f"students.{self.job.name}",
            remedy="take another format",
        )
        try:
            with (
                asked,
                told_where(folder),
                self._base(ground) as base,
                whole_folder(folder) as scratch,
            ):
                if before is None:
                    self.report(Report(stage=self.stage, doing="write the files"))
                    own = self.form.write(
                        ground.source, scratch, None if base is None else base.folder
                    )
                    lack = ground.source.ends.lack
                    told = [lack] if lack else []
                    notes = [*(() if base is None else base.notes), *own, *told]
                else:
                    notes = before["notes"]
                    _link(folder, scratch, before)
                record, figures = checked_record(
                    self.stage, self.form, scratch, ground, self.report
                )
                record |= {"notes": notes, "base": None if base is None else base.record}
                (scratch / PAGE).write_text(self._page(record), encoding="utf-8")
                record["files"] = listed_files(scratch)
                content = json_bytes(record)
                (scratch / RECORD).write_bytes(content)
        except DiffersError as error:
            kept = "nothing was kept" if before is None else f"delete {folder}"
            raise ColdstillError(f"{error}; {kept}") from error
        for note in notes if before is None else ():
            self.report(Report(stage=self.stage, note=note))
        again = "" if before is None else "checked again: "
        self.report(Report(stage=self.stage, note=again + figures))
        written: Record = json.loads(content)
        return written

    @contextlib.contextmanager
    def _base(self, ground: Ground) -> Iterator[_Base | None]:
        """What it is made of, for as long as that takes."""
        name = self.form.base
        if name is None:
            yield None
            return
        form = FORMATS[name]
        self.job.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=SCRATCH_PREFIX, dir=self.job.folder) as scratch:
            folder = Path(scratch)
            doing = f"write what it is quantised from ({name})"
            self.report(Report(stage=self.stage, doing=doing))
            notes = form.write(ground.source, folder)
            record = checked_base(self.stage, name, form, folder, ground, self.report)
            yield _Base(folder=folder, notes=tuple(notes), record=record)

    def _page(self, record: Record) -> str:
        source = self.ground.source
        return model_card(source.name, source.model, self.form, self.job.facts, record)


def _link(folder: Path, scratch: Path, record: Record) -> None:
    """The files of an export in another folder, but its page, which is written anew."""
    for name in record["files"]:
        if name != PAGE:
            (scratch / name).parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(folder / name, scratch / name)
            except OSError:  # a disk that knows no links
                shutil.copy2(folder / name, scratch / name)
