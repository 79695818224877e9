"""Writes a student in other formats, and keeps the exports that reproduce its logits.

`FOLDER/export.json` records what was exported, how it was checked, and what it costs to run. An
export that fails its check is deleted.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...data.errors import ColdstillError
from ...data.files import SCRATCH_PREFIX, remove_scratch, whole_folder, write_errors
from ..libraries import asking
from ..models.device import describe_machine, short_dtype
from ..models.grids import grid_record
from ..models.loading import teacher_identity
from ..report import Report, Reporter, silent
from . import FORMATS
from .checks import compare, resident_memory, writing_speed
from .contract import expect_packages, expect_supported
from .model_card import model_card
from .record import (
    VERSION,
    Check,
    Costs,
    ExportRecord,
    StudentIdentity,
    existing_export,
    package_versions,
)
from .reference import load_reference

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from ...data.store.reader import StoreReader
    from .checks import Comparison
    from .contract import Format, Limits, Runtime
    from .model_card import Facts
    from .reference import Reference

CARD = "README.md"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportJob:
    """One student, its formats, and where the exports go."""

    name: str
    model: Path
    """Folder of the trained model."""
    facts: Facts
    """The run's records of the student, for its model card."""
    formats: Mapping[str, Format]
    folder: Path
    """Parent folder; each format gets a folder of its name in it."""
    heldout: str
    """Identity of the held-out store in records."""
    own_code: bool = False
    """Run the Python code in the model's folder (`trust_remote_code`)."""


class IncompleteError(ColdstillError):
    """Some of several exports failed. `done` are the records of the others."""

    def __init__(self, message: str, done: list[ExportRecord]) -> None:
        super().__init__(message)
        self.done = done


class _DiffersError(ColdstillError):
    """An export does not reproduce its student."""


def export_student(
    job: ExportJob, store: StoreReader, report: Reporter = silent
) -> list[ExportRecord]:
    """Write a student in each format that does not exist yet, and return the record of each.

    An existing export that was checked without its own runtime is checked again once that runtime
    is installed.

    store  the held-out store

    Raises
        ColdstillError: the only export failed: a package is missing, the format does not support
            the student, other files are at its path, or it does not reproduce the student
        IncompleteError: some of several exports failed for such a reason; the others are done
    """
    remove_scratch(job.folder)  # left by killed exports
    stage = f"export {job.name}"
    report(Report(stage=stage, doing="read the student's weights"))
    found = teacher_identity(str(job.model), f"students.{job.name}", dtype="auto", revision="main")
    identity = StudentIdentity(
        name=job.name,
        family=found.family,
        parameters=found.parameters,
        fingerprint=found.fingerprint,
    )
    done: dict[str, ExportRecord] = {}
    failed: dict[str, ColdstillError] = {}
    reference: Reference | None = None
    for name, form in job.formats.items():
        try:
            expect_packages(name, form)
            record = existing_export(job.folder / name, identity)
            if record and (record.checked_by_own_runtime or form.missing_runtime):
                _report_existing(record, form, job, report)
            else:
                if reference is None:
                    report(Report(stage=stage, doing="load the student"))
                    reference = load_reference(job.name, job.model, store, own_code=job.own_code)
                expect_supported(name, form, reference.student)
                within = reference.within(form.context(reference.student))
                export = _Export(name, form, within, identity, job, report)
                record = export.write() if record is None else export.check_again(record)
            done[name] = record
        except ColdstillError as error:
            failed[name] = error
    if failed and not done and len({str(error) for error in failed.values()}) == 1:
        raise next(iter(failed.values()))
    if failed:
        reasons = " | ".join(f"{name}: {error}" for name, error in failed.items())
        rest = f"{', '.join(done)} done" if done else "none done"
        raise IncompleteError(
            f"{len(failed)} of {len(job.formats)} exports failed ({rest}): {reasons}",
            list(done.values()),
        )
    return list(done.values())


def is_on_grid(name: str, model: Path) -> bool:
    """Whether the weights in a model's folder were trained for a format."""
    record = grid_record(model)
    return record is not None and name in record["formats"]


