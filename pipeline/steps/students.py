"""Trains students, keeps those that are trained with the same settings, and opens their stores."""

from __future__ import annotations

import contextlib
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...data.errors import ColdstillError, DivergedError
from ...data.files import json_sha256
from ...data.places.claims import claimed
from ...data.places.place import place_at
from ...data.store.layout import MANIFEST
from ...data.store.reader import open_store
from ...stages.ranks import rank, world_size
from ...stages.report import Report
from ..planning.checks import expect_trainable
from ..recipe.own_tokens import TOKENS, own_tokens
from ..recipe.run_folder import recorded_run
from ..recipe.work import beginning, is_done
from .own_text import due_trainings, training_settings
from .retokenize import folder_in_tokens, store_in_tokens

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from ...data.store.reader import StoreReader
    from ...stages.students.job import StudentJob
    from ...stages.students.pruning.layers import TeacherWeights
    from ..recipe.own_tokens import OwnTokens
    from ..recipe.run_folder import StudentFolder
    from ..recipe.tables import StudentTable
    from ..recipe.work import Work


VARIANT = "--student NEW"
"""How a student with other settings gets another name."""


def train_students(
    work: Work, names: Sequence[str], *, new_name: str = VARIANT, go_on: bool = False
) -> dict[str, str]:
    """Train the named students, or all students of the recipe.

    Several processes train each student together.

    new_name  how a student with other settings gets another name, for messages
    go_on     leave a student out if its loss becomes NaN or infinite, and train the next one

    Returns the students that were left out, with the reason.

    Raises
        ColdstillError: no store, an unknown student, or a student trained with other settings
        DivergedError: a loss became NaN or infinite, and `go_on` is false
        StoppedError: SIGTERM arrived; a checkpoint is saved
    """
    from ...stages.interruption import Interruption

    with Interruption().listening():
        return _train_students(work, names, new_name, go_on)


@dataclass(frozen=True, slots=True)
class _Checked:
    """The students that a command names, after every check that needs no training."""

    students: dict[str, StudentTable]
    stores: dict[str, StoreReader]
    """The store of each student: the run's, or that in the student's own tokens."""
    settings: dict[str, dict[str, Any]]
    jobs: dict[str, StudentJob]
    """The jobs of those that are not trained."""


def _checked(work: Work, names: Sequence[str], new_name: str) -> _Checked:
    from ...stages.students.lesson import lesson

    chosen = list(names) or list(work.recipe.students)
    if not chosen:
        raise ColdstillError(f"{work.recipe.name}: the recipe has no students")
    students = {name: work.recipe.student(name) for name in chosen}
    expect_trainable(work.recipe, chosen, teacher=False)
    store = open_made(work.run.logits, work)
    others = _open_others(work, students)
    stores, settings, missing = {}, {}, {}
    # all students are checked before any is trained
    for name, student in students.items():
        lessons = _lessons(work, name, student, store, others)
        stores[name] = lessons.store
        settings[name] = student_settings(work, student, lessons)
        if not is_trained(work, name, settings[name], new_name):
            missing[name] = student_job(work, name, settings[name], lessons.others)
    for name, job in missing.items():
        lesson(job, stores[name])
        if (rounds := students[name].rounds) is not None:  # its later trainings
            objective = rounds.learned_with(job.objective)
            config = rounds.training(job.config)
            lesson(dataclasses.replace(job, objective=objective, config=config), stores[name])
    return _Checked(students, stores, settings, missing)


def missing_students(work: Work, names: Sequence[str], new_name: str) -> list[str]:
    """Return the named students that are not trained, and report the others.

    Parameters and errors are those of `train_students`.
    """
    checked = _checked(work, names, new_name)
    for name in checked.students.keys() - checked.jobs.keys():
        work.note(f"train-student {name}", f"already trained: {work.run.student(name).model}")
    return [*checked.jobs]


