"""What stands in a chart to tell its parts apart: names at ends and points, and legends."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .labels import SIZE, Box, beside_points, clipped, spread, text_width
from .looks import swatch
from .markup import Markup, element
from .scale import drawable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .figure import Chart, Series
    from .scale import Scale

Drawn = tuple["Series", list[tuple[float, float] | None]]
"""A series, and of its points those that can be drawn; None where one cannot."""

_ROW = 20.0
"""Of a legend."""
_MOST_NAME = 230.0
"""Pixels a name may take; the rest of it is cut out of its middle."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """The area of the data, and its scales."""

    x: Scale
    y: Scale
    box: Box


def room_at_ends(chart: Chart, drawn: Sequence[Drawn]) -> float | None:
    """Pixels for names beside the right ends of lines, or None where they cannot stand there."""
    if chart.names != "direct" or not _end_together(drawn):
        return None
    longest = max(text_width(one.name) for one in chart.series)
    room = min(longest, _MOST_NAME, 0.3 * chart.width)
    # half a name says nothing: where there is no room, a legend does
    return room if room >= min(longest, 110.0) else None


def _end_together(drawn: Sequence[Drawn]) -> bool:
    """Whether there are lines, and all of them reach the right edge: then names stand beside it."""
    if not any(one.line and any(points) for one, points in drawn):
        return False
    ends = [
        (known[0][0], known[-1][0]) for _, points in drawn if (known := [p for p in points if p])
    ]
    least, most = min(end[0] for end in ends), max(end[1] for end in ends)
    return all(end >= most - 0.1 * (most - least) for _, end in ends)


def level_names(chart: Chart, frame: Frame) -> list[Markup]:
    """At the right, above its line."""
    return [
        element("text", name, cls="name", x=frame.box.right, y=y, text_anchor="end")
        for name, y in _level_places(chart, frame)
    ]


def _level_places(chart: Chart, frame: Frame) -> list[tuple[str, float]]:
    """What each level is called and the height of that name, apart from one another."""
    levels = [level for level in chart.levels if drawable(level.value) is not None]
    box = frame.box
    heights = [frame.y.place(level.value) - 5 for level in levels]
    apart = spread(heights, 15.0, box.top, box.bottom - 5)
    names = [clipped(level.name, box.right - box.left) for level in levels]
    return list(zip(names, apart, strict=True))


def end_names(drawn: Sequence[Drawn], frame: Frame, room: float) -> list[Markup]:
    """Beside the right end of each line, apart from one another."""
    ends = [(one, points[-1]) for one, known in drawn if (points := [p for p in known if p])]
    box = frame.box
    places = [min(max(frame.y.place(point[1]), box.top), box.bottom) for _, point in ends]
    found = []
    for (one, point), place, y in zip(
        ends, places, spread(places, 15.0, box.top, box.bottom), strict=True
    ):
        x = frame.x.place(point[0])
        if abs(place - y) > 2 or box.right - x > 8:
            found.append(element("line", cls="lead", x1=x + 1, y1=place, x2=box.right + 6, y2=y))
        name = clipped(one.name, room)
        found.append(element("text", name, cls="name", x=box.right + 9, y=y + 0.35 * SIZE))
    return found


def point_names(chart: Chart, drawn: Sequence[Drawn], frame: Frame) -> tuple[list[Markup], bool]:
    """Beside the last point of each series, and whether all have one; of `direct` names all or
    none."""
    if chart.names not in ("direct", "room") or any(one.line for one in chart.series):
        return [], False
    ends = [(one, points[-1]) for one, known in drawn if (points := [p for p in known if p])]
    # a name that stands alone says most where it is what others are joined to
    ends.sort(key=lambda end: bool(end[0].joined_to))
    names = [clipped(one.label or one.name, min(_MOST_NAME, 0.4 * chart.width)) for one, _ in ends]
    points = [(frame.x.place(x), frame.y.place(y)) for _, (x, y) in ends]
    box = frame.box
    taken = [piece for join in joins(drawn, frame) for piece in _pieces(join)]
    for level in chart.levels:
        if drawable(level.value) is not None:
            y = frame.y.place(level.value)
            taken.append(Box(box.left, y - 2, box.right, y + 2))
    for name, y in _level_places(chart, frame):
        taken.append(Box(box.right - text_width(name), y - SIZE, box.right, y + 2))
    whole = Box(box.left + 3, 0, chart.width, box.bottom - 2)
    placed = beside_points(names, points, whole, taken)
    complete = None not in placed
    if not complete and chart.names == "direct":
        return [], False
    found = []
    for place, (x, y) in zip(placed, points, strict=True):
        if place is None:
            continue
        if place.far:
            middle = place.y - 0.35 * SIZE
            found.append(element("line", cls="lead", x1=x, y1=y, x2=place.x, y2=middle))
        found.append(
            element("text", place.text, cls="name", x=place.x, y=place.y, text_anchor=place.anchor)
        )
    return found, complete


@dataclass(frozen=True, slots=True, kw_only=True)
class Join:
    """A thin line from one point to another."""

    look: int | None
    start: tuple[float, float]
    end: tuple[float, float]
    """In pixels."""


def joins(drawn: Sequence[Drawn], frame: Frame) -> list[Join]:
    """The thin lines between series of which both ends can be drawn."""
    ends = {one.name: points[-1] for one, known in drawn if (points := [p for p in known if p])}
    places = {name: (frame.x.place(x), frame.y.place(y)) for name, (x, y) in ends.items()}
    return [
        Join(look=one.look, start=places[one.joined_to], end=places[one.name])
        for one, _ in drawn
        if one.name in places and one.joined_to in places
    ]


def _pieces(join: Join) -> list[Box]:
    """What such a line covers."""
    count = max(1, round(math.dist(join.start, join.end) / 6))
    found = []
    for step in range(count + 1):
        x, y = (a + (b - a) * step / count for a, b in zip(join.start, join.end, strict=True))
        found.append(Box(x - 3, y - 1, x + 3, y + 1))
    return found


def legend(series: Sequence[Series], chart: Chart) -> tuple[Markup, float]:
    """Samples and names in rows below the picture, and the height of all rows."""
    parts, x, row = [], 0.0, 0
    for one in series:
        name = clipped(one.name, chart.width - 32)
        wide = 28 + text_width(name) + 14
        if x and x + wide - 14 > chart.width:
            x, row = 0.0, row + 1
        y = chart.height + 10 + row * _ROW
        sample = swatch(one.look, x, y, line=one.line, marks=one.marks, hollow=one.hollow)
        parts += [sample, element("text", name, cls="name", x=x + 28, y=y + 0.35 * SIZE)]
        x += wide
    return element("g", *parts, cls="legend"), (row + 1) * _ROW if parts else 0.0
