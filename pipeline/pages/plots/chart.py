"""The description of a plot: plain data, without anything of the library that draws it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Points = tuple[tuple[float | None, float | None], ...]
"""Pairs of x and y. A pair with None, NaN or infinity is not drawn and breaks a line."""


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis."""

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
    """One plot."""

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