def _train_students(work: Work, names: Sequence[str], new_name: str, go_on: bool) -> dict[str, str]:
    from ...stages.students.lesson import lesson
    from ...stages.train_student import train_student

    checked = _checked(work, names, new_name)
    students, settings, jobs = checked.students, checked.settings, checked.jobs
    left_out: dict[str, str] = {}
    for number, (name, student) in enumerate(students.items(), 1):
        folder = work.run.student(name)
        if go_on:
            work.note("sweep", f"point {number} of {len(students)}: {name}")
        with claimed_student(folder):
            # checked again: another process may have trained it since
            if name not in jobs or is_trained(work, name, settings[name], new_name):
                work.note(f"train-student {name}", f"already trained: {folder.model}")
                continue
            try:
                for due in due_trainings(work, jobs[name]):
                    lesson(due, checked.stores[name])
                    needs = due.starts_from_teacher  # later rounds do not
                    teacher = teacher_weights(work, student, folder) if needs else None
                    job = dataclasses.replace(due, teacher=teacher)
                    train_student(job, checked.stores[name], work.report)
            except DivergedError as error:
                # only the first process has this error, so the others cannot continue
                if not go_on or world_size() > 1:
                    raise
                left_out[name] = str(error)
                work.report(Report(stage="sweep", note=f"left out: {error}", warning=True))
    return left_out


@dataclass(frozen=True, slots=True)
class Lessons:
    """The stores that a student learns from."""

    store: StoreReader
    others: dict[str, StoreReader]
    """Stores of further teachers, by their names in the recipe."""
    tokens: OwnTokens | None = None
    """The student's tokens if they are not the teacher's; all stores are then written in them."""


def _lessons(
    work: Work,
    name: str,
    student: StudentTable,
    store: StoreReader,
    others: Mapping[str, StoreReader],
) -> Lessons:
    """The stores of a student; makes those in its own tokens if there are none."""
    own_others = {named: others[named] for named in student.other_stores}
    found = own_tokens(work, name, student, store.manifest.tokenizer.fingerprint)
    if found is None:
        return Lessons(store, own_others)
    own, tokenizer = found

    def written(one: StoreReader, named: str = "") -> StoreReader:
        folder = folder_in_tokens(one, named)
        return store_in_tokens(work, own, one, folder, tokenizer, f"students.{name}")

    own_others = {named: written(one, named) for named, one in own_others.items()}
    return Lessons(written(store), own_others, own)


def student_settings(work: Work, student: StudentTable, lessons: Lessons) -> dict[str, Any]:
    """Return everything that determines the trained weights."""
    store, others = lessons.store, lessons.others
    seed = work.recipe.seed if student.train.seed is None else student.train.seed
    alone = {key for key in ("teachers", "rounds") if not getattr(student, key)}
    table = student.model_dump(mode="json", exclude={"like", "trust_remote_code", *alone})
    table["train"]["seed"] = seed  # whichever key of the recipe sets it
    settings = {"student": table, "seed": seed, "store": json_sha256(store.manifest.to_json())}
    if student.other_stores:
        settings["others"] = {
            named: json_sha256(others[named].manifest.to_json()) for named in student.other_stores
        }
    if lessons.tokens is not None:
        settings[TOKENS] = lessons.tokens.settings
    return settings


def is_trained(work: Work, name: str, settings: dict[str, Any], new_name: str = VARIANT) -> bool:
    """Return whether a student is trained with these settings; if not, it can be trained now.

    new_name  how a student with other settings gets another name, for messages

    Raises
        ColdstillError: it was trained, or begun, with other settings (the first one is named), or
            with unknown ones
    """
    folder = work.run.student(name)
    where = f"students.{name}"
    done = is_done(folder.settings, folder.model, settings, where, new_name, _as_now)
    if not done:
        if (rounds := work.recipe.student(name).rounds) is not None:
            settings = training_settings(folder, rounds, settings, rounds.count)
        _expect_own(folder, settings, where)
    return done


def _as_now(record: Any) -> Any:
    """Return an older record in today's form, with the seed also in the student's table."""
    match record:
        case {"seed": seed, "student": {"train": dict() as train, **student}}:
            return {**record, "student": {**student, "train": {**train, "seed": seed}}}
    return record


