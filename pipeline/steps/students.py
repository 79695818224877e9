"""The steps of stage two: train students from the store, and measure them."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...data.errors import ColdstillError, DivergedError
from ...data.places.claims import claimed
from ...data.places.opening import place_at
from ...data.store.layout import MANIFEST
from ...data.store.reader import open_store
from ...stages.ranks import rank, world_size
from ...stages.report import Report
from ..recipe.run_folder import recorded_run
from .trainable import expect_trainable
from .trained import VARIANT, is_trained, student_settings
from .work import beginning

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from ...data.store.reader import StoreReader
    from ...stages.students.pruning.layers import TeacherWeights
    from ...stages.train_student import StudentJob
    from ..recipe.run_folder import StudentFolder
    from ..recipe.tables import StudentTable
    from .work import Work


def train_students(
    work: Work, names: Sequence[str], *, new_name: str = VARIANT, go_on: bool = False
) -> dict[str, str]:
    """Train the named students, or all of the recipe's; with several processes, each together.

    new_name  how a student of other settings gets a name of its own
    go_on     a student whose loss is no number is left out instead of ending the command

    Returns those that were left out, and why: none unless `go_on`.

    Raises
        StoppedError: asked to stop by SIGTERM; a checkpoint is saved
    """
    from ...stages.interruption import Interruption

    with Interruption().listening():
        return _train_students(work, names, new_name, go_on)


def _train_students(work: Work, names: Sequence[str], new_name: str, go_on: bool) -> dict[str, str]:
    from ...stages.students.lesson import lesson
    from ...stages.train_student import train_student

    chosen = list(names) or list(work.recipe.students)
    if not chosen:
        raise ColdstillError(f"{work.recipe.name}: the recipe has no students")
    students = {name: work.recipe.student(name) for name in chosen}
    expect_trainable(work.recipe, chosen, teacher=False)
    store = open_made(work.run.logits, work)
    others = _open_others(work, students)
    settings = {
        name: student_settings(work, student, store, others) for name, student in students.items()
    }
    # of all, before any is trained
    missing = [name for name in chosen if not is_trained(work, name, settings[name], new_name)]
    jobs = {name: student_job(work, name, settings[name], others) for name in missing}
    for job in jobs.values():
        lesson(job, store)
    left_out: dict[str, str] = {}
    for number, (name, student) in enumerate(students.items(), 1):
        folder = work.run.student(name)
        if go_on:
            work.say("sweep", f"point {number} of {len(students)}: {name}")
        with alone(folder):
            # once more where it was missing: another run may have trained it since
            if name not in jobs or is_trained(work, name, settings[name], new_name):
                work.say(f"train-student {name}", f"already trained: {folder.model}")
                continue
            job = dataclasses.replace(jobs[name], teacher=teacher_weights(work, student, folder))
            try:
                train_student(job, store, work.report)
            except DivergedError as error:
                # several processes cannot all go on: only the first one knows
                if not go_on or world_size() > 1:
                    raise
                left_out[name] = str(error)
                work.report(Report(stage="sweep", note=f"left out: {error}", warning=True))
    return left_out


def student_job(
    work: Work, name: str, settings: dict[str, Any], others: Mapping[str, StoreReader]
) -> StudentJob:
    """All that training it takes but the teacher's weights, which may be gone."""
    from ...stages.train_student import StudentJob

    student, folder = work.recipe.student(name), work.run.student(name)
    return StudentJob(
        name=name,
        architecture=student.architecture,
        model=None if student.model is None else work.local(student.model),
        layers=student.layers,
        prune=student.prune or (),
        lora=student.lora,
        objective=student.objective,
        others=tuple(others[named] for named in student.other_stores),
        shares=student.shares,
        config=student.train,
        seed=settings["seed"],
        folder=folder.root,
        begin=beginning(work, folder.settings, settings, folder.evaluation),
        settings=settings,
        own_code=work.recipe.trusts(name),
    )


def job_as_trained(work: Work, name: str, store: StoreReader) -> StudentJob:
    """The job of a student, if it was not trained with other settings than the recipe's.

    Raises
        ColdstillError: it was, or there is no store of a further teacher
    """
    student = work.recipe.student(name)
    others = _open_others(work, {name: student})
    settings = student_settings(work, student, store, others)
    is_trained(work, name, settings)
    return student_job(work, name, settings, others)


@contextlib.contextmanager
def alone(folder: StudentFolder) -> Iterator[None]:
    """Keep other runs from training this student; of processes together the first one does.

    Raises
        ColdstillError: another run is at it
    """
    with contextlib.nullcontext(True) if rank() else claimed(folder.claim) as ours:
        if not ours:
            raise ColdstillError(
                f"{folder.root}: another process is training this student; wait for it, or train "
                "another under a new name (--student NEW)"
            )
        yield


def teacher_weights(
    work: Work, student: StudentTable, folder: StudentFolder
) -> TeacherWeights | None:
    """Whom a student is made of; nobody, once it was begun: the teacher may be gone."""
    is_of_the_teacher = student.layers is not None or student.prune is not None
    if not is_of_the_teacher or folder.is_begun(max(1, len(student.prune or ()))):
        return None
    from ...stages.students.pruning.layers import TeacherWeights

    table = work.recipe.teacher
    return TeacherWeights(
        name=work.teacher_model, revision=table.revision, own_code=table.trust_remote_code
    )


def open_made(address: str | Path, work: Work) -> StoreReader:
    """A whole store of this run; raises ColdstillError with the command that makes it."""
    place = place_at(address)
    if not place.exists(MANIFEST):
        raise ColdstillError(
            f"{place}: no store there; make it first with coldstill teacher-logits {work.named}"
        )
    store = open_store(address, cache=work.run.cache)
    store.expect_sizes()
    return store


def _open_others(work: Work, students: Mapping[str, StudentTable]) -> dict[str, StoreReader]:
    """The stores of further teachers, by what the recipe calls them: each is opened once.

    Raises
        ColdstillError: there is no such store or run, or the store is not whole
    """
    found: dict[str, StoreReader] = {}
    for name, student in students.items():
        for named in student.other_stores:
            if named not in found:
                store = open_store(
                    store_called(named, work, f"students.{name}.teachers"), cache=work.run.cache
                )
                store.expect_sizes()
                found[named] = store
    return found


def store_called(named: str, work: Work, where: str) -> str | Path:
    """The store that a recipe names: by its address or folder, or by its run's folder or name."""
    if "://" in named:
        return named
    beside = work.loaded.base / Path(named).expanduser()
    for folder in (beside, work.run.root.parent / named):
        if (folder / MANIFEST).is_file():
            return folder
        run = recorded_run(folder)
        if place_at(run.logits).exists(MANIFEST):
            return run.logits
    raise ColdstillError(
        f"{where}: {named}: no store in {beside}, and no run of that name with one; name a store's "
        "folder or address, or make it first with coldstill teacher-logits"
    )
