"""The page of a comparison in a real browser: both themes, a desk and a phone, paper."""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING, Any

import pytest
from coldstill.pipeline.pages.compare.page import write_page
from compared import Made, write_run

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytest_plugins = ("browser", "desk")

NAMES = ["small", "bare", *(f"variant-{i}" for i in range(8))]
STUDENTS = [
    Made(name=name, loss=5 + i / 20, cached=0.0 if name == "bare" else 42.3)
    for i, name in enumerate(NAMES)
]
LABELS = [f"a/{name}" for name in NAMES] + ["a-run-with-a-name-of-some-length/small"]


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of two runs and eleven students."""
    from coldstill.pipeline.recipe.run_folder import Run
    from coldstill.pipeline.steps.comparison import compare

    folder = tmp_path_factory.mktemp("page")
    other = Made(name="small", cached=17.0, parameters=9_000_000, steps=300)
    folders = [
        write_run(folder, "a", STUDENTS),
        write_run(folder, "a-run-with-a-name-of-some-length", [other], heldout="beef"),
    ]
    runs = [Run(root) for root in folders]
    write_page(folder / "p.html", runs, compare(runs))
    return folder / "p.html"


@pytest.fixture
def opened(open_file: Callable[..., Any], page_file: Path) -> Callable[..., Any]:
    """Opens the page; fails if it asks for anything, or complains."""
    return functools.partial(open_file, page_file)


def drawn(page: Any) -> list[set[str]]:
    """What is drawn and can be seen, section by section."""
    return page.locator("section").evaluate_all(  # type: ignore[no-any-return]
        """sections => sections.map(s => [...s.querySelectorAll("[data-series]")]
          .filter(g => g.getBoundingClientRect().width > 0).map(g => g.dataset.series))"""
    )


@pytest.mark.parametrize("scripts", [True, False], ids=["scripts on", "scripts off"])
@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844)])
def test_every_student_is_seen_in_every_plot(
    opened: Any, width: int, height: int, scripts: bool
) -> None:
    page = opened(width, height, java_script_enabled=scripts)
    assert page.title() == "2 runs - coldstill compare"
    rows = page.locator("tbody th").all_inner_texts()
    assert {row.strip() for row in rows} >= set(LABELS)
    if not scripts:
        place = ".desk" if width > 1000 else ".phone"
        assert page.locator(f"section {place} svg[role=img]").first.is_visible()
        return
    plots = drawn(page)[1:]  # the first section is the table
    assert len(plots) == 5
    for names in plots:
        assert set(LABELS) <= set(names)


@pytest.mark.parametrize("width", [1280, 1000, 840, 800, 390, 320])
def test_nothing_needs_scrolling_sideways_and_letters_stay_large(opened: Any, width: int) -> None:
    page = opened(width, 844)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    # an svg's letters are 12 pixels at its own size; a picture may shrink them by its scale
    scales = page.locator("svg[role=img]").evaluate_all(
        """all => all.filter(s => s.getBoundingClientRect().width > 0)
          .map(s => s.getBoundingClientRect().width / s.viewBox.baseVal.width)"""
    )
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
    from coldstill.pipeline.recipe.run_folder import Run
    from coldstill.pipeline.steps.comparison import compare

    long = "small-learning_rate-0.003-" * 5
    run = Run(write_run(tmp_path, "a", [Made(name=long), Made(name="bare", cached=0.0)]))
    write_page(tmp_path / "p.html", [run], compare([run]))
    for width, most in ((1280, 400), (390, 190)):
        page = open_file(tmp_path / "p.html", width, 844)
        first = page.locator("tbody tr >> nth=1").locator("th, td")
        assert first.first.bounding_box()["width"] < most
        inside = first.first.locator("bdi").bounding_box()
        assert inside["x"] + inside["width"] <= first.nth(1).bounding_box()["x"]


CONTRAST = """elements => {
  const channel = c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const luminance = rgb => { const [r, g, b] = rgb.match(/[\\d.]+/g).map(Number).map(channel);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const paper = luminance(getComputedStyle(document.body).backgroundColor);
  return elements.map(e => {
    const style = getComputedStyle(e), svg = e.namespaceURI.endsWith("svg");
    const pair = [luminance(svg ? style.fill : style.color), paper].sort((a, b) => b - a);
    return (pair[0] + 0.05) / (pair[1] + 0.05);
  });
}"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_and_marks_can_be_read_in_both_themes(opened: Any, theme: str) -> None:
    page = opened(color_scheme=theme)
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(int(part) for part in re.findall(r"\d+", paper)) > 600) == (theme == "light")
    text = page.locator("svg text, .caption, td, th, h2, dd, dt").evaluate_all(CONTRAST)
    assert min(text) >= 4.5
    assert min(page.locator("svg .mark").evaluate_all(CONTRAST)) >= 3.0


@pytest.mark.parametrize("width", [1280, 390])
def test_names_in_a_picture_do_not_cover_one_another(opened: Any, width: int) -> None:
    page = opened(width, 844)
    covered = page.locator("svg[role=img]").evaluate_all(
        """all => all.flatMap(svg => {
          const names = [...svg.querySelectorAll("text.name")].filter(t => t.getBBox().width > 0);
          const boxes = names.map(t => t.getBoundingClientRect());
          const picture = svg.getBoundingClientRect(), wrong = [];
          boxes.forEach((a, i) => {
            if (a.left < picture.left - 1 || a.right > picture.right + 1)
              wrong.push("outside: " + names[i].textContent);
            for (const b of boxes.slice(i + 1))
              if (Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1 &&
                  Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 3)
                wrong.push("covered: " + names[i].textContent);
          });
          return wrong;
        })"""
    )
    assert covered == []


def test_the_warning_and_a_text_for_each_picture_are_there(opened: Any) -> None:
    page = opened()
    assert "do not compare: a against a-run" in page.locator(".note").inner_text()
    for label in page.locator("section .desk svg[role=img]").evaluate_all(
        "all => all.map(svg => svg.getAttribute('aria-label'))"
    ):
        assert re.search(r"\d", label), label
    assert page.locator("section p.caption").count() == 7


def test_it_can_be_printed(opened: Any) -> None:
    page = opened()
    page.emulate_media(media="print", color_scheme="light")
    document = page.pdf(format="A4")
    assert document.startswith(b"%PDF")
    assert len(document) > 20_000
