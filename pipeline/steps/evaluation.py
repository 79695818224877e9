"""The steps after stage two: measure students on held-out documents, and compare all models."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from ...data.errors import ColdstillError
from ...data.files import json_sha256, read_json, whole_file, write_json
from ...data.store.caveats import caveats
from ...data.store.reader import open_store
from ...stages.report import Report, Reporter
from ..pages.compare.page import write_page
from ..pages.self_contained import expect_file
from ..recipe.own_tokens import TOKENS, OwnTokens
from ..results.figures import ModelFigures, json_rows
from ..results.model_tables import markdown, warnings, without_calibration
from ..results.rows import compared_rows, is_older
from .own_text import scored_texts
from .retokenize import folder_in_tokens, trained_store
from .students import open_made, store_called

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ...data.store.manifest import Manifest
    from ...stages.evaluate import OwnText
    from ..recipe.run_folder import Run, StudentFolder
    from ..recipe.work import Work


_NEWER = ("calibration", "bits_per_byte", "flops_per_token", "generation", "weights")
"""Keys that older versions did not write; figures without them are measured again."""
_CACHED = "cached_bytes_per_position"


def evaluate(work: Work, names: Sequence[str]) -> None:
    """Measure the named students, or all trained ones, on the held-out store of the run's teacher.

    Raises
        ColdstillError: a named student is not trained, no student is, or a record is damaged
    """
    from ...stages.evaluate import evaluate_student, evaluate_teacher

    store = open_made(work.run.heldout, work)
    trained = [n for n in work.run.student_names if work.run.student(n).model.exists()]
    for name in names:
        if name not in trained:
            raise ColdstillError(
                f"{work.run.root}: student '{name}' is not trained (trained: "
                f"{', '.join(trained) or 'none'}); run coldstill train-student --student {name}"
            )
    if not trained:
        raise ColdstillError(
            f"{work.run.root}: no student is trained yet; run coldstill train-student"
        )
    for sentence in caveats(store.manifest):
        work.note("evaluate", f"{store.place}: {sentence}")
    # figures of another held-out store are measured again
    heldout = heldout_identity(store.manifest)
    newer = (*_NEWER, *_of(store.manifest))
    if _measured(work.run.teacher_evaluation, heldout, *newer) is None:
        figures = dataclasses.asdict(evaluate_teacher(store, work.report))
        write_json(work.run.teacher_evaluation, {**figures, "heldout": heldout})
    for name in list(names) or trained:
        folder = work.run.student(name)
        work.doing(f"evaluate {name}", "look for figures of these weights")
        own = trained_store(work, name, store, "heldout")
        heldout = heldout_identity(own.manifest)
        if is_evaluated(folder, heldout, *_of(own.manifest)):
            if is_older(folder):  # the weights are the same, only the files' times changed
                folder.evaluation.touch()
            work.note(f"evaluate {name}", f"already done: {folder.evaluation}")
            continue
        result = evaluate_student(
            name, folder.model, own, work.report, own_code=work.recipe.trusts(name)
        )
        figures = dataclasses.asdict(result)
        if own is not store:
            figures[TOKENS] = own.manifest.tokenizer.fingerprint
        figures[_CACHED] = _cached_bytes(work, name)
        if texts := _own_text(work, name):
            figures["own_text"] = [dataclasses.asdict(one) for one in texts]
        write_json(folder.evaluation, {**figures, "heldout": heldout})
        work.note(f"evaluate {name}", f"held-out loss {result.loss:.4f}, KL {result.kl:z.4f}")
        for one in texts:
            note = f"KL {one.kl:z.4f}, acceptance {one.acceptance:.1%}"
            work.note(f"evaluate {name}", f"on its own text after round {one.round}: {note}")


def _own_text(work: Work, name: str) -> list[OwnText]:
    """Figures on the text of each round that the teacher scored, in order."""
    from ...stages.evaluate import evaluate_own_text

    own_code = work.recipe.trusts(name)
    return [
        evaluate_own_text(name, model, open_store(store), work.report, own_code=own_code)
        for model, store in scored_texts(work.run.student(name)).values()
    ]


def heldout_identity(manifest: Manifest) -> str:
    """Hash of the held-out store that figures depend on.

    The teacher's name is left out: a teacher that was trained in the run is named after the run.
    """
    nameless = dataclasses.replace(manifest.teacher, name="")
    return json_sha256(dataclasses.replace(manifest, teacher=nameless).to_json())


def _of(manifest: Manifest) -> tuple[str, ...]:
    """Further keys that older versions did not write, for stores that lack something: their figures
    held some that the store cannot give."""
    return ("caveats",) if caveats(manifest) else ()


def is_evaluated(folder: StudentFolder, heldout: str, *newer: str) -> bool:
    """Whether a student has figures of this held-out store and of its current weights, with all
    keys of this version, and those in `newer`."""
    from ...stages.models.loading import teacher_identity

    figures = _measured(folder.evaluation, heldout, *_NEWER, _CACHED, *newer)
    if figures is None:
        return False
    where = f"students.{folder.root.name}"
    identity = teacher_identity(str(folder.model), where, dtype="auto", revision="main")
    own = [one.round for one in figures.own_text]
    return figures.weights == identity.fingerprint and own == [*scored_texts(folder)]


def _measured(record: Path, heldout: str, *newer: str) -> ModelFigures | None:
    """Figures of this held-out store with the keys that older versions did not write, or None."""
    if not record.exists():
        return None
    try:
        figures = ModelFigures.read(record, "")
    except ColdstillError:  # damaged figures are measured again
        return None
    return figures if figures.heldout == heldout and figures.has(*newer) else None


def _cached_bytes(work: Work, name: str) -> float | None:
    """Bytes for each position, tokens included, of all stores that a student was trained from.

    0 if its objective reads no targets; None if a store is missing or was replaced.
    """
    from ...stages.targets.losses import LOSSES
    from ..recipe.tables import StudentTable

    settings = work.run.student(name).settings
    try:
        trained = read_json(settings)
        # the recipe may have changed since the training
        student = StudentTable.model_validate(trained["student"])
        if not any(LOSSES[loss].needs_targets for loss in student.objective.weights):
            return 0.0
        total = 0.0
        for named, share in zip(("", *student.other_stores), student.shares, strict=True):
            if share > 0:
                where = f"students.{name}.teachers"
                address = store_called(named, work, where) if named else work.run.logits
                store = open_store(address, cache=work.run.cache)
                digest = trained["others"][named] if named else trained["store"]
                if OwnTokens.recorded(work.run.student(name)) is not None:
                    store = trained_store(work, name, store, folder_in_tokens(store, named))
                if json_sha256(store.manifest.to_json()) != digest:
                    raise ColdstillError(f"{store.place}: is another store now")
                total += store.totals.bytes / max(1, store.positions)
    except (ColdstillError, OSError) as error:
        reason = str(error)
    except (LookupError, TypeError, ValueError):
        reason = f"{settings}: damaged"
    else:
        return total
    work.note(f"evaluate {name}", f"the size of what it was trained from is not known: {reason}")
    return None


_STAGE = "compare"


def compare_runs(runs: Sequence[Run], file: Path | None, report: Reporter) -> list[ModelFigures]:
    """A row for each teacher, then one for every evaluated student and each of its exports, the
    lowest loss first. A page with plots is written to `file` if given.

    The comparison of one run is also written beside it, as JSON, Markdown and a page. For several
    runs, models are called RUN/NAME, and a teacher whose figures two runs share has one row.
    """
    if file is not None:
        expect_file(file)
    report(Report(stage=_STAGE, doing="gather the figures"))
    rows, page = compared_rows(runs), file
    if len(runs) == 1:
        beside = runs[0].comparison
        write_json(beside, json_rows(rows))
        with whole_file(beside.with_suffix(".md")) as scratch:
            scratch.write_text(markdown(rows), encoding="utf-8")
        write_page(beside.with_suffix(".html"), runs, rows)
        page = file or beside.with_suffix(".html")
    for warning in warnings(rows):
        report(Report(stage=_STAGE, note=warning, warning=True))
    if old := without_calibration(rows):
        names = ", ".join(old)
        note = f"no calibration in older figures of {names}; coldstill evaluate measures them again"
        report(Report(stage=_STAGE, note=note))
    if file is not None:
        write_page(file, runs, rows)
    if page is not None:
        report(Report(stage=_STAGE, note=f"plots: {page}; open it in a browser"))
    return rows
