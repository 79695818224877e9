"""A chart as SVG: margins from what stands in them, then axes, series and names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .labels import SIZE, Box, beside_points, clipped, spread, text_width
from .looks import dashes, look_class, mark, swatch
from .markup import Markup, element, joined, number
from .scale import drawable, make_scale

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .figure import Chart, Series
    from .scale import Scale

STYLE = (Path(__file__).parent / "charts.css").read_text(encoding="utf-8")
"""For the page that holds charts, once."""

_TOP, _BOTTOM, _RIGHT = 24.0, 42.0, 14.0
"""Pixels for the title of the vertical axis, for ticks and title of the other, and at the right."""
_X_SPACING, _Y_SPACING = 78.0, 44.0
_ROW = 20.0
"""Of a legend."""
_MOST_NAME = 230.0
"""Pixels a name may take; the rest of it is cut out of its middle."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Frame:
    """The area of the data, and its scales."""

    x: Scale
    y: Scale
    box: Box


def draw(chart: Chart) -> Markup:
    """The chart as an `svg` element.

    It is as wide as the chart says, never wider than its place, and taller by its legend.
    """
    drawn = [(one, _known(one)) for one in chart.series]
    at_ends = chart.names == "direct" and any(one.line for one in chart.series)
    right = _RIGHT
    if at_ends:
        longest = max(text_width(one.name) for one in chart.series)
        room = min(longest, _MOST_NAME, 0.3 * chart.width)
        # half a name says nothing: where there is no room, a legend does
        at_ends = room >= min(longest, 110.0)
        right = room + 14 if at_ends else _RIGHT
    frame = _frame(chart, [points for _, points in drawn], right)
    names = _end_names(drawn, frame, right - 14) if at_ends else _point_names(chart, drawn, frame)
    shown = [] if names or chart.names == "none" else [one for one, _ in drawn]
    legend, tall = _legend(shown, chart)
    content = (
        _axes(chart, frame),
        _background(chart, frame),
        _lines(drawn, frame),
        *(_marks(one, points, frame) for one, points in drawn),
        *(names or ()),
        legend,
    )
    height = chart.height + tall
    return element(
        "svg",
        *content,
        cls="chart",
        viewBox=f"0 0 {number(chart.width)} {number(height)}",
        width=chart.width,
        height=height,
        role="img",
        aria_label=chart.label,
    )


def _known(series: Series) -> list[tuple[float, float] | None]:
    """Points that can be drawn; None where one cannot."""
    found: list[tuple[float, float] | None] = []
    for x, y in series.points:
        x, y = drawable(x), drawable(y)
        found.append(None if x is None or y is None else (x, y))
    return found


def _frame(
    chart: Chart, series: Sequence[Sequence[tuple[float, float] | None]], right: float
) -> _Frame:
    known = [point for points in series for point in points if point is not None]
    xs, ys = [x for x, _ in known], [y for _, y in known]
    xs += chart.bars.edges if chart.bars else ()
    ys += [level.value for level in chart.levels if drawable(level.value) is not None]
    top, bottom = _TOP, chart.height - _BOTTOM
    y = make_scale(chart.y, ys, bottom, top, _Y_SPACING)
    left = max([text_width(text) for _, text in y.ticks], default=0.0) + 12
    x = make_scale(chart.x, xs, left, chart.width - right, _X_SPACING)
    return _Frame(x=x, y=y, box=Box(left, top, chart.width - right, bottom))


def _axes(chart: Chart, frame: _Frame) -> Markup:
    box, parts = frame.box, []
    for value, text in frame.y.ticks:
        y = frame.y.place(value)
        parts += [
            element("line", cls="grid", x1=box.left, x2=box.right, y1=y, y2=y),
            element("text", text, x=box.left - 7, y=y + 0.35 * SIZE, text_anchor="end"),
        ]
    for value, text in frame.x.ticks:
        x = frame.x.place(value)
        # a text at the border stays on the picture
        half = text_width(text) / 2
        middle = min(max(x, half), chart.width - half)
        parts += [
            element("line", cls="edge", x1=x, x2=x, y1=box.bottom, y2=box.bottom + 4),
            element("text", text, x=middle, y=box.bottom + 17, text_anchor="middle"),
        ]
    floor = element("line", cls="edge", x1=box.left, x2=box.right, y1=box.bottom, y2=box.bottom)
    titles = (
        element("text", chart.y.title, x=0, y=SIZE),
        element("text", chart.x.title, x=box.right, y=box.bottom + 35, text_anchor="end"),
    )
    return element("g", *parts, floor, *titles, cls="axes")


