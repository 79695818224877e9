"""What a chart is: the interface of this package."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Points = tuple[tuple[float | None, float | None], ...]


@dataclass(frozen=True, slots=True)
class Axis:
    """One direction."""

    title: str
    """What it measures, with its unit."""
    scale: Literal["linear", "log", "auto"] = "linear"
    """`auto` is logarithmic where values span a decade or more and none is 0 or less; so is `log`,
    but it takes any span."""
    form: Literal["plain", "short", "percent"] = "plain"
    """How its ticks are written: 1,500,000, or 1.5M, or shares as 15%."""
    low: float | None = None
    """Where it begins; a little before the smallest value unless given."""
    high: float | None = None
    """Likewise; lines that leave the axes are cut off there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """Points that belong together."""

    name: str
    points: Points
    look: int | None = 0
    """Its colour, mark and dashes, the same in every chart; None for a reference without colour."""
    line: bool = False
    """Whether points are joined,"""
    marks: bool = True
    """and whether they are seen."""
    notes: tuple[str, ...] = ()
    """What is said of each point where it is pointed at; nothing unless given."""
    label: str = ""
    """What is written beside its point; its name unless given."""
    hollow: int | None = None
    """The number of a mark of which only the outline is drawn, instead of that of its look."""
    joined_to: str = ""
    """The series to whose last point a thin line leads from its own; to none unless given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bars:
    """A histogram along the lower edge, in soft ink: what the points rest on."""

    edges: tuple[float, ...]
    """Borders on the horizontal axis, one more than there are bars."""
    shares: tuple[float, ...]
    """Heights; the tallest takes `height` of the picture."""
    height: float = 0.25


@dataclass(frozen=True, slots=True)
class Level:
    """A horizontal line to compare with."""

    name: str
    value: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """A plot."""

    label: str
    """What it shows, for those who do not see it: the text alternative."""
    x: Axis
    y: Axis
    series: tuple[Series, ...]
    levels: tuple[Level, ...] = ()
    bars: Bars | None = None
    diagonal: bool = False
    """Whether the line of y = x is drawn."""
    names: Literal["direct", "room", "legend", "none"] = "direct"
    """Where series are named: beside their points or ends, where there is room for all of them,
    else in a legend below. With `room` those points have names that have room for them, and whoever
    draws the chart says the rest."""
    width: float = 560
    height: float = 340
    """In pixels, of the picture without a legend."""
