"""The page of a report in a real browser: both themes, a desk and a phone, paper."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import TYPE_CHECKING, Any

import pytest
from coldstill.pipeline.pages.report.page import write_page
from compared import FORMATS, Made
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
def test_the_first_screen_tells_the_story(opened: Any, width: int, height: int) -> None:
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
    scales = page.locator("svg[role=img]").evaluate_all(
        """all => all.filter(s => s.getBoundingClientRect().width > 0)
          .map(s => s.getBoundingClientRect().width / s.viewBox.baseVal.width)"""
    )
    assert len(scales) == 4 + 4 + 1 + 2
    assert min(scales) * 12 > 8.5
    assert max(scales) < 1.6


def test_every_model_is_in_every_plot_of_quality(opened: Any) -> None:
    plots = (
        opened()
        .locator("section .panels")
        .evaluate_all(
            """all => all.map(s => [...s.querySelectorAll(".desk > svg")]
          .map(svg => [...svg.querySelectorAll("[data-series]")].map(g => g.dataset.series)))"""
        )
    )
    assert [len(panels) for panels in plots] == [4, 4]
    exports = {f"small ({name})" for name in FORMATS}
    exports |= {f"{NAMES[2]} ({name})" for name in ("onnx-int8", "gguf-q8_0")}
    for parameters, *others in plots:
        assert {*parameters} == {"teacher", *NAMES}
        assert all({*names} == {"teacher", *NAMES, *exports} for names in others)


@pytest.mark.parametrize("width", [1280, 390])
def test_both_tables_fit_a_desk_and_say_on_a_phone_that_they_go_on(opened: Any, width: int) -> None:
    boxes = opened(width, 844).locator(".scroll")
    assert boxes.count() == 2
    over = boxes.evaluate_all("all => all.map(e => e.scrollWidth - e.clientWidth)")
    shades = boxes.evaluate_all("all => all.map(e => getComputedStyle(e).backgroundAttachment)")
    assert all(pixels <= 1 for pixels in over) if width > 1000 else min(over) > 100
    assert shades == ["local, scroll"] * 2
    # an export stands a step to the right of its student, on one line
    indents = boxes.first.locator("tbody th bdi").evaluate_all(
        "all => all.map(e => [e.textContent, e.getBoundingClientRect().left, e.clientHeight])"
    )
    places = {name: (left, height) for name, left, height in indents}
    assert places["onnx-int8"][0] > places["small"][0] + 10
    assert places["torchao-int8"][1] < 1.8 * places["hf"][1]


def test_names_in_a_crowd_are_told_once_for_all_pictures(opened: Any) -> None:
    keys = opened().locator("ul.key")
    assert keys.count() == 2
    told = keys.first.locator("li").all_inner_texts()
    assert sorted(told) == sorted(["teacher", *NAMES, *FORMATS])


def test_nobody_without_a_pointer_is_asked_to_point(opened: Any) -> None:
    hint = ".pointer"
    assert opened(1280, 900).locator(hint).is_visible()
    assert not opened(390, 844, has_touch=True, is_mobile=True).locator(hint).is_visible()


CONTRAST = """elements => {
  const channel = c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const luminance = rgb => { const [r, g, b] = rgb.match(/[\\d.]+/g).map(Number).map(channel);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const below = e => { const own = getComputedStyle(e).backgroundColor;
    return own.startsWith("rgba(0, 0, 0, 0") ? below(e.parentElement) : own; };
  return elements.map(e => {
    const svg = e.namespaceURI.endsWith("svg"), style = getComputedStyle(e);
    const pair = [luminance(svg ? style.fill : style.color), luminance(below(e))];
    pair.sort((a, b) => b - a);
    return (pair[0] + 0.05) / (pair[1] + 0.05);
  });
}"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_all_text_can_be_read_in_both_themes(opened: Any, theme: str) -> None:
    page = opened(color_scheme=theme)
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(int(part) for part in re.findall(r"\d+", paper)) > 600) == (theme == "light")
    words = "p, b, small, pre, td, th, h2, h3, dd, dt, li, svg text"
    assert min(page.locator(words).evaluate_all(CONTRAST)) >= 4.5
    assert min(page.locator("svg .mark").evaluate_all(CONTRAST)) >= 3.0


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


def test_scripts_are_not_needed(opened: Any) -> None:
    page = opened(java_script_enabled=False)
    assert page.locator("section .desk svg[role=img]").first.is_visible()


def test_it_can_be_printed(opened: Any) -> None:
    page = opened()
    page.emulate_media(media="print", color_scheme="light")
    assert page.evaluate("document.documentElement.scrollWidth") <= 1280
    document = page.pdf(format="A4")
    assert document.startswith(b"%PDF")
    assert len(document) > 20_000