def _background(chart: Chart, frame: _Frame) -> Markup:
    """What stands behind the series: bars, the diagonal, levels."""
    box, parts = frame.box, []
    if chart.bars is not None:
        most = max(chart.bars.shares, default=0.0) or 1.0
        borders = [frame.x.place(edge) for edge in chart.bars.edges]
        for i, share in enumerate(chart.bars.shares):
            tall = share / most * chart.bars.height * (box.bottom - box.top)
            wide = max(0.5, borders[i + 1] - borders[i] - 1)
            place = {"x": borders[i] + 0.5, "y": box.bottom - tall}
            parts.append(element("rect", cls="bar", **place, width=wide, height=tall))
    if chart.diagonal:
        low = max(frame.x.low, frame.y.low)
        high = min(frame.x.high, frame.y.high)
        x1, x2 = frame.x.place(low), frame.x.place(high)
        y1, y2 = frame.y.place(low), frame.y.place(high)
        parts.append(element("line", cls="diagonal", x1=x1, x2=x2, y1=y1, y2=y2))
    for level in chart.levels:
        if drawable(level.value) is not None:
            y = frame.y.place(level.value)
            name = clipped(level.name, box.right - box.left)
            parts += [
                element("line", cls="level", x1=box.left, x2=box.right, y1=y, y2=y),
                element("text", name, cls="name", x=box.right, y=y - 5, text_anchor="end"),
            ]
    return element("g", *parts)


def _lines(
    drawn: Sequence[tuple[Series, list[tuple[float, float] | None]]], frame: _Frame
) -> Markup:
    """All lines, in a picture of their own that cuts off what leaves the axes."""
    box, parts = frame.box, []
    for one, points in drawn:
        if one.line:
            path = _path(points, frame)
            line = element("path", cls="line", d=path, stroke_dasharray=dashes(one.look))
            title = element("title", one.name)
            group = {"cls": look_class(one.look), "data_series": one.name}
            parts.append(element("g", title, line, **group))
    wide, tall = box.right - box.left, box.bottom - box.top
    return element(
        "svg",
        *reversed(parts),  # the first one is the best: it lies on top
        x=box.left,
        y=box.top,
        width=wide,
        height=tall,
        viewBox=" ".join(number(side) for side in (box.left, box.top, wide, tall)),
        overflow="hidden",
    )


def _path(points: Sequence[tuple[float, float] | None], frame: _Frame) -> str:
    parts, pen = [], "M"
    for point in points:
        if point is None:
            pen = "M"
            continue
        x, y = frame.x.place(point[0]), frame.y.place(point[1])
        parts.append(f"{pen}{number(x)} {number(y)}")
        pen = "L"
    return "".join(parts)


def _marks(series: Series, points: Sequence[tuple[float, float] | None], frame: _Frame) -> Markup:
    """Every point by itself, with what is said of it."""
    if not series.marks:
        return joined()
    small = 3.0 if series.line else 4.5
    parts = []
    for i, point in enumerate(points):
        if point is not None:
            shape = mark(series.look, frame.x.place(point[0]), frame.y.place(point[1]), small)
            note = [element("title", series.notes[i])] if i < len(series.notes) else []
            parts.append(element("g", *note, shape))
    return element("g", *parts, cls=look_class(series.look), data_series=series.name)


def _end_names(
    drawn: Sequence[tuple[Series, list[tuple[float, float] | None]]], frame: _Frame, room: float
) -> list[Markup]:
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


def _point_names(
    chart: Chart,
    drawn: Sequence[tuple[Series, list[tuple[float, float] | None]]],
    frame: _Frame,
) -> list[Markup]:
    """Beside the last point of each series, if there is room for all names."""
    if chart.names != "direct" or any(one.line for one in chart.series):
        return []
    ends = [(one, points[-1]) for one, known in drawn if (points := [p for p in known if p])]
    names = [clipped(one.name, min(_MOST_NAME, 0.4 * chart.width)) for one, _ in ends]
    points = [(frame.x.place(x), frame.y.place(y)) for _, (x, y) in ends]
    box = frame.box
    taken = []
    for level in chart.levels:
        y, wide = frame.y.place(level.value), text_width(level.name)
        taken += [Box(box.left, y - 2, box.right, y + 2)]
        taken += [Box(box.right - wide, y - 5 - SIZE, box.right, y - 3)]
    whole = Box(box.left + 3, 0, chart.width, box.bottom - 2)
    placed = beside_points(names, points, whole, taken)
    found = []
    for place, (x, y) in zip(placed or (), points, strict=bool(placed)):
        if place.far:
            middle = place.y - 0.35 * SIZE
            found.append(element("line", cls="lead", x1=x, y1=y, x2=place.x, y2=middle))
        found.append(
            element("text", place.text, cls="name", x=place.x, y=place.y, text_anchor=place.anchor)
        )
    return found


def _legend(series: Sequence[Series], chart: Chart) -> tuple[Markup, float]:
    """Samples and names in rows below the picture, and the height of all rows."""
    parts, x, row = [], 0.0, 0
    for one in series:
        name = clipped(one.name, chart.width - 32)
        wide = 28 + text_width(name) + 14
        if x and x + wide - 14 > chart.width:
            x, row = 0.0, row + 1
        y = chart.height + 10 + row * _ROW
        sample = swatch(one.look, x, y, line=one.line, marks=one.marks)
        parts += [sample, element("text", name, cls="name", x=x + 28, y=y + 0.35 * SIZE)]
        x += wide
    return element("g", *parts, cls="legend"), (row + 1) * _ROW if parts else 0.0
