"""A chart as SVG: margins from what stands in them, then axes, series and names."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .labels import SIZE, Box, text_width
from .looks import dashes, look_class, mark
from .markup import Markup, element, joined, number
from .naming import Frame, end_names, joins, legend, level_names, point_names, room_at_ends
from .scale import drawable, make_scale

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .figure import Chart, Series
    from .naming import Drawn

STYLE = (Path(__file__).parent / "charts.css").read_text(encoding="utf-8")
"""For the page that holds charts, once."""

_TOP, _BOTTOM, _RIGHT = 24.0, 42.0, 14.0
"""Pixels for the title of the vertical axis, for ticks and title of the other, and at the right."""
_X_SPACING, _Y_SPACING = 64.0, 34.0


def draw(chart: Chart) -> Markup:
    """The chart as an `svg` element.

    It is as wide as the chart says, never wider than its place, and taller by its legend.
    """
    return draw_named(chart)[0]


def draw_named(chart: Chart) -> tuple[Markup, bool]:
    """The same, and whether each of its series is named in it."""
    drawn = [(one, _known(one)) for one in chart.series]
    beside = room_at_ends(chart, drawn)
    right = _RIGHT if beside is None else beside + 14
    frame = _frame(chart, [points for _, points in drawn], right)
    if beside is None:
        names, named = point_names(chart, drawn, frame)
    else:
        names, named = end_names(drawn, frame, beside), True
    explained = not named and chart.names in ("direct", "legend")
    below, tall = legend([one for one, _ in drawn] if explained else [], chart)
    content = (
        _axes(chart, frame),
        _background(chart, frame),
        _lines(drawn, frame),
        *_joins(drawn, frame),
        *(_marks(one, points, frame) for one, points in drawn),
        *names,
        below,
    )
    height = chart.height + tall
    picture = element(
        "svg",
        *content,
        cls="chart",
        viewBox=f"0 0 {number(chart.width)} {number(height)}",
        width=chart.width,
        height=height,
        role="img",
        aria_label=chart.label,
    )
    return picture, named or explained


def _known(series: Series) -> list[tuple[float, float] | None]:
    """Points that can be drawn; None where one cannot."""
    found: list[tuple[float, float] | None] = []
    for x, y in series.points:
        x, y = drawable(x), drawable(y)
        found.append(None if x is None or y is None else (x, y))
    return found


def _frame(
    chart: Chart, series: Sequence[Sequence[tuple[float, float] | None]], right: float
) -> Frame:
    known = [point for points in series for point in points if point is not None]
    xs, ys = [x for x, _ in known], [y for _, y in known]
    xs += chart.bars.edges if chart.bars else ()
    ys += [level.value for level in chart.levels if drawable(level.value) is not None]
    top, bottom = _TOP, chart.height - _BOTTOM
    y = make_scale(chart.y, ys, bottom, top, _Y_SPACING)
    left = max([text_width(text) for _, text in y.ticks], default=0.0) + 12
    x = make_scale(chart.x, xs, left, chart.width - right, _X_SPACING)
    return Frame(x=x, y=y, box=Box(left, top, chart.width - right, bottom))


def _axes(chart: Chart, frame: Frame) -> Markup:
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


def _background(chart: Chart, frame: Frame) -> Markup:
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
            parts.append(element("line", cls="level", x1=box.left, x2=box.right, y1=y, y2=y))
    return element("g", *parts, *level_names(chart, frame))


def _lines(drawn: Sequence[Drawn], frame: Frame) -> Markup:
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


def _path(points: Sequence[tuple[float, float] | None], frame: Frame) -> str:
    parts, pen = [], "M"
    for point in points:
        if point is None:
            pen = "M"
            continue
        x, y = frame.x.place(point[0]), frame.y.place(point[1])
        parts.append(f"{pen}{number(x)} {number(y)}")
        pen = "L"
    return "".join(parts)


def _joins(drawn: Sequence[Drawn], frame: Frame) -> list[Markup]:
    """Thin lines between points of one colour."""
    found = []
    for join in joins(drawn, frame):
        (x1, y1), (x2, y2) = join.start, join.end
        look = look_class(join.look)
        found.append(element("line", cls=f"join {look}", x1=x1, y1=y1, x2=x2, y2=y2))
    return found


def _marks(series: Series, points: Sequence[tuple[float, float] | None], frame: Frame) -> Markup:
    """Every point by itself, with what is said of it."""
    if not series.marks:
        return joined()
    small = 3.0 if series.line else 4.5
    parts = []
    for i, point in enumerate(points):
        if point is not None:
            x, y = frame.x.place(point[0]), frame.y.place(point[1])
            shape = mark(series.look, x, y, small, series.hollow)
            note = [element("title", series.notes[i])] if i < len(series.notes) else []
            parts.append(element("g", *note, shape))
    return element("g", *parts, cls=look_class(series.look), data_series=series.name)
