"""The two tables of models as text, for terminals and for Markdown."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from ..units import display_width
from .caveats import machine_groups, missing, notes, warnings
from .columns import COST, QUALITY, groups_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .columns import Column
    from .figures import ModelFigures

_NOTE = 100
"""Width of a line below the tables, in characters."""


def cost_title(rows: Sequence[ModelFigures]) -> str:
    """Title of the table of costs, with the machines that models were timed on."""
    machines = "; ".join(machine_groups(rows))
    return f"What it costs to run ({machines})" if machines else "What it costs to run"


def tables(rows: Sequence[ModelFigures]) -> str:
    """Both tables for a terminal, numbers to the right, and notes below."""
    parts = [_aligned(QUALITY, rows), f"{cost_title(rows)}\n{_aligned(COST, rows)}"]
    wrapped = [textwrap.fill(note, _NOTE) for note in [*notes(rows), *missing(rows)]]
    return "\n\n".join([*parts, "\n".join(wrapped)] if wrapped else parts)


def markdown(rows: Sequence[ModelFigures]) -> str:
    """Warnings, both tables and notes as a part of a Markdown document."""
    parts = [*(f"**{warning}**\n" for warning in warnings(rows)), _marked_down(QUALITY, rows)]
    parts += [f"{cost_title(rows)}:\n", _marked_down(COST, rows)]
    return "\n".join([*parts, *(f"{note}\n" for note in [*notes(rows), *missing(rows)])])


def _aligned(columns: tuple[Column, ...], rows: Sequence[ModelFigures]) -> str:
    lines = [["model", *(one.title for one in columns)]]
    for row in rows:
        name = ("  " if row.is_export else "") + row.short_name
        lines.append([name, *(one.cell(row) for one in columns)])
    widths = [max(map(display_width, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    text = ["  ".join(map(_padded, line, widths, range(len(line)))).rstrip() for line in lines]
    above = _group_line(columns, widths)
    return "\n".join([above, *text] if above else text)


def _padded(text: str, width: int, column: int) -> str:
    """The first column to the left, others to the right; wide letters take two places."""
    blank = " " * (width - display_width(text))
    return blank + text if column else text + blank


def _group_line(columns: tuple[Column, ...], widths: Sequence[int]) -> str:
    """The names of groups, each over the middle of its columns."""
    parts = [" " * widths[0]]
    place = 1
    for group, count in groups_of(columns):
        wide = sum(widths[place : place + count]) + 2 * (count - 1)
        parts.append(f" {group} ".center(wide, "-") if group else " " * wide)
        place += count
    return "  ".join(parts).rstrip()


def _marked_down(columns: tuple[Column, ...], rows: Sequence[ModelFigures]) -> str:
    titles = [f"{one.title} ({one.group})" if one.group else one.title for one in columns]
    # Markdown drops blanks at the start of a cell: an export is shown by its whole name
    cells = [[row.name, *(one.cell(row) for one in columns)] for row in rows]
    lines = [["model", *titles], ["---", *["---:"] * len(columns)], *cells]
    return "".join(f"| {' | '.join(_cell(cell) for cell in line)} |\n" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
