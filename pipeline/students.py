"""The steps of stage two: train students from the store, and measure them."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from ..data.errors import ColdstillError
from ..data.files import read_json, write_json
from ..data.fingerprint import json_sha256
from ..data.layout import MANIFEST
from ..data.place import place_at
from ..data.reader import open_store
from .work import beginning, is_done

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ..data.reader import StoreReader
    from .tables import StudentTable
    from .work import Work


def train_students(work: Work, names: Sequence[str]) -> None:
    """Train the named students, or all of the recipe's."""
    from ..stages.train_student import StudentJob, train_student

    chosen = list(names) or list(work.recipe.students)
    if not chosen:
        raise ColdstillError(f"{work.recipe.name}: the recipe has no students")
    students = {name: work.recipe.student(name) for name in chosen}
    store = open_made(work.run.logits, work)
    settings = {name: _student_settings(work, student, store) for name, student in students.items()}
    done = {  # of all, before any is trained
        name: is_done(
            work.run.student(name).settings,
            work.run.student(name).model,
            settings[name],
            f"students.{name}",
            "--student NEW",
        )
        for name in chosen
    }
    if not all(done.values()):
        store.expect_room()
    for name, student in students.items():
        folder = work.run.student(name)
        if done[name]:
            work.say(f"train-student {name}", f"already trained: {folder.model}")
            continue
        job = StudentJob(
            name=name,
            architecture=student.architecture,
            model=None if student.model is None else work.local(student.model),
            objective=student.objective,
            config=student.train,
            seed=settings[name]["seed"],
            folder=folder.root,
            begin=beginning(work, folder.settings, settings[name], folder.evaluation),
        )
        train_student(job, store, work.report)


def evaluate(work: Work, names: Sequence[str]) -> None:
    """Measure the named students, or all that are trained, on the held-out store."""
    from ..stages.evaluate import evaluate_student, evaluate_teacher

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
    # figures belong to the store they were measured on: another held-out store asks for new ones
    heldout = json_sha256(store.manifest.to_json())
    if not _is_measured(work.run.teacher_evaluation, heldout):
        figures = dataclasses.asdict(evaluate_teacher(store))
        write_json(work.run.teacher_evaluation, {**figures, "heldout": heldout})
    for name in list(names) or trained:
        folder = work.run.student(name)
        if _is_measured(folder.evaluation, heldout):
            work.say(f"evaluate {name}", f"already done: {folder.evaluation}")
            continue
        result = evaluate_student(name, folder.model, store, work.report)
        write_json(folder.evaluation, {**dataclasses.asdict(result), "heldout": heldout})
        work.say(f"evaluate {name}", f"held-out loss {result.loss:.4f}, KL {result.kl:.4f}")


def _is_measured(record: Path, heldout: str) -> bool:
    """Whether these figures are there and are of this held-out store."""
    if not record.exists():
        return False
    figures = read_json(record)
    return isinstance(figures, dict) and figures.get("heldout") == heldout


def open_made(address: str | Path, work: Work) -> StoreReader:
    """A whole store of this run; raises ColdstillError with the command that makes it."""
    place = place_at(address)
    if not place.exists(MANIFEST):
        raise ColdstillError(
            f"{place}: no store there; make it first with coldstill teacher-logits "
            f"{work.recipe.name}"
        )
    store = open_store(address, cache=work.run.cache)
    store.expect_sizes()
    return store


def _student_settings(work: Work, student: StudentTable, store: StoreReader) -> dict[str, Any]:
    """Everything that decides what comes out of training it."""
    seed = work.recipe.seed if student.train.seed is None else student.train.seed
    table = student.model_dump(mode="json", exclude={"like"})
    return {"student": table, "seed": seed, "store": json_sha256(store.manifest.to_json())}
