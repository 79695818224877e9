"""`evaluate --tasks`: what is missing is run, what is there is told."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ....data.errors import ColdstillError
from ....data.fingerprint import files_sha256
from .files import read_tasks, units
from .scores import Record, add_record, find, read_records, table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ....stages.evaluation.lm_eval.loading import TaskSource
    from ....stages.evaluation.lm_eval.running import HarnessModel
    from ...cli.task_options import TaskOptions
    from ..work import Work
    from .files import TaskFile, Unit

TEACHER = "teacher"
"""No student is called so; it takes tasks only if it is named."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Subject:
    """A model that takes tasks."""

    model: HarnessModel
    fingerprint: str
    record: Path

    @property
    def name(self) -> str:
        return self.model.name


def evaluate_on_tasks(work: Work, names: Sequence[str], asked: TaskOptions) -> None:
    """Run tasks on the named students, or all that are trained, and print what came of it.

    Raises
        ColdstillError: lm-eval is not installed, a student is not trained, a task file or its data
            cannot be read, or lm-eval cannot finish a task
    """
    from ....stages.evaluation.lm_eval.loading import expect_harness

    expect_harness()
    tasks = read_tasks(asked.paths)
    wanted = {unit.name: (unit, _asked(unit, asked.limit)) for unit in units(tasks)}
    work.doing("evaluate", "read the models' weights for their fingerprints")
    subjects = _subjects(work, names)
    missing: list[tuple[_Subject, list[Unit]]] = []
    for subject in subjects:
        records = read_records(subject.record, subject.fingerprint)
        there = [n for n, (_, record) in wanted.items() if find(records, record)]
        if there:
            told = f"already done: {', '.join(there)}: {subject.record}"
            work.say(f"evaluate {subject.name}", told)
        if len(there) < len(wanted):
            left = [unit for n, (unit, _) in wanted.items() if n not in there]
            missing.append((subject, left))
    if missing:
        _run(work, tasks, wanted, missing, asked)
    rows = []
    for subject in subjects:
        records = read_records(subject.record, subject.fingerprint)
        found = [find(records, record) for _, record in wanted.values()]
        rows.append((subject.name, [record for record in found if record is not None]))
    if asked.as_json:
        click.echo(json.dumps([{"name": n, "tasks": records} for n, records in rows], indent=2))
    else:
        click.echo(table(rows))


def _run(
    work: Work,
    tasks: dict[str, TaskFile],
    wanted: dict[str, tuple[Unit, Record]],
    missing: Sequence[tuple[_Subject, list[Unit]]],
    asked: TaskOptions,
) -> None:
    from ....stages.evaluation.lm_eval.loading import harness
    from ....stages.evaluation.lm_eval.running import Examinee

    needed = {unit.name: unit for _, left in missing for unit in left}
    work.doing("evaluate", "load lm-eval and the tasks' data")
    with harness([_source(task) for task in tasks.values()], download=asked.download) as opened:
        # all of them, before any model is loaded
        loaded = {
            name: opened.load(name, [part.name for part in unit.parts])
            for name, unit in needed.items()
        }
        for subject, left in missing:
            examinee = Examinee(subject.model, work.report)
            for unit in left:
                results = examinee.take(unit.name, loaded[unit.name], asked.limit)
                record = {
                    **wanted[unit.name][1],
                    "model": subject.fingerprint,
                    "data": list(unit.distant),
                    "results": [dataclasses.asdict(result) for result in results],
                    "cut": examinee.cut,
                    "lm_eval": version("lm_eval"),
                }
                add_record(subject.record, record)
            done = ", ".join(unit.name for unit in left)
            work.say(f"evaluate {subject.name}", f"done: {done}: {subject.record}")


def _asked(unit: Unit, limit: int | None) -> Record:
    return {"task": unit.name, "files": unit.fingerprints(), "limit": limit}


def _source(task: TaskFile) -> TaskSource:
    from ....stages.evaluation.lm_eval.loading import TaskSource

    return TaskSource(
        name=task.name,
        path=task.path,
        located=task.data.located,
        distant=task.data.distant,
        metrics=task.metrics,
        aggregations=task.aggregations,
    )


def _subjects(work: Work, names: Sequence[str]) -> list[_Subject]:
    from ....stages.evaluation.lm_eval.running import HarnessModel

    run = work.run
    trained = [name for name in run.student_names if run.student(name).model.exists()]
    if not trained and TEACHER not in names:
        raise ColdstillError(f"{run.root}: no student is trained yet; run coldstill train-student")
    found = []
    for name in dict.fromkeys(names or trained):
        if name == TEACHER:
            found.append(_teacher(work))
            continue
        if name not in trained:
            raise ColdstillError(
                f"{run.root}: student '{name}' is not trained (trained: "
                f"{', '.join(trained) or 'none'}); run coldstill train-student --student {name}"
            )
        folder = run.student(name)
        own_code = work.recipe.trusts(name)
        model = HarnessModel(name=name, folder=str(folder.model), own_code=own_code)
        found.append(_Subject(model=model, fingerprint=_sha256(model), record=folder.tasks))
    return found


def _teacher(work: Work) -> _Subject:
    """The teacher, where its files are; a name on a hub would be a download, and a large one."""
    from ....stages.evaluation.lm_eval.running import HarnessModel

    folder, teacher = work.teacher_model, work.recipe.teacher
    if not Path(folder).is_dir():
        if teacher.is_trained_here:
            raise ColdstillError(f"{folder}: not there yet; run coldstill train-teacher")
        raise ColdstillError(
            f"--student teacher: {folder} is a name on a hub; tasks are run on models that are "
            "folders of this machine"
        )
    model = HarnessModel(
        name=TEACHER,
        folder=folder,
        precision=teacher.dtype,
        attention=teacher.attention,
        own_code=teacher.trust_remote_code,
    )
    return _Subject(model=model, fingerprint=_sha256(model), record=work.run.teacher_tasks)


def _sha256(model: HarnessModel) -> str:
    """Of all that decides what it answers: weights, configuration, tokenizer."""
    return files_sha256(path for path in Path(model.folder).iterdir() if path.is_file())
