"""The two tables of models for terminals and Markdown: how good each is, what it costs to run."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from ..pages.inspect.glyphs import display_width
from .caveats import machine_groups, missing, notes, warnings
from .columns import COST, QUALITY, groups_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .columns import Column, Row

_NOTE = 100
"""Letters in a line of what stands below."""
COST_TITLE = "What it costs to run"


def tables(rows: Sequence[Row]) -> str:
    """For a terminal: aligned, numbers to the right; what must be known of them below."""
    machine = "; ".join(machine_groups(rows))
    title = f"{COST_TITLE} ({machine})" if machine else COST_TITLE
    parts = [_aligned(QUALITY, rows), f"{title}\n{_aligned(COST, rows)}"]
    wrapped = [textwrap.fill(note, _NOTE) for note in [*notes(rows), *missing(rows)]]
    return "\n\n".join([*parts, "\n".join(wrapped)] if wrapped else parts)


def _aligned(columns: tuple[Column, ...], rows: Sequence[Row]) -> str:
    lines = [[one.title for one in columns], *[[one.cell(row) for one in columns] for row in rows]]
    widths = [max(display_width(line[i]) for line in lines) for i in range(len(columns))]
    rule = ["-" * width for width in widths]
    text = [
        "  ".join(_padded(c, w, right=i > 0) for i, (c, w) in enumerate(pairs)).rstrip()
        for pairs in (list(zip(line, widths, strict=True)) for line in [lines[0], rule, *lines[1:]])
    ]
    above = _group_line(columns, widths)
    return "\n".join([above, *text] if above else text)


def _padded(text: str, width: int, *, right: bool) -> str:
    """As wide on a terminal as that, whose wide letters take two columns."""
    blank = " " * (width - display_width(text))
    return blank + text if right else text + blank


def _group_line(columns: tuple[Column, ...], widths: Sequence[int]) -> str:
    """The names of groups, each over the middle of its columns."""
    parts: list[str] = []
    place = 0
    for group, count in groups_of(columns):
        wide = sum(widths[place : place + count]) + 2 * (count - 1)
        parts.append(f" {group} ".center(wide, "-") if group else " " * wide)
        place += count
    return "  ".join(parts).rstrip()


def markdown(rows: Sequence[Row]) -> str:
    """The same as a Markdown document's part."""
    machine = "; ".join(machine_groups(rows))
    told = [f"**{warning}**\n" for warning in warnings(rows)]
    title = f"{COST_TITLE} ({machine})" if machine else COST_TITLE
    parts = [*told, _marked_down(QUALITY, rows), f"{title}:\n"]
    parts += [_marked_down(COST, rows), *(f"{note}\n" for note in [*notes(rows), *missing(rows)])]
    return "\n".join(parts)


def _marked_down(columns: tuple[Column, ...], rows: Sequence[Row]) -> str:
    titles = (f"{one.title} ({one.group})" if one.group else one.title for one in columns)
    head = "| " + " | ".join(titles) + " |\n"
    rule = "|---" + "|---:" * (len(columns) - 1) + "|\n"
    lines = []
    for row in rows:
        # blanks at the beginning of a cell are lost: an export is told by its whole name
        cells = [row["name"], *(one.cell(row) for one in columns[1:])]
        lines.append(" | ".join(cell.replace("|", "\\|") for cell in cells))
    return head + rule + "".join(f"| {line} |\n" for line in lines)
