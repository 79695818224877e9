"""The pages of compare and report in a real browser: both themes, wide and narrow, and paper."""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING, Any

import pytest
from coldstill.pipeline.pages.compare.page import write_page as write_comparison
from coldstill.pipeline.pages.report.page import write_page as write_report
from coldstill.pipeline.recipe.run_folder import Run
from coldstill.pipeline.results.rows import compared_rows
from compared import FORMATS, Made, write_run
from reported import STUDENTS as PAIR
from reported import report_facts

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow

pytest_plugins = ("browser",)

NAMES = ["small", "bare", *(f"variant-{i}" for i in range(8))]
STUDENTS = [
    Made(name=name, loss=5 + i / 20, cached=0.0 if name == "bare" else 42.3)
    for i, name in enumerate(NAMES)
]
LONG = "a-run-with-a-name-of-some-length"
LABELS = [f"a/{name}" for name in NAMES] + [f"{LONG}/small"]
REPORTED = ["small", "bare", "small-learning_rate-0.003-steps-200"]
PICTURES = {"compare": 3 + 2 * len(LABELS), "report": 4 + 4 + 1 + 2}
"""Visible pictures of each page."""

CONTRAST = """elements => {
  const channel = c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const luminance = rgb => { const [r, g, b] = rgb.match(/[\\d.]+/g).map(Number).map(channel);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const below = e => { const own = getComputedStyle(e).backgroundColor;
    return own.startsWith("rgba(0, 0, 0, 0") ? below(e.parentElement) : own; };
  return elements.map(e => {
    const svg = e.namespaceURI.endsWith("svg"), style = getComputedStyle(e);
    const own = !svg ? style.color : style.fill === "none" ? style.stroke : style.fill;
    const pair = [luminance(own), luminance(below(e))].sort((a, b) => b - a);
    return (pair[0] + 0.05) / (pair[1] + 0.05);
  });
}"""
"""Contrast of each element with the paper below it."""

SCALES = """all => all.filter(s => s.getBoundingClientRect().width > 0)
  .map(s => s.getBoundingClientRect().width / s.viewBox.baseVal.width)"""
"""Scale of each visible picture; letters are 12 pixels at scale 1."""

SHOWN = """sections => sections.map(s => [...s.querySelectorAll("title")]
  .filter(t => t.parentElement.getBoundingClientRect().width > 0)
  .map(t => t.textContent.split(": ")[0]))"""
"""Names of the models with a visible line or mark, section by section."""

COVERED = """all => all.flatMap(svg => {
  const names = [...svg.querySelectorAll(".mark-text.role-mark text")]
    .filter(t => t.getBBox().width > 0);
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
"""Names in pictures that leave their picture or cover another name."""

MARKS = ".mark-symbol.role-mark path[fill], .swatch .mark"
"""Filled marks of plots and legends."""


def write_compared(folder: Path, roots: list[Path]) -> Path:
    """Write the comparison of runs."""
    runs = [Run(root) for root in roots]
    write_comparison(folder / "compare.html", runs, compared_rows(runs))
    return folder / "compare.html"


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A comparison of two runs, and a report of three students, two of them with exports."""
    folder = tmp_path_factory.mktemp("page")
    other = Made(name="small", cached=17.0, parameters=9_000_000, steps=300)
    roots = [write_run(folder, "a", STUDENTS), write_run(folder, LONG, [other], heldout="beef")]
    small, bare = PAIR
    third = Made(name=REPORTED[2], loss=5.1, parameters=9_000_000, cached=17.0)
    students = [
        dataclasses.replace(small, exports=FORMATS),
        bare,
        dataclasses.replace(third, exports=("onnx-int8", "gguf-q8_0")),
    ]
    write_report(folder / "report.html", report_facts(folder / "report", students, name=LONG))
    return {"compare": write_compared(folder, roots), "report": folder / "report.html"}


@pytest.mark.parametrize("kind", ["compare", "report"])
def test_a_page_fits_every_width_in_both_themes_and_prints(
    open_file: Any, pages: dict[str, Path], kind: str
) -> None:
    for theme in ("light", "dark"):
        page = open_file(pages[kind], color_scheme=theme)
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        bright = sum(int(part) for part in re.findall(r"\d+", paper)) > 600
        assert bright == (theme == "light")
        words = "p, b, small, pre, td, th, h2, h3, dd, dt, li, svg text"
        assert min(page.locator(words).evaluate_all(CONTRAST)) >= 4.5
        marks = page.locator(MARKS).evaluate_all(CONTRAST)
        assert len(marks) > PICTURES[kind]
        assert min(marks) >= 3.0
        for width in (1280, 1000, 840, 800, 390, 320):
            page.set_viewport_size({"width": width, "height": 844})
            assert page.evaluate("document.documentElement.scrollWidth") == width
            scales = page.locator("svg[role=img]").evaluate_all(SCALES)
            assert len(scales) == PICTURES[kind]
            assert min(scales) * 12 > 8.5
            assert max(scales) < 1.6
    page.set_viewport_size({"width": 1280, "height": 900})
    assert page.locator("svg[role=img]").evaluate_all(COVERED) == []
    page.emulate_media(media="print", color_scheme="light")
    assert page.evaluate("document.documentElement.scrollWidth") <= 1280
    document = page.pdf(format="A4")
    assert document.startswith(b"%PDF")
    assert len(document) > 20_000