def grid_notes(name: str, form: Format, model: Path) -> list[str]:
    """What a format does to weights that were trained on a grid, as a sentence; nothing for others.

    model  folder of the student's model
    """
    record = grid_record(model)
    if record is None:
        return []
    scheme, fitting = record["scheme"], record["formats"]
    if is_on_grid(name, model):
        return [f"its weights were trained rounded as this format rounds them ({scheme})"]
    does = "holds them unrounded" if form.base is None else "rounds them again, to other values"
    made_for = f"({scheme}) for {' and '.join(fitting)}"
    return [f"its weights were trained rounded {made_for}; {name} {does}"]


def _report_existing(record: ExportRecord, form: Format, job: ExportJob, report: Reporter) -> None:
    note = f"already exported: {job.folder / record.format}"
    if not record.checked_by_own_runtime:
        note += (
            " (not checked by its own runtime, which is not installed: pip install "
            f"'coldstill[{form.missing_runtime}]')"
        )
    if record.heldout != job.heldout:
        note += " (checked on another held-out store; delete that folder to check it on this one)"
    report(Report(stage=f"export {job.name} {record.format}", note=note))


@dataclass(frozen=True, slots=True, eq=False)
class _Export:
    name: str
    form: Format
    reference: Reference
    identity: StudentIdentity
    job: ExportJob
    report: Reporter

    @property
    def _stage(self) -> str:
        return f"export {self.job.name} {self.name}"

    @property
    def _folder(self) -> Path:
        return self.job.folder / self.name

    @property
    def _limits(self) -> Limits:
        on_grid = is_on_grid(self.name, self.reference.student.folder)
        return self.form.limits_on_grid if on_grid else self.form.limits

    def write(self) -> ExportRecord:
        student = self.reference.student
        with self._writing("nothing was kept") as (scratch, base, base_check, notes):
            self.report(Report(stage=self._stage, doing="write the files"))
            # its base may have said the same
            notes += [n for n in self.form.write(student, scratch, base) if n not in notes]
            notes += grid_notes(self.name, self.form, student.folder)
            notes += [student.ends.lack] if student.ends.lack else []
            record, figures = self._checked(scratch, notes, base_check)
        for note in (*notes, figures):
            self.report(Report(stage=self._stage, note=note))
        return record

    def check_again(self, before: ExportRecord) -> ExportRecord:
        """Check an existing export, and its base, in the runtime that is now installed."""
        with self._writing(f"delete {self._folder}") as (scratch, _, base_check, _):
            for name in set(before.files) - {CARD}:
                target = scratch / name
                target.parent.mkdir(parents=True, exist_ok=True)
                try:
                    os.link(self._folder / name, target)
                except OSError:  # a file system without hard links
                    shutil.copy2(self._folder / name, target)
            record, figures = self._checked(scratch, before.notes, base_check)
        self.report(Report(stage=self._stage, note=f"checked again: {figures}"))
        return record

    @contextlib.contextmanager
    def _writing(self, outcome: str) -> Iterator[tuple[Path, Path | None, Check | None, list[str]]]:
        """A folder that becomes the export's, and the folder, check and notes of its base.

        outcome  what follows for the user if the export does not reproduce the student
        """
        where, library = f"students.{self.job.name}", f"--to {self.name}"
        try:
            with (
                asking(library, "be done", where=where, remedy="use another format"),
                write_errors(self._folder),
                self._base() as base,
                whole_folder(self._folder) as scratch,
            ):
                yield scratch, *base
        except _DiffersError as error:
            raise ColdstillError(f"{error}; {outcome}") from error

    @contextlib.contextmanager
    def _base(self) -> Iterator[tuple[Path | None, Check | None, list[str]]]:
        """Write and check the export that this one is quantised from, in a temporary folder.

        Gives the folder, its check and its notes.
        """
        name = self.form.base
        if name is None:
            yield None, None, []
            return
        form = FORMATS[name]
        self.job.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=SCRATCH_PREFIX, dir=self.job.folder) as scratch:
            folder = Path(scratch)
            doing = f"write the {name} export that it is quantised from"
            self.report(Report(stage=self._stage, doing=doing))
            notes = form.write(self.reference.student, folder)
            base = replace(self, name=name, form=form)
            runtime = form.open(self.reference.student, folder)
            with contextlib.closing(runtime):
                stage = f"{self._stage}: before it is quantised ({name})"
                compared = base._compared(runtime, stage)
            yield folder, Check(**base._check(runtime, compared)), list(notes)

    def _checked(
        self, folder: Path, notes: list[str] | tuple[str, ...], base: Check | None
    ) -> tuple[ExportRecord, str]:
        """Check the files in a folder, and write the record and the model card beside them.

        Returns the record, and its figures as a sentence.
        """
        student, before = self.reference.student, resident_memory()
        with contextlib.closing(self.form.open(student, folder)) as runtime:
            compared = self._compared(runtime, self._stage)
            speed = None
            if runtime.is_own and self.reference.prompt is not None:
                self.report(Report(stage=self._stage, doing="measure its speed and memory"))
                speed = writing_speed(runtime, self.reference.prompt, before)
        record = ExportRecord(
            **self._check(runtime, compared),
            version=VERSION,
            student=self.identity,
            packages=package_versions(),
            heldout=self.job.heldout,
            sample={"student": compared.student, "export": compared.figures},
            costs=Costs(
                bytes=sum(path.stat().st_size for path in folder.glob(self.form.weights)),
                dtype=self.name.partition("-")[2] or short_dtype(str(student.model.dtype)[6:]),
                generation=() if speed is None else (speed,),
                machine=describe_machine(),
                runtime=runtime.title,
            ),
            notes=tuple(notes),
            base=base,
            files={},
        )
        card = model_card(student.name, student.model, self.form, self.job.facts, record)
        (folder / CARD).write_text(card, encoding="utf-8")
        return record.write(folder), self._sentence(record)

    def _compared(self, runtime: Runtime, stage: str) -> Comparison:
        """Compare a loaded export with the student."""
        documents, total = self.reference.documents, len(self.reference.documents)

        def progress(done: int) -> None:
            step = 1 if done else 0
            self.report(Report(stage=stage, done=done, total=total, step=step, unit="documents"))

        progress(0)
        ours, vocabulary = self.reference.runtime, self.reference.student.vocabulary
        try:
            compared = compare(ours, runtime, documents, vocabulary, progress)
        except ColdstillError as error:
            raise _DiffersError(f"{stage}: {runtime.title} {error}") from error
        excess = compared.fidelity.excess(self._limits)
        if excess is not None:
            raise _DiffersError(
                f"{stage}: {runtime.title} does not reproduce the student on "
                f"{compared.fidelity.positions:,} held-out positions: {excess}"
            )
        return compared

    def _check(self, runtime: Runtime, compared: Comparison) -> dict[str, Any]:
        """Fields of a `Check`."""
        return {
            "format": self.name,
            "checked_by": runtime.title,
            "checked_by_own_runtime": runtime.is_own,
            "check": compared.fidelity,
            "limits": self._limits,
        }

    def _sentence(self, record: ExportRecord) -> str:
        fidelity = record.check
        figures = (
            f"{record.costs.bytes / 1e6:.1f} MB, checked by {record.checked_by} on "
            f"{fidelity.positions:,} held-out positions: largest difference "
            f"{fidelity.largest_difference:.2g}, KL {fidelity.kl:.2g}, top-1 agreement "
            f"{fidelity.agreement:.2%}"
        )
        if not record.checked_by_own_runtime:
            return (
                f"{figures}; its own runtime is not installed, so neither it nor its speed was "
                f"checked: pip install 'coldstill[{self.form.missing_runtime}]', then run the same "
                "command again"
            )
        for speed in record.costs.generation:
            figures += (
                f"; prompts {speed.prefill_tokens_per_second:,.0f} tokens/s, then "
                f"{1e3 * speed.token_seconds:.2f} ms a token"
            )
        return figures
