"""Runs the tasks that a model has no record of, and prints all results."""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ....data.errors import ColdstillError
from ....data.files import files_sha256
from .records import Question, TaskRecord, add_record, read_records, table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ....stages.evaluation.lm_eval.running import EvaluatedModel
    from ....stages.evaluation.lm_eval.task_files import TaskFile, Unit
    from ...recipe.work import Work
    from .options import TaskOptions

TEACHER = "teacher"
"""Name of the teacher on the command line. No student can have it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Subject:
    """A model to evaluate."""

    model: EvaluatedModel
    record: Path
    fingerprint: str

    def answers(self, questions: Sequence[Question]) -> dict[str, TaskRecord]:
        """Records of those questions that have one, by task."""
        records = read_records(self.record, self.fingerprint)
        return {q.task: r for q in questions for r in reversed(records) if r.answers(q)}


def evaluate_on_tasks(work: Work, names: Sequence[str], options: TaskOptions) -> None:
    """Run tasks on the named students, or on all trained ones, and print the results.

    Raises
        ColdstillError: lm-eval is not installed, a student is not trained, a task file or its data
            cannot be read, or lm-eval fails on a task
    """
    from ....stages.evaluation.lm_eval.loading import expect_lm_eval
    from ....stages.evaluation.lm_eval.task_files import read_tasks, units

    expect_lm_eval()
    tasks = read_tasks(options.paths)
    found = {unit.name: unit for unit in units(tasks)}
    questions = [
        Question(task=name, files=unit.fingerprints(), limit=options.limit)
        for name, unit in found.items()
    ]
    work.doing("evaluate", "read the models' weights for their fingerprints")
    subjects = _subjects(work, names)
    missing = []
    for subject in subjects:
        answers = subject.answers(questions)
        if answers:
            note = f"already done: {', '.join(answers)}: {subject.record}"
            work.say(f"evaluate {subject.model.name}", note)
        if left := [question for question in questions if question.task not in answers]:
            missing.append((subject, left))
    if missing:
        _run(work, tasks, found, missing, download=options.download)
    rows = [(s.model.name, list(s.answers(questions).values())) for s in subjects]
    if options.as_json:
        printed = [{"name": name, "tasks": [asdict(r) for r in records]} for name, records in rows]
        click.echo(json.dumps(printed, indent=2))
    else:
        click.echo(table(rows))


def _run(
    work: Work,
    tasks: Mapping[str, TaskFile],
    found: Mapping[str, Unit],
    missing: Sequence[tuple[_Subject, list[Question]]],
    *,
    download: bool,
) -> None:
    """Run the missing questions of each model, and record each result at once."""
    from ....stages.evaluation.lm_eval.loading import load_units, offline
    from ....stages.evaluation.lm_eval.running import TaskRunner

    needed = {question.task: found[question.task] for _, left in missing for question in left}
    work.doing("evaluate", "load lm-eval and the tasks' data")
    with contextlib.nullcontext() if download else offline():
        # all data before any model, so that missing data are reported at once
        loaded = load_units(tasks.values(), needed.values(), download=download)
        for subject, left in missing:
            runner = TaskRunner(subject.model, work.report)
            for question in left:
                results = runner.run(question.task, loaded[question.task], question.limit)
                record = TaskRecord(
                    **asdict(question),
                    model=subject.fingerprint,
                    data=needed[question.task].remote,
                    results=tuple(results),
                    cut=runner.cut,
                    lm_eval=version("lm_eval"),
                )
                add_record(subject.record, record)
            done = ", ".join(question.task for question in left)
            work.say(f"evaluate {subject.model.name}", f"done: {done}: {subject.record}")


def _subjects(work: Work, names: Sequence[str]) -> list[_Subject]:
    from ....stages.evaluation.lm_eval.running import EvaluatedModel

    run = work.run
    trained = [name for name in run.student_names if run.student(name).model.exists()]
    if not trained and TEACHER not in names:
        raise ColdstillError(f"{run.root}: no student is trained yet; run coldstill train-student")
    found = []
    for name in dict.fromkeys(names or trained):
        if name == TEACHER:
            model, record = _teacher(work), run.teacher_tasks
        elif name in trained:
            folder = run.student(name)
            own_code = work.recipe.trusts(name)
            model = EvaluatedModel(name=name, folder=str(folder.model), own_code=own_code)
            record = folder.tasks
        else:
            raise ColdstillError(
                f"{run.root}: student '{name}' is not trained (trained: "
                f"{', '.join(trained) or 'none'}); run coldstill train-student --student {name}"
            )
        # weights, configuration and tokenizer: all that decides its answers
        files = (path for path in Path(model.folder).iterdir() if path.is_file())
        found.append(_Subject(model=model, record=record, fingerprint=files_sha256(files)))
    return found


def _teacher(work: Work) -> EvaluatedModel:
    """The teacher from a local folder. It is not downloaded from a hub."""
    from ....stages.evaluation.lm_eval.running import EvaluatedModel

    folder, teacher = work.teacher_model, work.recipe.teacher
    if not Path(folder).is_dir():
        if teacher.is_trained_here:
            raise ColdstillError(f"{folder}: does not exist yet; run coldstill train-teacher")
        raise ColdstillError(
            f"--student teacher: {folder} is a name on a hub; tasks run only on models in local "
            "folders"
        )
    return EvaluatedModel(
        name=TEACHER,
        folder=folder,
        precision=teacher.dtype,
        attention=teacher.attention,
        own_code=teacher.trust_remote_code,
    )
