"""Plots: scales, places of names, and SVGs whose parts are counted and located."""

from __future__ import annotations

import itertools
import math
import re
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from coldstill.pipeline.pages.plots.chart import (
    COLOURS,
    Axis,
    Bar,
    Chart,
    Level,
    Series,
    colour,
    dashes,
    mark,
)
from coldstill.pipeline.pages.plots.drawing import STYLE, draw, standalone
from coldstill.pipeline.pages.plots.placing import (
    Box,
    clipped,
    placed,
    scale_of,
    spread,
    text_width,
)
from coldstill.pipeline.units import short

NAN, INFINITE = float("nan"), float("inf")


def chart_of(*series: Series, **settings: Any) -> Chart:
    axes = {"x": Axis("x"), "y": Axis("y")}
    return Chart(label="a label", series=series, **{**axes, **settings})


def drawing(*series: Series, **settings: Any) -> ElementTree.Element:
    """A chart as a tree: SVG that is not well-formed XML fails here."""
    return ElementTree.fromstring(draw(chart_of(*series, **settings)).svg)


def place(element: ElementTree.Element) -> tuple[float, float]:
    """Where an element is moved to."""
    x, y = re.findall(r"-?[\d.]+", str(element.get("transform")))[:2]
    return float(x), float(y)


def marks_of(tree: ElementTree.Element) -> dict[str, ElementTree.Element]:
    """Lines and the marks of points by their tooltips."""
    return {str(e.findtext("title")): e for e in tree.iter("path") if e.find("title") is not None}


def names_of(tree: ElementTree.Element) -> dict[str, tuple[float, float]]:
    """The places of names; texts of axes are not names."""
    groups = [g for g in tree.iter("g") if str(g.get("class")).startswith("mark-text role-mark")]
    return {str(text.text): place(text) for group in groups for text in group}


def lines_of(count: int, end: float = 10.0) -> list[Series]:
    return [
        Series(name=f"student-{i}", look=i, line=True, marks=False,
               points=((0.0, 5.0), (end, 2 + i / 9)))
        for i in range(count)
    ]  # fmt: skip


def test_a_scale_keeps_every_value_inside_and_in_order() -> None:
    close = math.nextafter(1.0, 2.0)
    for values in (
        [5.0], [3.0, 3.0, 3.0], [0.0, 0.0], [-7.0, -7.0], [], [1.0, close], [-1e300, 1e300],
        [1e-300, 2e-300], [1e-5, 1e12], [4.9, 5.1, 5.6],
    ):  # fmt: skip
        scale = scale_of(Axis("x", scale="auto"), values, 200.0)
        places = [scale.place(value) for value in sorted(values)]
        assert scale.low < scale.high
        assert all(0 <= place <= 200 for place in places)
        assert places == sorted(places)
        if len(set(values)) == 1:
            assert 20 < places[0] < 180  # a single value is not at a border
        points = tuple((value, value) for value in values)
        drawing(Series(name="s", points=points), x=Axis("x", scale="auto"))  # and Vega draws it
    # an axis is logarithmic if positive values span a decade
    for values in ([1.0, 10.0], [1.0, 9.9], [0.0, 1000.0], [-1.0, 1000.0]):
        logarithmic = values == [1.0, 10.0]
        assert scale_of(Axis("x", scale="auto"), values, 100.0).log == logarithmic
    assert not scale_of(Axis("x"), [1.0, 1e6], 100.0).log


def test_numbers_and_ticks_have_the_format_of_their_axis() -> None:
    texts = {
        0: "0", 999: "999", 999_400: "999k", 999_600: "1M", 34_588_160: "34.6M", -2e9: "-2G",
        3e18: "3e+18", 0.25: "0.25",
    }  # fmt: skip
    assert {value: short(value) for value in texts} == texts
    forms: tuple[tuple[Any, float, set[str]], ...] = (
        ("plain", 100_000, {"0", "50,000"}), ("short", 1.5e6, {"0", "1M"}),
        ("short", 240_000, {"0", "20k"}), ("percent", 1.0, {"0%", "50%", "100%"}),
    )  # fmt: skip
    for form, high, expected in forms:
        tree = drawing(x=Axis("x", form=form, low=0.0, high=high), width=700)
        assert {e.text for e in tree.iter("text")} >= expected


def test_points_are_drawn_where_their_values_are() -> None:
    one = Series(name="s", points=((0.0, 0.0), (5.0, 10.0), (10.0, 5.0)), notes=tuple("abc"))
    axis = Axis("x", low=0.0, high=10.0)
    tree = drawing(one, x=axis, y=axis, named=False, width=300, height=200)
    low, top, right = (place(mark) for mark in marks_of(tree).values())
    assert low == (0.0, 130.0)  # the height without the axes' texts
    assert top == pytest.approx((right[0] / 2, 0.0))
    assert right[1] == pytest.approx(65.0)


