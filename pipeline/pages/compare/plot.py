"""What a plot of the page is, and what all of them share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ...results.columns import Row
    from ..charts import Chart


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One picture of a plot."""

    name: str = ""
    detail: str = ""
    chart: Chart


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """One section of the page."""

    title: str
    caption: str
    panels: tuple[Panel, ...]
    """One, or several small ones side by side; none where nothing is known."""
    columns: Literal[2, 3, 4] = 4
    """How many of these stand in a row on a desk."""


def looks(rows: Sequence[Row]) -> dict[str, int | None]:
    """Each model's colour and mark, the same in every plot, that of its student for an export; None
    for teachers."""
    numbers: dict[str, int | None] = {
        row["name"]: number for number, row in enumerate(students_of(rows))
    }
    return {row["name"]: numbers.get(str(row.get("of", row["name"]))) for row in rows}


def outlines(rows: Sequence[Row]) -> dict[str, int | None]:
    """The number of the outline that marks an export, the same for one format everywhere; None for
    all that have a full mark."""
    formats = sorted({row["format"] for row in rows if row["role"] == "export"})
    return {
        row["name"]: formats.index(row["format"]) if row["role"] == "export" else None
        for row in rows
    }


def students_of(rows: Sequence[Row]) -> list[Row]:
    """The rows that are of students: exports of one were never trained."""
    return [row for row in rows if row["role"] == "student"]


def left_out(names: Sequence[str], why: str) -> str:
    """A sentence for a caption: which models are not drawn, and why."""
    return f" Left out: {', '.join(names)} ({why})." if names else ""
