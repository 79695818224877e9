"""The two tables of models on a page: how good each is, and what it costs to run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...results.caveats import heldout_groups, machine_groups, missing, notes
from ...results.columns import COST, QUALITY, groups_of
from ...results.figures import students_of
from .plot import looks, outlines

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ...results.columns import Column
    from ...results.figures import ModelFigures

_QUALITY = (
    "Measured on held-out text. Bold: the best student of each column, where figures compare and "
    "differ. Cached: bytes for each position of the stores a student was trained from. Loss is the "
    "mean of -log q(next token) in nats, perplexity its exponential, bits/byte the same loss for "
    "each byte of text. KL (from teacher to model, in nats), agreement (same most probable token) "
    "and acceptance (share of tokens that speculative decoding accepts) compare with the teacher; "
    "ECE is the calibration error."
)
_COST = (
    "Size is that of the weights on disk; FLOPs are those of one token. One text at once (batch "
    "1): prompt tokens read in a second, time to the first token, median and 95th percentile of "
    "the time of a further token, and peak memory, weights included. Eight texts at once (batch "
    "8): time of a step, and tokens of all texts in a second; exports are timed with one text."
)


@dataclass(frozen=True, slots=True)
class TableView:
    """A table on a page."""

    title: str
    label: str
    caption: str
    columns: tuple[Column, ...]


def table_values(rows: Sequence[ModelFigures]) -> dict[str, Any]:
    """Both tables of a page, as values for its template."""
    machines = "; ".join(machine_groups(rows))
    where = f" Measured on {machines}." if machines else ""
    cost = " ".join([_COST + where, *notes(rows), *missing(rows)])
    views = [
        TableView("Figures", "Quality of all models", _QUALITY, QUALITY),
        TableView("What it costs to run", "Cost of all models", cost, COST),
    ]
    functions = {"best": best, "groups": groups_of, "looks": looks, "outlines": outlines}
    return {"rows": rows, "views": views, **functions}


def best(columns: tuple[Column, ...], rows: Sequence[ModelFigures]) -> set[tuple[str, str]]:
    """Model and key of the best figure of every column among students; all that read alike.

    Nothing is marked where all figures read alike or do not compare: quality on different held-out
    stores, speed and memory on different machines. Exports are never marked, as their gain is that
    of their format.
    """
    students = students_of(rows)
    comparable = {
        "model": True,
        "text": len(heldout_groups(rows)) < 2,
        "machine": len(machine_groups(students)) < 2,
    }
    found: set[tuple[str, str]] = set()
    for column in columns:
        known = [row for row in students if column.value(row) is not None]
        if not column.better or not comparable[column.depends_on]:
            continue
        if len({column.cell(row) for row in known}) > 1:
            pick = min if column.better == "less" else max
            first = column.cell(pick(known, key=column.value))
            found |= {(row.name, column.key) for row in known if column.cell(row) == first}
    return found