def _expect_own(folder: StudentFolder, settings: dict[str, Any], where: str) -> None:
    """Refuse files of another training, such as a copied folder or one without its record."""
    from ...stages.training.checkpoints import expect_own, last_whole_checkpoint

    last = last_whole_checkpoint(folder.checkpoints)
    last_is_own = last is not None and expect_own(last, settings)
    if folder.settings.exists():
        return
    # a cut's record names its own settings
    start = None if folder.pruning.exists() else folder.start
    # a training that was killed before it wrote its settings leaves folders without a file
    written = next((path for path in folder.written.rglob("*") if path.is_file()), None)
    left = [folder.model, written and folder.written, *(() if last_is_own else (last, start))]
    unknown = next((path for path in left if path is not None and path.exists()), None)
    if unknown is not None:
        raise ColdstillError(
            f"{unknown}: {where} has no {folder.settings.name} beside it, so its settings are "
            f"unknown; put that file back, or delete {folder.root} to train it again"
        )


def student_job(
    work: Work, name: str, settings: dict[str, Any], others: Mapping[str, StoreReader]
) -> StudentJob:
    """Return the job of a student without the teacher's weights, which may be missing; of a student
    with rounds, that of its first training."""
    from ...stages.students.job import StudentJob

    student, folder = work.recipe.student(name), work.run.student(name)
    rounds, own_settings = student.rounds, settings
    if rounds is not None:
        own_settings = training_settings(folder, rounds, settings, 1)
    return StudentJob(
        name=name,
        architecture=student.architecture,
        model=None if student.model is None else work.local(student.model),
        layers=student.layers,
        prune=student.prune or (),
        importance=work.run.importance,
        lora=student.lora,
        quantize=student.quantize,
        objective=student.objective,
        others=tuple(others[named] for named in student.other_stores),
        shares=student.shares,
        config=student.train,
        seed=settings["seed"],
        folder=first_training(folder, student).root,
        begin=beginning(work, folder.settings, settings, folder.evaluation),
        settings=own_settings,
        training=None if rounds is None else 1,
        own_code=work.recipe.trusts(name),
    )


def first_training(folder: StudentFolder, student: StudentTable) -> StudentFolder:
    """Return the folder of a student's first training, which is its own without rounds."""
    return folder.training(1, 1 if student.rounds is None else student.rounds.count)


def job_as_trained(work: Work, name: str, store: StoreReader) -> StudentJob:
    """Return the job of a student, after checking that it has no other settings.

    Raises
        ColdstillError: it was trained with other settings, or a further teacher's store is missing
    """
    student = work.recipe.student(name)
    others = _open_others(work, {name: student})
    settings = student_settings(work, student, Lessons(store, others))
    is_trained(work, name, settings)
    return student_job(work, name, settings, others)


@contextlib.contextmanager
def claimed_student(folder: StudentFolder) -> Iterator[None]:
    """Claim the student, so that no other command trains it; the first of several processes does.

    Raises
        ColdstillError: another command trains it now
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
    """Return the teacher weights to load; None once the student's initial weights exist."""
    starts_from_teacher = student.layers is not None or student.prune is not None
    first = first_training(folder, student)
    if not starts_from_teacher or first.is_begun(max(1, len(student.prune or ()))):
        return None
    from ...stages.students.pruning.layers import TeacherWeights

    table = work.recipe.teacher
    return TeacherWeights(
        name=work.teacher_model, revision=table.revision, own_code=table.trust_remote_code
    )


def open_made(address: str | Path, work: Work) -> StoreReader:
    """Open a complete store of this run; raises ColdstillError with the command that makes it."""
    place = place_at(address)
    if not place.exists(MANIFEST):
        raise ColdstillError(
            f"{place}: no store there; make it first with coldstill teacher-logits {work.named}"
        )
    store = open_store(address, cache=work.run.cache)
    store.expect_sizes()
    return store


def _open_others(work: Work, students: Mapping[str, StudentTable]) -> dict[str, StoreReader]:
    """Open the stores of further teachers, by their names in the recipe."""
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
    """Return the store that a recipe names by address or folder, or by its run's folder or name."""
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
