"""A store or a shard for a terminal: aligned, at most 100 columns, with two small histograms."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

from .glyphs import COLUMNS, histogram
from .shard import column_lines, shard_table
from .store import table

if TYPE_CHECKING:
    from .glyphs import Glyphs

_NAMES = 11
_HEIGHT = 4
_GAP = 5
ENTROPY_TITLE = "positions by the teacher's entropy, in nats"
MASS_TITLE = "positions by probability inside the head"
_ENTROPY_TICKS = [(0, "0"), (6, "3"), (12, "6"), (18, "9"), (23, "11.5+")]
_MASS_TICKS = [(0, "0%"), (5, "25%"), (10, "50%"), (15, "75%"), (20, "100%")]


def store_text(facts: dict[str, Any], glyphs: Glyphs) -> str:
    """All of `inspect_store.describe`."""
    lines = [*_note(facts), *_aligned(table(facts))]
    if facts["shard"] is not None:
        lines += ["", *column_lines(facts["columns"])]
    if facts["positions"]:
        lines += ["", *_histograms(facts, glyphs)]
    return "\n".join(lines)


def lone_text(facts: dict[str, Any]) -> str:
    """All of `inspect_shard.describe_lone`."""
    return "\n".join(
        [*_note(facts), *_aligned(shard_table(facts)), "", *column_lines(facts["columns"])]
    )


def _note(facts: dict[str, Any]) -> list[str]:
    return [*textwrap.wrap(facts["note"], COLUMNS), ""] if facts["note"] else []


def _aligned(rows: list[tuple[str, str]]) -> list[str]:
    lines = []
    for name, value in rows:
        line = f"{name:<{_NAMES}} "
        for place, part in enumerate(value.split(", ")):
            # between parts only: a path is never cut, and a number stays with its unit
            if place and len(line) + len(part) + 3 > COLUMNS:
                lines.append(line + ",")
                line = " " * (_NAMES + 1) + part
            else:
                line += f"{', ' if place else ''}{part}"
        lines.append(line)
    return lines


def _histograms(facts: dict[str, Any], glyphs: Glyphs) -> list[str]:
    """Side by side; the one of the head only where there is a head."""
    bins = facts["histograms"]
    drawn = [
        _drawn(
            ENTROPY_TITLE,
            bins["entropy"]["positions"],
            _ENTROPY_TICKS,
            glyphs,
        )
    ]
    if facts["manifest"]["capture"]["head"]:
        drawn.append(
            _drawn(
                MASS_TITLE,
                bins["head_mass"]["positions"],
                _MASS_TICKS,
                glyphs,
            )
        )
    widths = [max(len(line) for line in block) for block in drawn]
    return [
        (" " * _GAP).join(line.ljust(w) for line, w in zip(lines, widths, strict=True)).rstrip()
        for lines in zip(*drawn, strict=True)
    ]


def _drawn(
    title: str, counts: list[int], ticks: list[tuple[int, str]], glyphs: Glyphs
) -> list[str]:
    """Two columns a bar; a tick stands below the left end of its bar."""
    axis = ""
    for place, label in ticks:
        axis = axis.ljust(2 * place) + label
    return [title, *histogram(counts, glyphs, height=_HEIGHT), glyphs.rule * 2 * len(counts), axis]
