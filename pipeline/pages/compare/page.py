"""A comparison as one page: nothing outside itself, no script; it can be printed and sent.

Names come from recipes and folders. All markup is made by `charts.element`, which escapes them.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from .... import __version__
from ....data.files import whole_file
from ...results.caveats import lacking, warnings
from ...results.curves import read_curves
from ...results.names import visible
from ..charts import STYLE, Markup, draw_named, element, joined, swatch
from ..self_contained import expect_file, filled, policy
from .figures import figures_section
from .plots import make_plots

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ...recipe.run_folder import Run
    from ...results.columns import Row
    from ...results.curves import Curve
    from ..charts import Chart
    from .plot import Plot


_TEMPLATES = Path(__file__).parent / "templates"
_WIDE, _HALF, _PHONE = (1040, 380), (544, 330), (352, 300)
_SMALL = {4: (264, 220), 3: (364, 260), 2: (544, 290)}
"""Pictures are drawn for the place they have: a scaled one has letters nobody can read."""


def write_page(path: Path, runs: Sequence[Run], rows: Sequence[Row]) -> None:
    """Write the page whole.

    Raises
        ColdstillError: the path is a folder
    """
    expect_file(path)
    content = page(rows, read_curves(runs), [visible(str(run.root)) for run in runs])
    with whole_file(path) as scratch:
        scratch.write_bytes(content.encode())


def page(rows: Sequence[Row], curves: Mapping[str, Curve], runs: Sequence[str]) -> str:
    """The page as HTML.

    runs  where the runs are, for the head of the page
    """
    names = [name.rstrip("/").rpartition("/")[2] for name in runs]
    title = names[0] if len(names) == 1 else f"{len(names)} runs"
    notes = [*warnings(rows)]
    if old := lacking(rows):
        notes.append(f"no calibration in older figures of {', '.join(old)}; run coldstill evaluate")
    introduction = joined(
        *(element("p", note, cls="note") for note in notes), element("dl", _facts(rows, runs))
    )
    sections = [
        figures_section(rows),
        *(section(plot) for plot in make_plots(rows, curves)),
    ]
    return whole_page("compare", title, introduction, sections)


def whole_page(
    command: str, title: str, introduction: Markup, sections: Sequence[Markup], style: str = ""
) -> str:
    """A page of a command about models as HTML.

    introduction  below its title
    style         rules of its own, besides those for tables and plots
    """
    style = STYLE + (_TEMPLATES / "page.css").read_text(encoding="utf-8") + style
    parts = {
        "POLICY": policy(style),
        "STYLE": style,
        "COMMAND": joined(command),
        "TITLE": joined(title),
        "INTRODUCTION": introduction,
        "SECTIONS": joined(*sections),
        "VERSION": joined(__version__),
    }
    return filled((_TEMPLATES / "page.html").read_text(encoding="utf-8"), parts)


def _facts(rows: Sequence[Row], runs: Sequence[str]) -> Markup:
    students = sum(row["role"] == "student" for row in rows)
    teachers = sum(row["role"] == "teacher" for row in rows)
    whole = [row for row in rows if row["role"] != "export"]  # those read a sample
    positions = sorted({row["positions"] for row in whole if "positions" in row})
    facts = [
        ("runs" if len(runs) > 1 else "run", ", ".join(runs)),
        ("models", f"{_counted(students, 'student')}, {_counted(teachers, 'teacher')}"),
        ("measured on", " or ".join(f"{n:,}" for n in positions) + " held-out positions"),
    ]
    shown = [(name, value) for name, value in facts if value]
    return joined(
        *(part for name, value in shown for part in (element("dt", name), element("dd", value)))
    )


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" + ("" if count == 1 else "s")


def section(plot: Plot) -> Markup:
    """A plot with its title and caption, as wide as it needs."""
    if not plot.panels:
        inside = element("p", "Nothing of this is known.", cls="none")
    elif _is_alone(plot):
        inside = _picture(plot.panels[0].chart, _WIDE if _has_lines(plot) else _HALF)[0]
    else:
        inside = _side_by_side(plot)
    caption = element("p", plot.caption, cls="caption")
    half = len(plot.panels) == 1 and not _has_lines(plot)
    return element(
        "section", element("h2", plot.title), inside, caption, cls="half" if half else "whole"
    )


def _is_alone(plot: Plot) -> bool:
    return len(plot.panels) == 1 and not plot.panels[0].name


def _has_lines(plot: Plot) -> bool:
    return any(one.line for one in plot.panels[0].chart.series)


def _side_by_side(plot: Plot) -> Markup:
    """Small pictures, and below them what none of them says: one legend for all."""
    figures, complete = [], True
    for panel in plot.panels:
        title = element("figcaption", element("bdi", panel.name), element("small", panel.detail))
        picture, named = _picture(panel.chart, _SMALL[plot.columns])
        figures.append(element("figure", title, picture))
        complete = complete and (named or panel.chart.names != "room")
    columns = {2: "panels two", 3: "panels three", 4: "panels"}[plot.columns]
    below = joined() if complete else _legend(plot)
    return joined(element("div", *figures, cls=columns), below)


def _legend(plot: Plot) -> Markup:
    """Marks and whose they are: models by colour, formats of exports by outline."""
    series = {one.name: one for panel in plot.panels for one in panel.chart.series}
    models = {one.name: one for one in series.values() if one.hollow is None}
    formats = {one.label: one for one in series.values() if one.hollow is not None}
    items = []
    for name, one in (*models.items(), *formats.items()):
        look = one.look if one.hollow is None else None
        sample = swatch(look, 0, 7, line=False, marks=True, hollow=one.hollow)
        picture = element("svg", sample, cls="chart", width=22, height=14, aria_hidden="true")
        items.append(element("li", picture, element("bdi", name)))
    return element("ul", *items, cls="key")


def _picture(chart: Chart, size: tuple[int, int]) -> tuple[Markup, bool]:
    """The chart twice: as wide as its place on a desk, and as on a phone, one of them is shown; and
    whether both name all that they show."""
    narrow = (_PHONE[0], min(_PHONE[1], size[1]))
    drawn = [
        draw_named(dataclasses.replace(chart, width=width, height=height))
        for width, height in (size, narrow)
    ]
    places = zip(("desk", "phone"), drawn, strict=True)
    pictures = (element("div", picture, cls=place) for place, (picture, _) in places)
    return joined(*pictures), all(named for _, named in drawn)
