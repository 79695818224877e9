"""The description of a plot as plain data, and the looks that tell its series apart."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Points = tuple[tuple[float | None, float | None], ...]
"""Pairs of x and y. A pair with None, NaN or infinity is not drawn and breaks a line."""


@dataclass(frozen=True, slots=True)
class Axis:
    title: str
    """The quantity and its unit."""
    scale: Literal["linear", "auto"] = "linear"
    """`auto` is logarithmic if all values are positive and span a decade or more."""
    form: Literal["plain", "short", "percent"] = "plain"
    """Format of the tick labels: 1,500,000 or 1.5M or 15%."""
    low: float | None = None
    """Start of the axis; None puts it a little below the smallest value."""
    high: float | None = None
    """End of the axis, where lines are cut off; None puts it a little above the largest value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """The points of one model."""

    name: str
    points: Points
    look: int | None = 0
    """Number of its colour, mark and dashes; None is the grey of a teacher."""
    line: bool = False
    """Whether a line joins the points."""
    marks: bool = True
    """Whether each point has a mark."""
    notes: tuple[str, ...] = ()
    """Tooltip of each point."""
    label: str = ""
    """Text beside the last point; empty for the name."""
    hollow: int | None = None
    """Number of the outline that replaces the filled mark, used for exports."""
    joined_to: str = ""
    """Name of the series whose last point is joined to this one by a thin line."""


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar of a histogram, in the units of the axes."""

    start: float
    end: float
    height: float


@dataclass(frozen=True, slots=True)
class Level:
    """A horizontal line with a name."""

    name: str
    value: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    label: str
    """Text alternative for readers who do not see the plot."""
    x: Axis
    y: Axis
    series: tuple[Series, ...] = ()
    levels: tuple[Level, ...] = ()
    bars: tuple[Bar, ...] = ()
    diagonal: bool = False
    """Whether the line y = x is drawn."""
    named: bool = True
    """Whether names stand beside points and line ends, where there is room."""
    width: int = 544
    height: int = 330
    """Size of the picture in pixels."""


COLOURS = 6
"""Colours in `plots.css`; they stay apart for colour-blind readers in both themes."""
_DASHES = ((), (7, 3.5), (2, 2.5), (9, 3, 2, 3))
_REFERENCE = "var(--chart-soft)"


def _polygon(corners: int, turn: float = 0.0, inner: float = 1.0, radius: float = 1.0) -> str:
    """SVG path of a regular polygon around 0; `inner` < 1 makes a star of it."""
    places = []
    for corner in range(corners):
        angle = math.radians(turn + 360 * corner / corners - 90)
        away = radius * (inner if corner % 2 and inner < 1 else 1.0)
        places.append(f"{away * math.cos(angle):.3f},{away * math.sin(angle):.3f}")
    return f"M{'L'.join(places)}Z"


_MARKS = (
    "M-.9,0A.9,.9,0,1,1,.9,0A.9,.9,0,1,1,-.9,0Z",
    _polygon(4, 45, radius=1.15),
    _polygon(4, radius=1.25),
    _polygon(3, radius=1.3),
    _polygon(3, 180, radius=1.3),
    _polygon(5, radius=1.1),
)
_STAR = _polygon(10, inner=0.5, radius=1.3)


def colour(look: int | None) -> str:
    return _REFERENCE if look is None else f"var(--c{look % COLOURS})"


def dashes(look: int | None) -> tuple[float, ...]:
    """Dash pattern of a line; empty for a solid line."""
    return (4, 3) if look is None else _DASHES[look // COLOURS % len(_DASHES)]


def mark(look: int | None, hollow: int | None = None) -> str:
    """SVG path of a mark, about 2 units wide; `hollow` names another outline to use instead."""
    if hollow is not None:
        return _MARKS[hollow % len(_MARKS)]
    # each round of colours uses the next mark, so that no pair comes twice
    return _STAR if look is None else _MARKS[(look + look // COLOURS) % len(_MARKS)]
