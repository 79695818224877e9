"""Charts: ticks, scales, places of names, and drawings whose parts are counted and located."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from coldstill.pipeline.pages.charts import (
    STYLE,
    Axis,
    Bars,
    Chart,
    Level,
    Series,
    draw,
    draw_named,
    element,
    joined,
    short,
    swatch,
)
from coldstill.pipeline.pages.charts.labels import Box, beside_points, clipped, spread, text_width
from coldstill.pipeline.pages.charts.looks import COLOURS, dashes, mark
from coldstill.pipeline.pages.charts.scale import linear_ticks, log_ticks, make_scale, tick_texts

NAN, INFINITE = float("nan"), float("inf")


def drawing(*series: Series, **settings: Any) -> ElementTree.Element:
    """A chart as a tree: what is no well-formed XML fails here."""
    x, y = settings.pop("x", Axis("x")), settings.pop("y", Axis("y"))
    chart = Chart(label="told", x=x, y=y, series=series, **settings)
    return ElementTree.fromstring(draw(chart))


def of(tree: ElementTree.Element, name: str, kind: str = "") -> list[ElementTree.Element]:
    return [e for e in tree.iter(name) if not kind or e.get("class") == kind]


def texts(tree: ElementTree.Element, kind: str = "") -> list[str]:
    return [e.text or "" for e in tree.iter("text") if e.get("class", "") == kind]


def path_of(tree: ElementTree.Element) -> list[list[tuple[float, float]]]:
    """The unbroken pieces of the only line."""
    (line,) = of(tree, "path", "line")
    pieces = [piece for piece in str(line.get("d")).split("M") if piece]
    return [
        [(float(x), float(y)) for x, y in re.findall(r"([-\d.]+) ([-\d.]+)", piece)]
        for piece in pieces
    ]


@pytest.mark.parametrize(
    ("low", "high", "count", "expected"),
    [
        (0.0, 1.0, 5, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0.0, 1.0, 2, [0.0, 0.5, 1.0]),
        (4.94, 5.57, 6, [5.0, 5.2, 5.4]),
        (-3.0, 2.0, 5, [-3.0, -2.0, -1.0, 0.0, 1.0, 2.0]),
        (0.1, 0.35, 5, [0.1, 0.15, 0.2, 0.25, 0.3, 0.35]),
        (0.0, 1e-9, 2, [0.0, 5e-10, 1e-9]),
    ],
)
def test_linear_ticks_are_round(low: float, high: float, count: int, expected: list[float]) -> None:
    assert linear_ticks(low, high, count) == expected


def test_linear_ticks_are_few_inside_and_evenly_spaced_whatever_the_range() -> None:
    random = np.random.default_rng(0)
    for _ in range(500):
        middle = float(random.normal()) * 10.0 ** float(random.uniform(-200, 200))
        span = 10.0 ** float(random.uniform(-6, 3)) * abs(middle)
        low, high = middle - span, middle + span
        count = int(random.integers(2, 12))
        ticks = linear_ticks(low, high, count)
        assert 1 <= len(ticks) <= count + 1
        assert all(low - 1e-6 * span <= tick <= high + 1e-6 * span for tick in ticks)
        gaps = np.diff(ticks) / span
        assert np.allclose(gaps, gaps[:1], rtol=1e-4)
        if len(ticks) > 1:
            digit = float(f"{ticks[1] - ticks[0]:.3e}".partition("e")[0])
            assert min(abs(digit - nice) for nice in (1, 2, 5, 10)) < 1e-2


@pytest.mark.parametrize(
    ("low", "high", "count", "expected"),
    [
        (1.0, 1000.0, 5, [1, 10, 100, 1000]),
        (0.8e6, 40e6, 8, [1e6, 2e6, 5e6, 1e7, 2e7]),
        (0.8e6, 40e6, 4, [1e6, 3e6, 1e7, 3e7]),
        (1e-300, 1e300, 5, [1e-200, 1e-100, 1, 1e100, 1e200]),
        (2.2, 2.9, 4, [2.2, 2.4, 2.6, 2.8]),
    ],
)
def test_ticks_of_a_log_axis_are_round(
    low: float, high: float, count: int, expected: list[float]
) -> None:
    ticks = log_ticks(low, high, count)
    if high / low > 1e100:  # powers of ten, evenly many apart
        powers = [round(math.log10(tick)) for tick in ticks]
        assert 3 <= len(powers) <= count
        assert len(set(np.diff(powers))) == 1
    else:
        assert ticks == pytest.approx(expected)


@pytest.mark.parametrize(
    ("ticks", "form", "expected"),
    [
        ([0.0, 0.2, 0.4], "plain", ["0.0", "0.2", "0.4"]),
        ([4.95, 5.0, 5.05], "plain", ["4.95", "5.00", "5.05"]),
        ([0, 50_000, 100_000], "plain", ["0", "50,000", "100,000"]),
        ([0.01, 1, 100, 10_000], "plain", ["0.01", "1", "100", "10,000"]),
        ([0.0, 0.5, 1.0], "percent", ["0%", "50%", "100%"]),
        ([0, 500e3, 1e6, 1.5e6], "short", ["0", "500k", "1M", "1.5M"]),
        ([1.002e6, 1.004e6], "short", ["1M", "1M"]),
        ([1e-9, 2e-9], "plain", ["1e-09", "2e-09"]),
        ([], "plain", []),
    ],
)
def test_ticks_are_written_shortly_and_never_alike(
    ticks: list[float], form: str, expected: list[str]
) -> None:
    found = tick_texts(ticks, form)
    if len(set(expected)) < len(expected):
        assert found == ["1,002,000", "1,004,000"]
    else:
        assert found == expected


def test_short_numbers_carry_to_the_next_letter() -> None:
    assert [short(v) for v in (0, 999, 999_400, 999_600, 34_588_160, -2e9, 3e18, 0.25)] == [
        "0", "999", "999k", "1M", "34.6M", "-2G", "3e+18", "0.25",
    ]  # fmt: skip


VALUES = {
    "one": [5.0],
    "equal": [3.0, 3.0, 3.0],
    "zeros": [0.0, 0.0],
    "negative": [-7.0, -7.0],
    "none": [],
    "two neighbouring numbers": [1.0, math.nextafter(1.0, 2.0)],
    "huge": [-1e300, 1e300],
    "tiny": [1e-300, 2e-300],
    "decades": [1e-5, 1e12],
    "usual": [4.9, 5.1, 5.6],
}


@pytest.mark.parametrize("kind", ["linear", "log", "auto"])
@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
def test_a_scale_keeps_every_value_inside_and_in_order(values: list[float], kind: Any) -> None:
    scale = make_scale(Axis("x", scale=kind), values, 40.0, 240.0, 50.0)
    assert scale.low < scale.high
    assert 1 <= len(scale.ticks) <= 12
    assert len({text for _, text in scale.ticks}) == len(scale.ticks)
    places = [scale.place(value) for value in sorted(values)]
    assert all(40 <= place <= 240 for place in places)
    assert places == sorted(places)
    if len(set(values)) == 1:
        assert 60 < places[0] < 220  # a lone value is not pressed to a border
    assert all(39.9 <= scale.place(tick) <= 240.1 for tick, _ in scale.ticks)


def test_the_axis_is_logarithmic_where_sizes_span_a_decade() -> None:
    def is_log(*values: float, kind: Any = "auto") -> bool:
        return make_scale(Axis("x", scale=kind), values, 0, 100, 20).log

    assert is_log(1.0, 10.0)
    assert not is_log(1.0, 9.9)
    assert not is_log(0.0, 1000.0)
    assert not is_log(-1.0, 1000.0)
    assert not is_log(1.0, 1e6, kind="linear")
    assert is_log(1.0, 2.0, kind="log")
    scale = make_scale(Axis("x", scale="log", low=1.0, high=100.0), [3.0], 0, 100, 20)
    assert scale.place(10.0) == pytest.approx(50.0)
    assert scale.place(0.0) < 0


def test_values_that_cannot_be_negative_get_no_negative_tick() -> None:
    scale = make_scale(Axis("x"), [0.0, 8.0], 0.0, 400.0, 50.0)
    assert scale.low < 0
    assert min(tick for tick, _ in scale.ticks) == 0


def test_points_lie_where_their_values_say() -> None:
    points = ((0.0, 0.0), (5.0, 10.0), (10.0, 5.0))
    one = Series(name="s", points=points, line=True, marks=False)
    axis = Axis("x", low=0.0, high=10.0)
    tree = drawing(one, x=axis, y=axis, names="none", width=300, height=200)
    ((low, top, right),) = path_of(tree)
    assert low[0] < top[0] < right[0]
    assert top[0] - low[0] == pytest.approx(right[0] - top[0], abs=0.02)
    assert low[1] - top[1] == pytest.approx(2 * (low[1] - right[1]), abs=0.03)
    assert low[1] == pytest.approx(200 - 42)


@pytest.mark.parametrize("missing", [None, NAN, INFINITE, -INFINITE, 1e301])
def test_what_is_no_number_is_left_out_and_breaks_the_line(missing: float | None) -> None:
    points = ((0, 1), (1, 2), (2, missing), (missing, 3), (4, 4), (5, 5))
    one = Series(name="s", points=points, line=True, notes=tuple("abcdef"))
    tree = drawing(one)
    assert [len(piece) for piece in path_of(tree)] == [2, 2]
    notes = [e.text for g in of(tree, "g", "c0") for e in g.iter("title")]
    assert [note for note in notes if note != "s"] == ["a", "b", "e", "f"]
    assert not re.search("nan|inf", draw(Chart(label="", x=Axis(""), y=Axis(""), series=(one,))))


@pytest.mark.parametrize("line", [True, False])
@pytest.mark.parametrize("points", [(), ((1.0, 1.0),), ((None, NAN),), ((1, 2), (1, 2))])
def test_nothing_and_one_point_can_be_drawn(points: Any, line: bool) -> None:
    tree = drawing(Series(name="s", points=points, line=line))
    assert float(str(tree.get("width"))) == 560


def test_names_are_text_and_nothing_else() -> None:
    evil = "</svg><script>alert(1)</script>\"' & \x00\x1b\ud800"
    one = Series(name=evil, points=((0, 1), (1, 2)), line=True, notes=(evil, evil))
    for names in ("direct", "legend", "none"):
        chart = Chart(
            label=evil, x=Axis(evil), y=Axis(evil), series=(one,), names=names,
            levels=(Level(evil, 1.5),), width=1200,
        )  # fmt: skip
        text = draw(chart)
        tree = ElementTree.fromstring(text)
        assert "<script" not in text
        text.encode()
        shown = evil.replace("\x00", "\ufffd").replace("\x1b", "\ufffd").replace("\ud800", "\ufffd")
        assert tree.get("aria-label") == shown
        assert {e.get("data-series") for e in tree.iter("g")} >= {shown}
    assert element("p", "a<b", cls='"') == '<p class="&quot;">a&lt;b</p>'
    assert joined("<", element("b")) == "&lt;<b></b>"


def lines_of(count: int, end: float = 10.0) -> list[Series]:
    points = [((0.0, 5.0), (end, 2 + i / 9)) for i in range(count)]
    return [
        Series(name=f"student-{i}", look=i, line=True, marks=False, points=own)
        for i, own in enumerate(points)
    ]


def test_lines_are_named_at_their_ends_apart_from_one_another() -> None:
    tree = drawing(*lines_of(12), width=900)
    names = of(tree, "text", "name")
    assert sorted(str(e.text) for e in names) == sorted(f"student-{i}" for i in range(12))
    heights = sorted(float(str(e.get("y"))) for e in names)
    assert min(np.diff(heights)) >= 14.9
    order = sorted(names, key=lambda e: float(str(e.get("y"))))
    assert [e.text for e in order] == [f"student-{i}" for i in reversed(range(12))]
    assert not of(tree, "g", "legend")[0].findall("text")
    assert float(str(tree.get("height"))) == 340


@pytest.mark.parametrize("case", ["narrow", "ends apart", "asked for"])
def test_a_legend_names_all_where_there_is_no_room_beside_lines(case: str) -> None:
    many = lines_of(12)
    if case == "ends apart":
        many[3] = lines_of(4, end=4.0)[3]
    width = 190.0 if case == "narrow" else 900.0
    tree = drawing(*many, width=width, names="legend" if case == "asked for" else "direct")
    legend = of(tree, "g", "legend")[0]
    assert [e.text for e in legend.findall("text")] == [f"student-{i}" for i in range(12)]
    assert float(str(tree.get("height"))) > 340 + 20
    for entry in legend.findall("text"):
        right = float(str(entry.get("x"))) + text_width(str(entry.text))
        assert right <= width
        assert float(str(entry.get("y"))) < float(str(tree.get("height")))


def test_lines_are_cut_off_at_the_axes() -> None:
    (one,) = lines_of(1)
    tree = drawing(one, y=Axis("y", low=0.0, high=3.0))
    (inner,) = tree.findall("svg")
    assert inner.get("overflow") == "hidden"
    assert min(y for _, y in path_of(tree)[0]) < float(str(inner.get("y")))


def test_bars_stand_on_the_axis_and_the_diagonal_joins_equal_values() -> None:
    axis = Axis("share", form="percent", low=0.0, high=1.0)
    bars = Bars(edges=(0.0, 0.5, 1.0), shares=(0.25, 0.75), height=0.2)
    one = Series(name="s", points=((0.5, 0.5),))
    tree = drawing(one, x=axis, y=axis, bars=bars, diagonal=True, names="none")
    floor = 340 - 42
    low, high = of(tree, "rect", "bar")
    for bar in (low, high):
        bottom = float(str(bar.get("y"))) + float(str(bar.get("height")))
        assert bottom == pytest.approx(floor, abs=0.02)
    assert float(str(high.get("height"))) == pytest.approx(0.2 * (floor - 24), abs=0.02)
    assert float(str(low.get("height"))) * 3 == pytest.approx(float(str(high.get("height"))), 1e-3)
    (line,) = of(tree, "line", "diagonal")
    (point,) = of(tree, "circle", "mark")
    middle = [(float(str(line.get(f"{a}1"))) + float(str(line.get(f"{a}2")))) / 2 for a in "xy"]
    assert middle == pytest.approx([float(str(point.get(f"c{a}"))) for a in "xy"], abs=0.02)


def test_levels_are_named_apart_even_where_they_nearly_agree() -> None:
    levels = (Level("one", 5.0), Level("two", 5.001), Level("lost", NAN))
    tree = drawing(Series(name="s", points=((1, 5.6),)), levels=levels)
    assert len(of(tree, "line", "level")) == 2
    heights = {e.text: float(str(e.get("y"))) for e in of(tree, "text", "name")}
    assert "lost" not in heights
    assert abs(heights["one"] - heights["two"]) >= 14.9


def test_names_beside_points_cover_nothing() -> None:
    random = np.random.default_rng(1)
    frame = Box(0, 0, 600, 400)
    for count in (1, 5, 12):
        points = [(float(x), float(y)) for x, y in random.uniform(60, 340, (count, 2))]
        names = [f"run/student-{i}" for i in range(count)]
        placed = [place for place in beside_points(names, points, frame) if place is not None]
        assert len(placed) == count
        boxes = []
        for place in placed:
            wide = text_width(place.text)
            left = place.x - {"start": 0.0, "middle": 0.5, "end": 1.0}[place.anchor] * wide
            boxes.append(Box(left, place.y - 10, left + wide, place.y + 2))
        for one, other in itertools.combinations(boxes, 2):
            assert one.overlap(other) < 1e-6
        for box, (i, (x, y)) in itertools.product(boxes, enumerate(points)):
            if boxes.index(box) != i:
                assert not box.overlap(Box(x - 4, y - 4, x + 4, y + 4))
        assert all(box.inside(Box(-1, -4, 601, 404)) for box in boxes)


def test_where_points_lie_on_one_another_a_legend_names_them() -> None:
    crowd = [Series(name=f"student-{i}", look=i, points=((1.0, 1.0),)) for i in range(40)]
    names = [one.name for one in crowd]
    assert None in beside_points(names, [(50, 50)] * 40, Box(0, 0, 100, 100))
    tree = drawing(*crowd)
    assert len(of(tree, "g", "legend")[0].findall("text")) == 40


def test_where_there_is_some_room_some_are_named_and_it_is_told_that_not_all_are() -> None:
    crowd = [Series(name=f"student-{i}", look=i, points=((1.0, 1.0),)) for i in range(40)]
    chart = Chart(label="told", x=Axis("x"), y=Axis("y"), series=tuple(crowd), names="room")
    picture, named = draw_named(chart)
    tree = ElementTree.fromstring(picture)
    assert not named
    assert 1 <= len(texts(tree, "name")) < 40
    assert not of(tree, "g", "legend")[0].findall("text")
    few = dataclasses.replace(chart, series=(crowd[0],))
    assert draw_named(few)[1]
    assert draw_named(dataclasses.replace(few, names="legend"))[1]
    assert not draw_named(dataclasses.replace(few, names="none"))[1]


def test_what_was_made_of_another_is_an_outline_joined_to_it() -> None:
    series = [
        Series(name="a (int8)", label="int8", look=0, hollow=2, points=((1, 1),), joined_to="a"),
        Series(name="a", look=0, points=((3, 2),)),
        Series(name="b (int8)", look=1, hollow=2, points=((2, 2),), joined_to="nobody"),
        Series(name="c (int8)", look=1, hollow=2, points=((None, 2),), joined_to="a"),
    ]
    tree = drawing(*series, names="room")
    (line,) = of(tree, "line", "join c0")
    marks = {one.get("data-series"): one for one in tree.iter("g") if one.get("data-series")}
    assert len(of(marks["a (int8)"], "polygon", "mark hollow")) == 1
    assert len(of(marks["a"], "circle", "mark")) == 1
    at = [float(of(marks["a"], "circle", "mark")[0].get(key) or 0) for key in ("cx", "cy")]
    assert [float(line.get(key) or 0) for key in ("x1", "y1")] == pytest.approx(at)
    assert {"int8", "a"} <= {*texts(tree, "name")}


def test_places_are_spread_in_their_order() -> None:
    assert spread([], 10, 0, 100) == []
    assert spread([50.0], 10, 0, 100) == [50.0]
    assert spread([50, 51, 49], 10, 0, 100) == [59, 69, 49]
    assert spread([99, 98, 97], 10, 0, 100) == [100, 90, 80]
    crowded = spread([5.0] * 11, 60, 0, 100)
    assert crowded == pytest.approx([10.0 * i for i in range(11)])


def test_a_long_name_keeps_both_its_ends() -> None:
    assert clipped("small", 200) == "small"
    short_name = clipped("a-very-long-run-name-indeed/student", 120)
    assert short_name.startswith("a-ve")
    assert short_name.endswith("student")
    assert text_width(short_name) <= 120
    assert clipped("abcdef", 1) == "a\u2026"


def test_no_two_of_many_series_look_alike() -> None:
    seen = {
        (look % COLOURS, dashes(look), re.sub(r'cx="\d+" cy="\d+"', "", mark(look, 0, 0)))
        for look in range(4 * COLOURS)
    }
    assert len(seen) == 4 * COLOURS
    marks = {re.sub(r"[\d.]", "", mark(look, 0, 0)) for look in (*range(COLOURS), None)}
    assert len(marks) > 4
    sample = ElementTree.fromstring(swatch(7, 0, 5, line=True, marks=True))
    assert sample.get("class") == "c1"


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


def linear(colour: str) -> Any:
    rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def oklab(rgb: Any) -> Any:
    to_cones = [
        [0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]  # fmt: skip
    to_lab = [
        [0.2104542553, 0.7936177850, -0.0040720468], [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]  # fmt: skip
    return np.array(to_lab) @ np.cbrt(np.array(to_cones) @ np.clip(rgb, 0, 1))


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_colours_differ_for_every_eye_and_stand_out_from_the_paper(theme: int) -> None:
    colours = [re.findall(rf"--c{i}: (#\w{{6}})", STYLE)[theme] for i in range(COLOURS)]
    paper = linear(re.findall(r"--chart-paper: (#\w{6})", STYLE)[theme])
    weights = np.array([0.2126, 0.7152, 0.0722])
    for colour in colours:
        pair = sorted((float(linear(colour) @ weights), float(paper @ weights)))
        assert (pair[1] + 0.05) / (pair[0] + 0.05) >= 3.0
    for name, eye in MACHADO.items():
        for one, other in itertools.combinations(colours, 2):
            apart = np.linalg.norm(oklab(eye @ linear(one)) - oklab(eye @ linear(other)))
            assert apart > 0.1, (name, one, other)
