"""Results of tasks on disk, and side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ....data.errors import ColdstillError
from ....data.files import read_json, write_json

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ...recipe.run_folder import StudentFolder

Record = dict[str, Any]
"""One unit, as `tasks.json` holds it: what was asked (`task`, `files`, `limit`), and what came of
it (`results`: the task's own, or a group's and then those of its parts)."""

_ASKED = ("task", "files", "limit")
_KEYS = (*_ASKED, "results", "lm_eval")


def task_scores(student_folder: StudentFolder) -> dict[str, float]:
    """The main metric of every task that a student has taken, by the task's name; that over most
    examples where there are several. Empty if it has taken none.

    Raises
        ColdstillError: its tasks.json is damaged
    """
    best: dict[str, tuple[int, float]] = {}
    for record in _all_records(student_folder.tasks):
        for result in shown(record):
            score = main_score(result)
            value = None if score is None else score["value"]
            examples = result["examples"]
            if value is not None and examples >= best.get(result["task"], (0, 0.0))[0]:
                best[result["task"]] = (examples, float(value))
    return {task: value for task, (_, value) in best.items()}


def read_records(path: Path, model: str) -> list[Record]:
    """What is there of a model with this fingerprint; figures of another say nothing of it.

    Raises
        ColdstillError: the file is damaged
    """
    return [record for record in _all_records(path) if record.get("model") == model]


def find(records: Sequence[Record], asked: Record) -> Record | None:
    """The record of what is asked, if it is among them."""
    wanted = [asked[key] for key in _ASKED]
    return next((r for r in records if [r[key] for key in _ASKED] == wanted), None)


def add_record(path: Path, record: Record) -> None:
    """Write one more, beside those that other commands may have written since."""
    kept = read_records(path, record["model"])
    if find(kept, record) is None:
        write_json(path, [*kept, record])


def shown(record: Record) -> list[Record]:
    """The results that get a column: a group's own, or its parts' if it adds nothing up."""
    first, *parts = record["results"]
    return [first] if first["main"] is not None or not parts else [r for r in parts if r["main"]]


def main_score(result: Record) -> Record | None:
    """Value and standard error of a result's main metric."""
    score: Record | None = result["metrics"].get(result["main"])
    return score


def table(rows: Sequence[tuple[str, Sequence[Record]]]) -> str:
    """For a terminal: a row for each model, a column for each task's main metric."""
    titles: dict[str, None] = {}
    cells: list[dict[str, str]] = []
    for name, records in rows:
        row = {"model": name}
        for result in (result for record in records for result in shown(record)):
            title = f"{result['task']} {result['main']}"
            row[title] = _cell(main_score(result))
        titles.update(dict.fromkeys(row))
        cells.append(row)
    lines = [list(titles), *[[row.get(title, "-") for title in titles] for row in cells]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(titles))]
    rule = ["-" * width for width in widths]
    return "\n".join(
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(pairs)).rstrip()
        for pairs in (list(zip(line, widths, strict=True)) for line in [lines[0], rule, *lines[1:]])
    )


def _cell(score: Record | None) -> str:
    if score is None or score["value"] is None:
        return "-"
    error = "" if score["stderr"] is None else f" ± {_figure(score['stderr'])}"
    return f"{_figure(score['value'])}{error}"


def _figure(value: float) -> str:
    return f"{value:,.2f}" if abs(value) >= 100 else f"{value:z.4f}"


def _all_records(path: Path) -> list[Record]:
    if not path.exists():
        return []
    records = read_json(path)
    if not isinstance(records, list) or not all(
        isinstance(record, dict) and all(key in record for key in _KEYS) for record in records
    ):
        raise ColdstillError(f"{path}: damaged; delete it and run coldstill evaluate --tasks again")
    return records