@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844)])
def test_every_student_is_visible_in_every_plot_of_a_comparison(
    open_file: Any, pages: dict[str, Path], width: int, height: int
) -> None:
    page = open_file(pages["compare"], width, height)
    assert page.title() == "2 runs - coldstill compare"
    assert "do not compare: a against a-run" in page.locator(".note").inner_text()
    rows = page.locator("tbody th").all_inner_texts()
    assert {row.strip() for row in rows} >= set(LABELS)
    plots = page.locator("section").evaluate_all(SHOWN)[1:]  # the first section has the tables
    assert len(plots) == 5
    assert all(set(LABELS) <= set(names) for names in plots)
    assert page.locator("svg[role=img]").evaluate_all(COVERED) == []
    labels = page.locator("section svg[role=img]").evaluate_all(
        "all => all.map(svg => svg.getAttribute('aria-label'))"
    )
    assert all(re.search(r"\d", label) for label in labels)
    assert page.locator("section p.caption").count() == 7
    without = open_file(pages["compare"], width, height, java_script_enabled=False)
    layout = ".desk" if width > 1000 else ".phone"
    assert without.locator(f"section {layout} svg").first.is_visible()


def test_names_of_students_stay_in_sight_beside_their_figures(
    open_file: Any, pages: dict[str, Path], tmp_path: Path
) -> None:
    page = open_file(pages["compare"], 390, 844)
    box = page.locator(".scroll").first
    assert box.evaluate("e => e.scrollWidth > e.clientWidth")
    box.focus()
    box.evaluate("e => e.scrollLeft = e.scrollWidth")
    name = page.locator("tbody th").first
    assert name.bounding_box()["x"] == pytest.approx(box.bounding_box()["x"], abs=1)
    long = Made(name="small-learning_rate-0.003-" * 5)
    path = write_compared(tmp_path, [write_run(tmp_path, "a", [long, PAIR[1]])])
    for width, most in ((1280, 400), (390, 190)):
        first = open_file(path, width, 844).locator("tbody tr >> nth=1").locator("th, td")
        assert first.first.bounding_box()["width"] < most
        inside = first.first.locator("bdi").bounding_box()
        assert inside["x"] + inside["width"] <= first.nth(1).bounding_box()["x"]


@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844)])
def test_a_report_starts_with_the_result_and_its_tables_fit(
    open_file: Any, pages: dict[str, Path], width: int, height: int
) -> None:
    page = open_file(pages["report"], width, height)
    assert page.title() == f"{LONG} - coldstill report"
    wide = width > 1000
    seen = ["h1", ".result", ".card >> nth=0", ".card >> nth=1"]
    seen += [".card >> nth=3", "table tbody tr >> nth=1"] if wide else []
    for place in seen:
        box = page.locator(place).bounding_box()
        assert box["y"] + box["height"] <= height, place
    boxes = page.locator(".scroll")
    assert boxes.count() == 2
    over = boxes.evaluate_all("all => all.map(e => e.scrollWidth - e.clientWidth)")
    assert all(pixels <= 1 for pixels in over) if wide else min(over) > 100
    shades = boxes.evaluate_all("all => all.map(e => getComputedStyle(e).backgroundAttachment)")
    assert shades == ["local, scroll"] * 2
    # an export is indented below its student, on one line
    indents = boxes.first.locator("tbody th bdi").evaluate_all(
        "all => all.map(e => [e.textContent, e.getBoundingClientRect().left, e.clientHeight])"
    )
    places = {name: (left, tall) for name, left, tall in indents}
    assert places["onnx-int8"][0] > places["small"][0] + 10
    assert places["torchao-int8"][1] < 1.8 * places["hf"][1]
    # texts of models stand side by side where a screen is wide enough
    columns = page.locator("article >> nth=0").locator(".columns > div")
    tops = [column.bounding_box()["y"] for column in columns.all()]
    assert len(tops) == 2 + len(REPORTED)
    assert tops.count(tops[0]) >= 4 if wide else tops.count(tops[0]) == 1
    pre = page.locator(".texts pre")
    assert pre.evaluate_all("all => all.every(e => e.scrollWidth <= e.clientWidth + 1)")
    assert "\n\treturn a" in pre.first.evaluate("e => e.textContent")


def test_every_model_is_in_every_plot_of_a_report_and_in_one_legend(
    open_file: Any, pages: dict[str, Path]
) -> None:
    page = open_file(pages["report"])
    panels = page.locator("section .panels figure").evaluate_all(SHOWN)
    assert len(panels) == 4 + 4
    exports = {f"small ({name})" for name in FORMATS}
    exports |= {f"{REPORTED[2]} ({name})" for name in ("onnx-int8", "gguf-q8_0")}
    for place, names in enumerate(panels):
        assert {*names} == {"teacher", *REPORTED, *(exports if place % 4 else ())}
    legends = page.locator(".panels + ul.key")
    assert legends.count() == 2
    shown = legends.first.locator("li").all_inner_texts()
    assert sorted(shown) == sorted(["teacher", *REPORTED, *FORMATS])
    # the hint on pointing needs a pointer
    assert page.locator(".pointer").is_visible()
    phone = open_file(pages["report"], 390, 844, has_touch=True, is_mobile=True)
    assert not phone.locator(".pointer").is_visible()
