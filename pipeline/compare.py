"""The comparison: what every model of a run is worth, side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..data.errors import ColdstillError
from ..data.files import read_json, whole_file, write_json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .run import Run

Row = dict[str, Any]

_COLUMNS = (
    ("name", "model"),
    ("parameters", "parameters"),
    ("bytes", "size"),
    ("loss", "loss"),
    ("perplexity", "perplexity"),
    ("kl", "KL"),
    ("agreement", "agreement"),
    ("acceptance", "acceptance"),
    ("ece", "ECE"),
    ("tokens_per_second", "tokens/s"),
    ("peak_memory_bytes", "memory"),
)


def compare(run: Run) -> list[Row]:
    """The teacher's row and one for every evaluated student; also written beside the run.

    Raises
        ColdstillError: nothing is evaluated yet
    """
    evaluated = [n for n in run.student_names if run.student(n).evaluation.exists()]
    if not evaluated:
        raise ColdstillError(f"{run.root}: no student is evaluated yet; run coldstill evaluate")
    teacher = read_json(run.teacher_evaluation)
    students = [read_json(run.student(name).evaluation) for name in evaluated]
    for row, name in zip([teacher, *students], ["", *evaluated], strict=True):
        if not isinstance(row, dict) or any(key not in row for key, _ in _COLUMNS):
            path = run.student(name).evaluation if name else run.teacher_evaluation
            raise ColdstillError(f"{path}: damaged; delete it and run coldstill evaluate")
    rows = [teacher, *sorted(students, key=lambda row: row["loss"])]
    write_json(run.comparison, rows)
    with whole_file(run.comparison.with_suffix(".md")) as scratch:
        scratch.write_text(markdown(rows), encoding="utf-8")
    return rows


def table(rows: Sequence[Row]) -> str:
    """For a terminal: aligned, numbers to the right."""
    lines = [[title for _, title in _COLUMNS], *[_cells(row) for row in rows]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(_COLUMNS))]
    rule = ["-" * width for width in widths]
    return "\n".join(
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(pairs)).rstrip()
        for pairs in (list(zip(line, widths, strict=True)) for line in [lines[0], rule, *lines[1:]])
    )


def markdown(rows: Sequence[Row]) -> str:
    """The same for a page."""
    head = "| " + " | ".join(title for _, title in _COLUMNS) + " |\n"
    rule = "|---" + "|---:" * (len(_COLUMNS) - 1) + "|\n"
    return head + rule + "".join("| " + " | ".join(_cells(row)) + " |\n" for row in rows)


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _cells(row: Row) -> list[str]:
    return [_cell(key, row[key]) for key, _ in _COLUMNS]


def _cell(key: str, value: Any) -> str:
    if key == "name":
        return str(value)
    if key in ("bytes", "peak_memory_bytes"):
        return size(value) if value else "-"  # too little to be measured
    if key in ("parameters", "tokens_per_second"):
        return f"{value:,.0f}"
    if key in ("agreement", "acceptance", "ece"):
        return f"{value:.1%}"
    return f"{value:.2f}" if key == "perplexity" else f"{value:.4f}"
