"""A chart as SVG, drawn by Vega-Lite through vl-convert: offline, without a script in the page.

Colours are CSS variables of `plots.css`, so that a page's light or dark theme decides. Vega writes
presentation attributes and no `style`, as the pages' Content-Security-Policy asks.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from markupsafe import Markup

from ...results.rows import visible
from .chart import colour, dashes, mark
from .placing import (
    Box,
    Name,
    Scale,
    around,
    clipped,
    drawable,
    placed,
    scale_of,
    spread,
    text_width,
)

if TYPE_CHECKING:
    from .chart import Chart, Level, Series

STYLE = (Path(__file__).parent / "plots.css").read_text(encoding="utf-8")
"""Style of all plots; a page holds it once."""
_SVG = "{http://www.w3.org/2000/svg}"
_DIGITS = re.compile(r"(\.\d\d)\d+")
"""Digits of a coordinate that are too small to be seen."""
_UNUSED = frozenset(
    ("aria-hidden", "aria-label", "aria-roledescription", "font-family", "pointer-events", "role",
     "version")
)  # fmt: skip
"""Attributes that a picture with one text alternative and the font of its page does not need."""
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 14, 26, 44
"""Pixels around the axes, for tick labels and titles."""
_MARGIN = 16
"""Pixels around a plot in a file of its own."""
_MOST_NAME = 230.0
"""Pixels of a name, at most."""
_MARK, _MARK_ON_LINE, _OUTLINE = 72, 32, 110
"""Areas of marks in square pixels."""
_SOFT, _INK, _PAPER = "var(--chart-soft)", "var(--chart-ink)", "var(--chart-paper)"


@dataclass(frozen=True, slots=True)
class Picture:
    svg: Markup
    complete: bool
    """Whether every series is named in it; otherwise a legend has to."""


@dataclass(frozen=True, slots=True)
class _Drawn:
    """A series without the points that cannot be drawn; None breaks its line."""

    series: Series
    points: tuple[tuple[float, float] | None, ...]

    @property
    def last(self) -> tuple[float, float] | None:
        return next((point for point in reversed(self.points) if point is not None), None)


@functools.lru_cache(maxsize=256)
def draw(chart: Chart) -> Picture:
    """The chart as an `svg` element of its width and height.

    Points that are None, NaN or infinite are left out. All text is escaped.
    """
    drawn = [_Drawn(one, tuple(map(_point, one.points))) for one in chart.series]
    known = [point for one in drawn for point in one.points if point is not None]
    levels = [level for level in chart.levels if drawable(level.value) is not None]
    room = _room_for_names(chart, drawn)
    xs = [*(x for x, _ in known), *(x for bar in chart.bars for x in (bar.start, bar.end))]
    ys = [*(y for _, y in known), *(level.value for level in levels)]
    wide, tall = chart.width - _LEFT - _RIGHT - room, chart.height - _TOP - _BOTTOM
    x, y = scale_of(chart.x, xs, wide), scale_of(chart.y, ys, tall, upwards=True)
    if room:
        names, complete = _line_names(drawn, x, y, room), True
    else:
        names, complete = _point_names(chart, drawn, levels, x, y)
    spec = {
        "width": wide,
        "height": tall,
        "padding": {"left": _LEFT, "right": _RIGHT + room, "top": _TOP, "bottom": _BOTTOM},
        "autosize": "none",
        "config": _CONFIG,
        "layer": [
            _axes(x, y),
            *_background(chart, levels, x, y),
            *_joins(_join_rows(drawn), x, y),
            # the first series is the best one: its line lies on top
            *(_line(one, x, y) for one in reversed(drawn) if one.series.line),
            _marks(drawn, x, y),
            _texts(names),
        ],
    }
    return Picture(_svg(spec, chart), complete or not chart.named)


def standalone(chart: Chart) -> str:
    """The chart as an SVG file that can be read in a light and in a dark theme."""
    wide, tall = chart.width + 2 * _MARGIN, chart.height + 2 * _MARGIN
    head = (
        f'<svg xmlns="{_SVG[1:-1]}" width="{wide}" height="{tall}" '
        f'viewBox="{-_MARGIN} {-_MARGIN} {wide} {tall}"><style>{STYLE}</style>'
        f'<rect x="{-_MARGIN}" y="{-_MARGIN}" width="{wide}" height="{tall}" fill="{_PAPER}"/>'
    )
    return f"{head}{draw(chart).svg}</svg>\n"


_CONFIG: dict[str, Any] = {
    "background": None,
    "font": "system-ui, sans-serif",
    "view": {"stroke": None},
    "axis": {
        "labelFontSize": 12,
        "labelColor": _SOFT,
        "titleFontSize": 12,
        "titleFontWeight": "normal",
        "titleColor": _SOFT,
        "gridColor": "var(--chart-line)",
        "domainColor": _SOFT,
        "tickColor": _SOFT,
        "labelOverlap": "greedy",
    },
    "axisX": {
        "grid": False,
        "labelFlush": True,
        "titleAnchor": "end",
        "titleY": 30,
        "labelBound": _RIGHT + 8,
    },
    "axisY": {
        "domain": False,
        "ticks": False,
        "labelPadding": 7,
        "titleAngle": 0,
        "titleAlign": "left",
        "titleAnchor": "end",
        "titleX": -_LEFT,
        "titleY": -14,
    },
}


def _point(point: tuple[float | None, float | None]) -> tuple[float, float] | None:
    x, y = map(drawable, point)
    return None if x is None or y is None else (x, y)


def _room_for_names(chart: Chart, drawn: list[_Drawn]) -> int:
    """Pixels to the right of the axes for the names of lines.

    0 where names would be cut too much, or where lines end elsewhere: these need a legend.
    """
    spans = [[p[0] for p in one.points if p] for one in drawn if one.series.line and one.last]
    if not chart.named or not spans:
        return 0
    first, last = min(map(min, spans)), max(map(max, spans))
    longest = max(text_width(one.name) for one in chart.series)
    room = min(longest, _MOST_NAME, 0.3 * chart.width)
    reached = all(span[-1] >= last - 0.1 * (last - first) for span in spans)
    return round(room) if reached and room >= min(longest, 110.0) else 0


def _ends(drawn: list[_Drawn], x: Scale, y: Scale) -> list[tuple[Series, float, float]]:
    """The series that have a point, and the place of the last one in pixels."""
    return [(one.series, x.place(one.last[0]), y.place(one.last[1])) for one in drawn if one.last]


def _line_names(drawn: list[_Drawn], x: Scale, y: Scale, room: float) -> list[Name]:
    """Names to the right of the ends of lines."""
    ends = _ends(drawn, x, y)
    heights = [min(max(end, 0.0), y.pixels) for _, _, end in ends]
    return [
        Name(text=clipped(one.name, room), x=x.pixels + 9, y=apart, align="left")
        for (one, _, _), apart in zip(ends, spread(heights, 0.0, y.pixels), strict=True)
    ]


def _point_names(
    chart: Chart, drawn: list[_Drawn], levels: list[Level], x: Scale, y: Scale
) -> tuple[list[Name], bool]:
    """Names above levels and beside points that have room, and whether all series are named."""
    frame = Box(0, -_TOP, x.pixels + _RIGHT, y.pixels)
    heights = [y.place(level.value) for level in levels]
    rules = [Box(0, height - 2, x.pixels, height + 2) for height in heights]
    apart = spread([height - 8 for height in heights], 8 - _TOP, y.pixels - 8)
    found = [
        Name(text=clipped(level.name, x.pixels), x=x.pixels, y=height, align="right")
        for level, height in zip(levels, apart, strict=True)
    ]
    if not chart.named or any(one.series.line for one in drawn):
        return found, False
    # a name that stands alone helps most where exports are joined to it
    ends = sorted(_ends(drawn, x, y), key=lambda end: bool(end[0].joined_to))
    most = min(_MOST_NAME, 0.4 * chart.width)
    wanted = [(clipped(one.label or one.name, most), px, py) for one, px, py in ends]
    taken = [*rules, *map(_box, found), *(around(px, py, 6.0) for _, px, py in ends)]
    # names keep off the lines between exports and students
    for join in _join_rows(drawn):
        (x1, y1), (x2, y2) = (
            (x.place(join[a]), y.place(join[b])) for a, b in (("x", "y"), ("x2", "y2"))
        )
        taken += [around(x1 + (x2 - x1) * i / 30, y1 + (y2 - y1) * i / 30, 2.0) for i in range(31)]
    beside = placed(wanted, frame, taken)
    return [*found, *filter(None, beside)], None not in beside and len(ends) == len(drawn)


def _box(name: Name) -> Box:
    wide = text_width(name.text)
    left = name.x - {"left": 0.0, "center": 0.5 * wide, "right": wide}[name.align]
    return Box(left, name.y - 7, left + wide, name.y + 7)


def _layer(values: list[Any], kind: str, encoding: dict[str, Any], **settings: Any) -> Any:
    mark_of = {"type": kind, "aria": False, **settings}
    return {"data": {"values": values}, "mark": mark_of, "encoding": encoding}


def _raw(field: str) -> dict[str, Any]:
    """A field whose values are colours, paths or pixels as they are."""
    return {"field": field, "type": "nominal", "scale": None, "legend": None}


def _axes(x: Scale, y: Scale) -> Any:
    """The axes alone; the layers after it are drawn over the grid."""
    encoding = {"x": x.encoding("x"), "y": y.encoding("y")}
    return _layer([{"x": x.low, "y": y.low}], "point", encoding, opacity=0)


def _rule(rows: list[dict[str, Any]], x: Scale, y: Scale, **settings: Any) -> Any:
    ends = {"x2": {"field": "x2"}, "y2": {"field": "y2"}}
    encoding = {"x": x.encoding("x"), "y": y.encoding("y"), **ends}
    return _layer(rows, "rule", encoding, **settings)


def _background(chart: Chart, levels: list[Level], x: Scale, y: Scale) -> list[Any]:
    layers = []
    if chart.bars:
        bars = [{"x": b.start, "x2": b.end, "y": y.low, "y2": b.height} for b in chart.bars]
        layer = _rule(bars, x, y)
        layer["mark"] = {"type": "rect", "aria": False, "fill": "var(--chart-bar)",
                         "stroke": _PAPER}  # fmt: skip
        layers.append(layer)
    lines = [{"x": x.low, "x2": x.high, "y": one.value, "y2": one.value} for one in levels]
    if chart.diagonal:
        low, high = max(x.low, y.low), min(x.high, y.high)
        lines.append({"x": low, "x2": high, "y": low, "y2": high})
    return [*layers, _rule(lines, x, y, color=_SOFT, strokeDash=[4, 3])] if lines else layers


def _join_rows(drawn: list[_Drawn]) -> list[dict[str, Any]]:
    """The ends of the thin lines between series, where both ends can be drawn."""
    ends = {one.series.name: one.last for one in drawn}
    rows = []
    for one in drawn:
        start, end = ends.get(one.series.joined_to), one.last
        if start is not None and end is not None:
            colour_of = colour(one.series.look)
            rows.append(
                {"x": start[0], "y": start[1], "x2": end[0], "y2": end[1], "colour": colour_of}
            )
    return rows


def _joins(rows: list[dict[str, Any]], x: Scale, y: Scale) -> list[Any]:
    layer = _rule(rows, x, y, opacity=0.55)
    layer["encoding"]["stroke"] = _raw("colour")
    return [layer] if rows else []


def _line(one: _Drawn, x: Scale, y: Scale) -> Any:
    rows = [
        {"x": point and point[0], "y": point and point[1], "order": number}
        for number, point in enumerate(one.points)
    ]
    order = {"field": "order", "type": "quantitative"}
    encoding = {"x": x.encoding("x"), "y": y.encoding("y"), "order": order}
    settings = {
        "color": colour(one.series.look), "strokeWidth": 1.75, "clip": True, "aria": True,
        "strokeDash": list(dashes(one.series.look)), "description": visible(one.series.name),
    }  # fmt: skip
    return _layer(rows, "line", encoding, **settings)


def _marks(drawn: list[_Drawn], x: Scale, y: Scale) -> Any:
    """One mark for each point, with its tooltip."""
    rows = []
    for one in drawn:
        series, hollow = one.series, one.series.hollow is not None
        full = _MARK_ON_LINE if series.line else _MARK
        notes = itertools.chain(series.notes, itertools.repeat(""))
        for point, note in zip(one.points, notes, strict=False):
            if point is not None and series.marks:
                rows.append({
                    "x": point[0], "y": point[1], "note": visible(note or series.name),
                    "shape": mark(series.look, series.hollow), "size": _OUTLINE if hollow else full,
                    "fill": "transparent" if hollow else colour(series.look),
                    "stroke": colour(series.look) if hollow else _PAPER,
                    "width": 1.6 if hollow else 1,
                })  # fmt: skip
    encoding = {
        "x": x.encoding("x"), "y": y.encoding("y"),
        "fill": _raw("fill"), "stroke": _raw("stroke"), "shape": _raw("shape"),
        "size": {"field": "size", "type": "quantitative", "scale": None, "legend": None},
        "strokeWidth": {"field": "width", "type": "quantitative", "scale": None, "legend": None},
        "description": {"field": "note"},
    }  # fmt: skip
    return _layer(rows, "point", encoding, opacity=1, aria=True)


def _texts(names: list[Name]) -> Any:
    rows = [{"x": n.x, "y": n.y, "text": visible(n.text), "align": n.align} for n in names]
    encoding = {
        "x": {"field": "x", "type": "quantitative", "scale": None, "axis": None},
        "y": {"field": "y", "type": "quantitative", "scale": None, "axis": None},
        "text": {"field": "text", "type": "nominal"},
    }  # fmt: skip
    align = {"expr": "datum.align"}
    return _layer(rows, "text", encoding, align=align, baseline="middle", fontSize=12, color=_INK)


def _svg(spec: dict[str, Any], chart: Chart) -> Markup:
    """Vega's SVG with a text alternative and tooltips, without attributes that no reader uses."""
    import vl_convert

    # Vega numbers its clip paths; all lines of a plot share one, named after what it shows
    clip = f"clip-{hashlib.sha256(repr(chart).encode('utf-8', 'replace')).hexdigest()[:12]}"
    root = ElementTree.fromstring(vl_convert.vegalite_to_svg(spec))
    unused = root.findall(f".//{_SVG}clipPath")[1:]
    for parent in list(root.iter()):
        parent.tag = parent.tag.removeprefix(_SVG)  # an svg inside HTML needs no namespace
        for child in list(parent):
            if child in unused or child.get("class") in ("background", "foreground"):
                parent.remove(child)
        attributes = parent.attrib
        if attributes.get("aria-roledescription") in ("point", "line mark"):
            ElementTree.SubElement(parent, "title").text = attributes.get("aria-label")
        if parent.tag == "clipPath":
            attributes["id"] = clip
        if "clip-path" in attributes:
            attributes["clip-path"] = f"url(#{clip})"
        for name in {"transform", "d"} & attributes.keys():
            attributes[name] = _DIGITS.sub(r"\1", attributes[name])
        for name in _UNUSED & attributes.keys():
            del attributes[name]
    root.attrib |= {"class": "chart", "role": "img", "aria-label": visible(chart.label)}
    return Markup(ElementTree.tostring(root, encoding="unicode"))