def test_missing_values_break_the_line_and_a_series_needs_no_span() -> None:
    for missing in (None, NAN, INFINITE, -INFINITE, 1e301):
        points = ((0, 1), (1, 2), (2, missing), (missing, 3), (4, 4), (5, 5))
        shapes = marks_of(
            drawing(Series(name="s", points=points, line=True, notes=tuple("abcdef")))
        )
        assert list(shapes) == ["s", "a", "b", "e", "f"]
        assert str(shapes["s"].get("d")).count("M") == 2
    for line, span in itertools.product(
        (True, False), ((), ((1.0, 1.0),), ((None, NAN),), ((1, 2), (1, 2)))
    ):
        tree = drawing(Series(name="s", points=span, line=line))
        assert (tree.get("width"), tree.get("height")) == ("544", "330")


def test_hostile_text_is_escaped() -> None:
    evil = "</svg><script>alert(1)</script>\"' & \x00\x1b\ud800"
    one = Series(name=evil, points=((0, 1), (1, 2)), line=True, notes=(evil, evil))
    settings = {"x": Axis(evil), "y": Axis(evil), "levels": (Level(evil, 1.5),), "width": 1200}
    chart = Chart(label=evil, series=(one,), **settings)  # type: ignore[arg-type]
    text = draw(chart).svg
    tree = ElementTree.fromstring(text)
    assert "<script" not in text
    text.encode()
    shown = re.sub("[\x00\x1b\ud800]", "\ufffd", evil)
    assert tree.get("aria-label") == shown
    assert {e.text for e in tree.iter("title")} == {shown}
    assert {e.tag for e in tree.iter()} <= {
        "svg", "g", "path", "line", "text", "title", "defs", "clipPath", "rect",
    }  # fmt: skip
    # the pages allow no style besides their own
    assert not any("style" in e.attrib for e in tree.iter())


def test_lines_are_named_at_their_ends_or_need_a_legend() -> None:
    chart = chart_of(*lines_of(12), width=900)
    assert draw(chart).complete
    names = names_of(ElementTree.fromstring(draw(chart).svg))
    order = sorted(names, key=lambda name: names[name][1])
    assert order == [f"student-{i}" for i in reversed(range(12))]
    assert min(np.diff(sorted(y for _, y in names.values()))) >= 13.9
    ends_apart = lines_of(12)
    ends_apart[3] = lines_of(4, end=4.0)[3]
    for series, width in ((lines_of(12), 190), (ends_apart, 900)):
        picture = draw(chart_of(*series, width=width))
        assert not picture.complete
        assert names_of(ElementTree.fromstring(picture.svg)) == {}
    crowd = [Series(name=f"student-{i}", look=i, points=((1.0, 1.0),)) for i in range(40)]
    picture = draw(chart_of(*crowd))
    assert not picture.complete
    assert 1 <= len(names_of(ElementTree.fromstring(picture.svg))) < 40
    text = standalone(chart_of(*lines_of(2)))  # a file with both themes
    assert ElementTree.fromstring(text).tag == "{http://www.w3.org/2000/svg}svg"
    assert "prefers-color-scheme: dark" in text
    assert "script" not in text


def test_lines_are_cut_off_at_the_axes() -> None:
    tree = drawing(*lines_of(2), y=Axis("y", low=0.0, high=3.0))
    (clip,) = tree.iter("clipPath")
    assert sum(e.get("clip-path") == f"url(#{clip.get('id')})" for e in tree.iter()) == 2
    # the name of a clip path must not depend on what was drawn before
    assert clip.get("id") == next(
        drawing(*lines_of(2), y=Axis("y", low=0.0, high=3.0)).iter("clipPath")
    ).get("id")


def test_bars_stand_on_the_axis_and_the_diagonal_joins_equal_values() -> None:
    axis = Axis("share", form="percent", low=0.0, high=1.0)
    bars = (Bar(0.0, 0.5, 0.25), Bar(0.5, 1.0, 0.75))
    one = Series(name="s", points=((0.5, 0.5),))
    tree = drawing(one, x=axis, y=axis, bars=bars, diagonal=True, named=False)
    boxes = [e for e in tree.iter("path") if e.get("fill") == "var(--chart-bar)"]
    sides = [re.findall(r"-?[\d.]+", str(box.get("d"))) for box in boxes]
    assert [(float(y), float(tall)) for _, y, _, tall, *_ in sides] == [(195, 65), (65, 195)]
    (line,) = (e for e in tree.iter("line") if e.get("stroke-dasharray"))
    start, (wide, tall) = place(line), (float(str(line.get(key))) for key in ("x2", "y2"))
    middle = (start[0] + wide / 2, start[1] + tall / 2)
    assert middle == pytest.approx(place(marks_of(tree)["s"]))


