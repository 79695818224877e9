"""Runs lm-eval task files on trained students; the results are kept in `tasks.json`."""

from __future__ import annotations

import contextlib
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import TypeAdapter, ValidationError
from tabulate import tabulate

from ...data.errors import ColdstillError
from ...data.files import files_sha256, read_json, write_json
from ...stages.evaluation.lm_eval.results import TaskResult  # noqa: TC001 - for pydantic
from ..recipe.tables import TEACHER

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from ...stages.evaluation.lm_eval.running import EvaluatedModel
    from ...stages.evaluation.lm_eval.task_files import TaskFile, Unit
    from ..recipe.work import Work


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What a model was asked. Equal questions have equal results."""

    task: str
    files: dict[str, str]
    """SHA-256 of every file that decides what is asked, by relative path."""
    limit: int | None
    """Number of examples of each task; None for all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskRecord(Question):
    """One entry of `tasks.json`."""

    model: str
    """SHA-256 of the model's folder."""
    data: tuple[str, ...] = ()
    """Data sets on a hub and URLs that the task read."""
    results: tuple[TaskResult, ...]
    """The result of the task, or of a group and then of each task in it."""
    cut: int = 0
    """Requests that were longer than the model's context."""
    lm_eval: str
    """Version of lm-eval."""

    def answers(self, question: Question) -> bool:
        """Whether the record is the result of this question."""
        ours = (self.task, self.files, self.limit)
        return ours == (question.task, question.files, question.limit)

    def shown(self) -> list[TaskResult]:
        """Results with a column in the table: a group without aggregation shows its tasks."""
        first, *tasks = self.results
        return [first] if first.main is not None or not tasks else [r for r in tasks if r.main]


_RECORDS = TypeAdapter(list[TaskRecord])


def read_records(path: Path, model: str) -> list[TaskRecord]:
    """Records of the model with this fingerprint. Records of other models are left out.

    Raises
        ColdstillError: the file is damaged
    """
    if not path.exists():
        return []
    try:
        records = _RECORDS.validate_python(read_json(path))
    except ValidationError as error:
        raise ColdstillError(
            f"{path}: damaged; delete it and run coldstill evaluate --tasks again"
        ) from error
    return [record for record in records if record.model == model]


def add_record(path: Path, record: TaskRecord) -> None:
    """Append a record, unless another process has written the same one."""
    kept = read_records(path, record.model)
    if not any(other.answers(record) for other in kept):
        write_json(path, [asdict(each) for each in (*kept, record)])


def scores_table(rows: Sequence[tuple[str, Sequence[TaskRecord]]]) -> str:
    """One row for each model, one column for each task's main metric."""
    cells = [{"model": name, **dict(_cells(records))} for name, records in rows]
    titles = list(dict.fromkeys(title for row in cells for title in row))
    return tabulate(
        [[row.get(title, "-") for title in titles] for row in cells],
        titles,
        tablefmt="simple",
        colalign=["left", *["right"] * (len(titles) - 1)],
        disable_numparse=True,
    )


def _cells(records: Sequence[TaskRecord]) -> Iterator[tuple[str, str]]:
    for result in (result for record in records for result in record.shown()):
        score = result.metrics.get(result.main or "")
        if score is None or score.value is None:
            text = "-"
        else:
            error = "" if score.stderr is None else f" ± {_figure(score.stderr)}"
            text = f"{_figure(score.value)}{error}"
        yield f"{result.task} {result.main}", text


def _figure(value: float) -> str:
    return f"{value:,.2f}" if abs(value) >= 100 else f"{value:z.4f}"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Subject:
    model: EvaluatedModel
    record: Path
    fingerprint: str

    def answers(self, questions: Sequence[Question]) -> dict[str, TaskRecord]:
        """Records of those questions that have one, by task."""
        records = read_records(self.record, self.fingerprint)
        return {q.task: r for q in questions for r in reversed(records) if r.answers(q)}


def evaluate_on_tasks(
    work: Work, names: Sequence[str], paths: Sequence[Path], *, limit: int | None, download: bool
) -> list[tuple[str, list[TaskRecord]]]:
    """Run tasks on the named students, or on all trained ones; return the results of each model.

    paths     task files, and folders of task files
    limit     number of examples of each task, the first ones; None for all
    download  whether tasks may fetch data that are not on this machine

    Raises
        ColdstillError: lm-eval is not installed, a student is not trained, a task file or its data
            cannot be read, or lm-eval fails on a task
    """
    from ...stages.evaluation.lm_eval.loading import expect_lm_eval
    from ...stages.evaluation.lm_eval.task_files import read_tasks, units

    expect_lm_eval()
    tasks = read_tasks(paths)
    found = {unit.name: unit for unit in units(tasks)}
    questions = [
        Question(task=name, files=unit.fingerprints(), limit=limit) for name, unit in found.items()
    ]
    work.doing("evaluate", "read the models' weights for their fingerprints")
    subjects = _subjects(work, names)
    missing = []
    for subject in subjects:
        answers = subject.answers(questions)
        if answers:
            note = f"already done: {', '.join(answers)}: {subject.record}"
            work.note(f"evaluate {subject.model.name}", note)
        if left := [question for question in questions if question.task not in answers]:
            missing.append((subject, left))
    if missing:
        _run(work, tasks, found, missing, download=download)
    return [(s.model.name, list(s.answers(questions).values())) for s in subjects]


def _run(
    work: Work,
    tasks: Mapping[str, TaskFile],
    found: Mapping[str, Unit],
    missing: Sequence[tuple[_Subject, list[Question]]],
    *,
    download: bool,
) -> None:
    """Run the missing questions of each model, and record each result at once."""
    from ...stages.evaluation.lm_eval.loading import load_units, offline
    from ...stages.evaluation.lm_eval.running import TaskRunner

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
            work.note(f"evaluate {subject.model.name}", f"done: {done}: {subject.record}")


def _subjects(work: Work, names: Sequence[str]) -> list[_Subject]:
    from ...stages.evaluation.lm_eval.running import EvaluatedModel

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
    from ...stages.evaluation.lm_eval.running import EvaluatedModel

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
