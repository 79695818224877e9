"""A comparison as one page: nothing outside itself, no script; it can be printed and sent.

Names come from recipes and folders. All markup is made by `charts.element`, which escapes them.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from ... import __version__
from ...data.files import whole_file
from ..charts import STYLE, Markup, draw, element, joined, swatch
from ..self_contained import expect_file, filled, policy
from .curves import read_curves
from .names import visible
from .plot import looks
from .plots import make_plots
from .table import CACHED_BYTES, COLUMNS, TOKEN_SECONDS, cells, heldout_groups, lacking, warnings

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ..charts import Chart
    from ..run import Run
    from .curves import Curve
    from .plot import Plot
    from .table import Row

_TEMPLATES = Path(__file__).parent / "templates"
FIGURES = (
    "On held-out text. Bold: the best student of each column, where figures compare and differ. "
    "Size is that of the weights, cached the bytes a position of the stores a student was trained "
    "from. Loss is the mean of -log q(next token) in nats, perplexity its exponential, bits/byte "
    "the same loss for each byte of text. KL (from teacher to model, in nats), agreement (same "
    "most probable token) and acceptance (share of tokens that speculative decoding would accept) "
    "compare with the teacher; ECE is the calibration error. Tokens/s and memory are of a forward "
    "pass, ms/token of writing one text,"
)
"""What stands below the table, up to the machine."""
_LESS, _MORE = -1, 1
_OF_SIZE = {"parameters": _LESS, "bytes": _LESS, CACHED_BYTES: _LESS}
_OF_TEXT = {
    "loss": _LESS, "perplexity": _LESS, "bits_per_byte": _LESS, "kl": _LESS,
    "agreement": _MORE, "acceptance": _MORE, "ece": _LESS,
}  # fmt: skip
_OF_MACHINE = {"tokens_per_second": _MORE, TOKEN_SECONDS: _LESS, "peak_memory_bytes": _LESS}
_WIDE, _HALF, _PHONE = (1040, 380), (544, 330), (352, 300)
_SMALL = {4: (264, 220), 3: (364, 260)}
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
        figures_section(rows, f"{FIGURES} on the machine named above."),
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
        ("machine", "; ".join(sorted({m for row in rows if (m := row.get("machine"))}))),
    ]
    shown = [(name, value) for name, value in facts if value]
    return joined(
        *(part for name, value in shown for part in (element("dt", name), element("dd", value)))
    )


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" + ("" if count == 1 else "s")


def figures_section(rows: Sequence[Row], legend: str) -> Markup:
    """The table of all figures; it scrolls by itself where it is wider than the page."""
    table = element(
        "div",
        figures_table(rows),
        cls="scroll",
        role="region",
        aria_label="Figures of all models",
        tabindex="0",
    )
    caption = element("p", legend, cls="caption")
    return element("section", element("h2", "Figures"), table, caption, cls="whole")


def figures_table(rows: Sequence[Row]) -> Markup:
    """All figures of all models, the best students marked."""
    head = [element("th", title, scope="col") for _, title in COLUMNS]
    marked, look = best(rows), looks(rows)
    body = []
    for number, row in enumerate(rows):
        name, *figures = cells(row)
        sample = swatch(look[row["name"]], 0, 7, line=False, marks=True)
        picture = element("svg", sample, cls="chart", width=22, height=14, aria_hidden="true")
        line = [element("th", picture, element("bdi", name), scope="row")]
        for (key, _), figure in zip(COLUMNS[1:], figures, strict=True):
            is_best = (number, key) in marked
            line.append(element("td", element("strong", figure) if is_best else figure))
        body.append(element("tr", *line))
    return element("table", element("thead", element("tr", *head)), element("tbody", *body))


def best(rows: Sequence[Row]) -> set[tuple[int, str]]:
    """Row number and key of the best figure of every column, among students; all that read alike.

    Nothing is marked where all are alike, nor where figures do not compare: those of different
    held-out stores, and speed and memory of different machines.
    """
    students = [number for number, row in enumerate(rows) if row["role"] == "student"]
    better = dict(_OF_SIZE)
    if len(heldout_groups(rows)) < 2:
        better |= _OF_TEXT
    if len({rows[number].get("machine") for number in students}) == 1:
        better |= _OF_MACHINE
    texts = [dict(zip((key for key, _ in COLUMNS), cells(row), strict=True)) for row in rows]
    found: set[tuple[int, str]] = set()
    for key, direction in better.items():
        known = [n for n in students if texts[n][key] != "-"]
        if len({texts[n][key] for n in known}) > 1:
            first = max(known, key=lambda n: direction * rows[n][key])
            found |= {(n, key) for n in known if texts[n][key] == texts[first][key]}
    return found


def section(plot: Plot) -> Markup:
    """A plot with its title and caption, as wide as it needs."""
    if not plot.panels:
        inside = element("p", "Nothing of this is known.", cls="none")
    elif len(plot.panels) == 1 and not plot.panels[0].name:
        wide = _WIDE if any(one.line for one in plot.panels[0].chart.series) else _HALF
        inside = _picture(plot.panels[0].chart, wide)
    else:
        inside = element("div", *(
            element(
                "figure",
                element("figcaption", element("bdi", panel.name), element("small", panel.detail)),
                _picture(panel.chart, _SMALL[plot.columns]),
            )
            for panel in plot.panels
        ), cls="panels" if plot.columns == 4 else "panels three")  # fmt: skip
    caption = element("p", plot.caption, cls="caption")
    half = len(plot.panels) == 1 and not any(one.line for one in plot.panels[0].chart.series)
    return element(
        "section", element("h2", plot.title), inside, caption, cls="half" if half else "whole"
    )


def _picture(chart: Chart, size: tuple[int, int]) -> Markup:
    """The chart twice: as wide as its place on a desk, and as on a phone; one of them is shown."""
    narrow = (_PHONE[0], min(_PHONE[1], size[1]))
    drawn = [
        draw(dataclasses.replace(chart, width=width, height=height))
        for width, height in (size, narrow)
    ]
    places = zip(("desk", "phone"), drawn, strict=True)
    return joined(*(element("div", picture, cls=place) for place, picture in places))