def test_levels_are_named_apart_even_if_they_nearly_agree() -> None:
    levels = (Level("one", 5.0), Level("two", 5.001), Level("lost", NAN))
    tree = drawing(Series(name="s", points=((1, 5.6),)), levels=levels)
    assert sum(bool(e.get("stroke-dasharray")) for e in tree.iter("line")) == 2
    names = names_of(tree)
    assert "lost" not in names
    assert abs(names["one"][1] - names["two"][1]) >= 13.9


def test_names_beside_points_cover_nothing() -> None:
    random = np.random.default_rng(1)
    frame = Box(0, 0, 600, 400)
    for count in (1, 5, 12):
        points = [(float(x), float(y)) for x, y in random.uniform(60, 340, (count, 2))]
        marks = [Box(x - 6, y - 6, x + 6, y + 6) for x, y in points]
        names = [(f"run/student-{i}", x, y) for i, (x, y) in enumerate(points)]
        found = [name for name in placed(names, frame, marks) if name is not None]
        assert len(found) == count
        boxes = []
        for name in found:
            wide = text_width(name.text)
            left = name.x - {"left": 0.0, "center": 0.5, "right": 1.0}[name.align] * wide
            boxes.append(Box(left, name.y - 6, left + wide, name.y + 6))
        assert not any(one.meets(other) for one, other in itertools.combinations(boxes, 2))
        for i, j in itertools.product(range(count), repeat=2):
            assert i == j or not boxes[i].meets(marks[j])
        assert all(box.inside(frame) for box in boxes)


def test_an_export_is_an_outline_joined_to_its_student() -> None:
    series = [
        Series(name="a (int8)", label="int8", look=0, hollow=2, points=((1, 1),), joined_to="a"),
        Series(name="a", look=0, points=((3, 2),)),
        Series(name="b (int8)", look=1, hollow=2, points=((2, 2),), joined_to="unknown"),
        Series(name="c (int8)", look=1, hollow=2, points=((None, 2),), joined_to="a"),
    ]
    tree = drawing(*series)
    (line,) = (e for e in tree.iter("line") if e.get("stroke") == "var(--c0)")
    shapes = marks_of(tree)
    assert (shapes["a (int8)"].get("fill"), shapes["a"].get("fill")) == (None, "var(--c0)")
    assert shapes["a (int8)"].get("d") != shapes["a"].get("d")
    assert place(line) == pytest.approx(place(shapes["a"]))
    assert {"int8", "a"} <= names_of(tree).keys()


def test_places_are_spread_in_their_order_and_long_names_are_clipped() -> None:
    assert spread([], 0, 100) == []
    assert spread([50.0], 0, 100) == [50.0]
    assert spread([50, 51, 49], 0, 100) == [50, 64, 36]
    assert spread([99, 98, 97], 0, 100) == [99.5, 85.5, 71.5]
    assert spread([5.0] * 11, 0, 100) == pytest.approx([10.0 * i for i in range(11)])
    assert clipped("small", 200) == "small"
    name = clipped("a-very-long-run-name-indeed/student", 120)
    assert name.startswith("a-ve")
    assert name.endswith("student")
    assert text_width(name) <= 120


def test_no_two_of_many_series_look_alike() -> None:
    count = 4 * COLOURS
    assert len({(colour(i), dashes(i), mark(i)) for i in range(count)}) == count
    assert len({mark(look) for look in (*range(COLOURS), None)}) == COLOURS + 1
    assert mark(0, hollow=3) == mark(5, hollow=3) != mark(0)


MACHADO = {
    # how full protanopia, deuteranopia and tritanopia change linear RGB (Machado et al. 2009)
    "usual": np.eye(3),
    "protan": np.array([
        [0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ]),
    "deutan": np.array([
        [0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ]),
    "tritan": np.array([
        [1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ]),
}  # fmt: skip
TO_CONES = np.array([
    [0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566],
    [0.0883024619, 0.2817188376, 0.6299787005],
])  # fmt: skip
TO_LAB = np.array([
    [0.2104542553, 0.7936177850, -0.0040720468], [1.9779984951, -2.4285922050, 0.4505937099],
    [0.0259040371, 0.7827717662, -0.8086757660],
])  # fmt: skip


def linear(colour: str) -> Any:
    rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_colours_differ_for_every_eye_and_stand_out_from_the_paper(theme: int) -> None:
    colours = [re.findall(rf"--c{i}: (#\w{{6}})", STYLE)[theme] for i in range(COLOURS)]
    paper = linear(re.findall(r"--chart-paper: (#\w{6})", STYLE)[theme])
    weights = np.array([0.2126, 0.7152, 0.0722])
    for one in colours:
        pair = sorted((float(linear(one) @ weights), float(paper @ weights)))
        assert (pair[1] + 0.05) / (pair[0] + 0.05) >= 3.0
    for name, eye in MACHADO.items():
        labs = [TO_LAB @ np.cbrt(TO_CONES @ np.clip(eye @ linear(c), 0, 1)) for c in colours]
        for one, other in itertools.combinations(labs, 2):
            assert np.linalg.norm(one - other) > 0.1, name
