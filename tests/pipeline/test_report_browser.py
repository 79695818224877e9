"""The page of a report in a real browser: both themes, wide and narrow, and paper."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import TYPE_CHECKING, Any

import pytest
from coldstill.pipeline.pages.report.page import write_page
from compared import FORMATS, Made
from page_probes import CONTRAST, COVERED, MARKS, SCALES, SHOWN
from reported import STUDENTS, report_facts

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytest_plugins = ("browser",)

NAMES = ["small", "bare", "small-learning_rate-0.003-steps-200"]


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run with three students, one of them with a long name, and eight exports."""
    folder = tmp_path_factory.mktemp("page")
    third = Made(name=NAMES[2], loss=5.1, parameters=9_000_000, cached=17.0)
    small, bare = STUDENTS
    exported = dataclasses.replace(small, exports=FORMATS)
    students = [exported, bare, dataclasses.replace(third, exports=("onnx-int8", "gguf-q8_0"))]
    facts = report_facts(folder, students, name="a-run-with-a-name-of-some-length")
    write_page(folder / "p.html", facts)
    return folder / "p.html"


@pytest.fixture
def opened(open_file: Callable[..., Any], page_file: Path) -> Callable[..., Any]:
    """Opens the page; fails if it asks for anything, or complains."""
    return functools.partial(open_file, page_file)


@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844)])
def test_the_first_screen_has_the_result(opened: Any, width: int, height: int) -> None:
    page = opened(width, height)
    assert page.title() == "a-run-with-a-name-of-some-length - coldstill report"
    seen = ["h1", ".result", ".card >> nth=0", ".card >> nth=1"]
    if width > 1000:
        seen += [".card >> nth=3", "table tbody tr >> nth=1"]
    for place in seen:
        box = page.locator(place).bounding_box()
        assert box["y"] + box["height"] <= height, place


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 1000, 840, 390, 320])
def test_nothing_needs_scrolling_sideways(opened: Any, width: int, theme: str) -> None:
    page = opened(width, 844, color_scheme=theme)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    scales = page.locator("svg[role=img]").evaluate_all(SCALES)
    assert len(scales) == 4 + 4 + 1 + 2
    assert min(scales) * 12 > 8.5
    assert max(scales) < 1.6


def test_every_model_is_in_every_plot_of_quality_and_in_one_legend(opened: Any) -> None:
    page = opened()
    panels = page.locator("section .panels figure").evaluate_all(SHOWN)
    assert len(panels) == 4 + 4
    exports = {f"small ({name})" for name in FORMATS}
    exports |= {f"{NAMES[2]} ({name})" for name in ("onnx-int8", "gguf-q8_0")}
    for place, names in enumerate(panels):
        assert {*names} == {"teacher", *NAMES, *(exports if place % 4 else ())}
    assert page.locator("svg[role=img]").evaluate_all(COVERED) == []
    legends = page.locator(".panels + ul.key")
    assert legends.count() == 2
    shown = legends.first.locator("li").all_inner_texts()
    assert sorted(shown) == sorted(["teacher", *NAMES, *FORMATS])


@pytest.mark.parametrize("width", [1280, 390])
def test_both_tables_fit_a_wide_screen_and_show_on_a_phone_that_they_scroll(
    opened: Any, width: int
) -> None:
    boxes = opened(width, 844).locator(".scroll")
    assert boxes.count() == 2
    over = boxes.evaluate_all("all => all.map(e => e.scrollWidth - e.clientWidth)")
    shades = boxes.evaluate_all("all => all.map(e => getComputedStyle(e).backgroundAttachment)")
    assert all(pixels <= 1 for pixels in over) if width > 1000 else min(over) > 100
    assert shades == ["local, scroll"] * 2
    # an export is indented below its student, on one line
    indents = boxes.first.locator("tbody th bdi").evaluate_all(
        "all => all.map(e => [e.textContent, e.getBoundingClientRect().left, e.clientHeight])"
    )
    places = {name: (left, height) for name, left, height in indents}
    assert places["onnx-int8"][0] > places["small"][0] + 10
    assert places["torchao-int8"][1] < 1.8 * places["hf"][1]


def test_the_hint_on_pointing_needs_a_pointer(opened: Any) -> None:
    hint = ".pointer"
    assert opened(1280, 900).locator(hint).is_visible()
    assert not opened(390, 844, has_touch=True, is_mobile=True).locator(hint).is_visible()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_all_text_can_be_read_in_both_themes(opened: Any, theme: str) -> None:
    page = opened(color_scheme=theme)
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(int(part) for part in re.findall(r"\d+", paper)) > 600) == (theme == "light")
    words = "p, b, small, pre, td, th, h2, h3, dd, dt, li, svg text"
    assert min(page.locator(words).evaluate_all(CONTRAST)) >= 4.5
    assert min(page.locator(MARKS).evaluate_all(CONTRAST)) >= 3.0


@pytest.mark.parametrize("width", [1280, 390])
def test_texts_of_models_stand_side_by_side_where_there_is_room(opened: Any, width: int) -> None:
    page = opened(width, 844)
    columns = page.locator("article >> nth=0").locator(".columns > div")
    boxes = [column.bounding_box() for column in columns.all()]
    assert len(boxes) == 2 + len(NAMES)
    beside = sum(box["y"] == boxes[0]["y"] for box in boxes)
    assert beside >= 4 if width > 1000 else beside == 1
    pre = page.locator(".texts pre")
    assert pre.evaluate_all("all => all.every(e => e.scrollWidth <= e.clientWidth + 1)")
    assert "\n\treturn a" in pre.first.evaluate("e => e.textContent")


def test_it_can_be_printed(opened: Any) -> None:
    page = opened()
    page.emulate_media(media="print", color_scheme="light")
    assert page.evaluate("document.documentElement.scrollWidth") <= 1280
    document = page.pdf(format="A4")
    assert document.startswith(b"%PDF")
    assert len(document) > 20_000
