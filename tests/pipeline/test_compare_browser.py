"""The page of a comparison in a real browser: both themes, wide and narrow, and paper."""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING, Any

import pytest
from coldstill.pipeline.pages.compare.page import write_page
from coldstill.pipeline.recipe.run_folder import Run
from coldstill.pipeline.results.rows import compared_rows
from compared import Made, write_run
from page_probes import CONTRAST, COVERED, MARKS, SCALES, SHOWN

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytest_plugins = ("browser",)

NAMES = ["small", "bare", *(f"variant-{i}" for i in range(8))]
STUDENTS = [
    Made(name=name, loss=5 + i / 20, cached=0.0 if name == "bare" else 42.3)
    for i, name in enumerate(NAMES)
]
LABELS = [f"a/{name}" for name in NAMES] + ["a-run-with-a-name-of-some-length/small"]


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of two runs and eleven students."""
    folder = tmp_path_factory.mktemp("page")
    other = Made(name="small", cached=17.0, parameters=9_000_000, steps=300)
    folders = [
        write_run(folder, "a", STUDENTS),
        write_run(folder, "a-run-with-a-name-of-some-length", [other], heldout="beef"),
    ]
    runs = [Run(root) for root in folders]
    write_page(folder / "p.html", runs, compared_rows(runs))
    return folder / "p.html"


@pytest.fixture
def opened(open_file: Callable[..., Any], page_file: Path) -> Callable[..., Any]:
    """Opens the page; fails if it asks for anything, or complains."""
    return functools.partial(open_file, page_file)


@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844)])
def test_every_student_is_visible_in_every_plot(opened: Any, width: int, height: int) -> None:
    page = opened(width, height)
    assert page.title() == "2 runs - coldstill compare"
    rows = page.locator("tbody th").all_inner_texts()
    assert {row.strip() for row in rows} >= set(LABELS)
    plots = page.locator("section").evaluate_all(SHOWN)[1:]  # the first section has the tables
    assert len(plots) == 5
    assert all(set(LABELS) <= set(names) for names in plots)
    assert page.locator("svg[role=img]").evaluate_all(COVERED) == []
    without = opened(width, height, java_script_enabled=False)
    assert without.locator(
        f"section {'.desk' if width > 1000 else '.phone'} svg"
    ).first.is_visible()


@pytest.mark.parametrize("width", [1280, 1000, 840, 800, 390, 320])
def test_nothing_needs_scrolling_sideways_and_letters_stay_large(opened: Any, width: int) -> None:
    page = opened(width, 844)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    scales = page.locator("svg[role=img]").evaluate_all(SCALES)
    assert len(scales) == 3 + 2 * len(LABELS)
    assert min(scales) * 12 > 8.5
    assert max(scales) < 1.6


def test_figures_scroll_in_their_own_box_with_the_names_in_sight(opened: Any) -> None:
    page = opened(390, 844)
    box = page.locator(".scroll").first
    assert box.evaluate("e => e.scrollWidth > e.clientWidth")
    box.focus()
    box.evaluate("e => e.scrollLeft = e.scrollWidth")
    name = page.locator("tbody th").first
    assert name.bounding_box()["x"] == pytest.approx(box.bounding_box()["x"], abs=1)


def test_a_long_name_does_not_push_figures_out_of_sight(open_file: Any, tmp_path: Path) -> None:
    long = "small-learning_rate-0.003-" * 5
    runs = [Run(write_run(tmp_path, "a", [Made(name=long), Made(name="bare", cached=0.0)]))]
    write_page(tmp_path / "p.html", runs, compared_rows(runs))
    for width, most in ((1280, 400), (390, 190)):
        page = open_file(tmp_path / "p.html", width, 844)
        first = page.locator("tbody tr >> nth=1").locator("th, td")
        assert first.first.bounding_box()["width"] < most
        inside = first.first.locator("bdi").bounding_box()
        assert inside["x"] + inside["width"] <= first.nth(1).bounding_box()["x"]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_and_marks_can_be_read_in_both_themes(opened: Any, theme: str) -> None:
    page = opened(color_scheme=theme)
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(int(part) for part in re.findall(r"\d+", paper)) > 600) == (theme == "light")
    text = page.locator("svg text, .caption, td, th, h2, dd, dt").evaluate_all(CONTRAST)
    assert min(text) >= 4.5
    marks = page.locator(MARKS).evaluate_all(CONTRAST)
    assert len(marks) > 2 * len(LABELS)
    assert min(marks) >= 3.0


def test_the_warning_and_a_text_for_each_picture_are_there_and_it_prints(opened: Any) -> None:
    page = opened()
    assert "do not compare: a against a-run" in page.locator(".note").inner_text()
    labels = page.locator("section svg[role=img]").evaluate_all(
        "all => all.map(svg => svg.getAttribute('aria-label'))"
    )
    assert all(re.search(r"\d", label) for label in labels)
    assert page.locator("section p.caption").count() == 7
    page.emulate_media(media="print", color_scheme="light")
    document = page.pdf(format="A4")
    assert document.startswith(b"%PDF")
    assert len(document) > 20_000
