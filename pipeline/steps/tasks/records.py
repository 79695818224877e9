"""Results of task files: the records in `tasks.json`, and the table on the terminal."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from pydantic import TypeAdapter, ValidationError
from tabulate import tabulate

from ....data.errors import ColdstillError
from ....data.files import read_json, write_json
from ....stages.evaluation.lm_eval.results import TaskResult  # noqa: TC001 - for pydantic

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path


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


def table(rows: Sequence[tuple[str, Sequence[TaskRecord]]]) -> str:
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
