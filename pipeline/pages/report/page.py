"""The report as one page: nothing outside itself, no script; it can be printed and sent.

Names come from recipes and folders, text from corpora and models. All markup is made by
`charts.element`, which escapes them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ....data.files import whole_file
from ...results.caveats import lacking
from ...results.curves import Curve
from ..charts import Markup, element, joined
from ..compare.figures import figures_section
from ..compare.page import section, whole_page
from ..compare.training_plots import learning_curves
from ..self_contained import expect_file
from .pictures import trade_offs
from .sections import again_section, lineage, record_sections
from .texts import texts_section

if TYPE_CHECKING:
    from collections.abc import Mapping

_TEMPLATES = Path(__file__).parent / "templates"


def write_page(path: Path, facts: Mapping[str, Any]) -> None:
    """Write the page whole.

    Raises
        ColdstillError: the path is a folder
    """
    expect_file(path)
    content = page(facts)
    with whole_file(path) as scratch:
        scratch.write_bytes(content.encode())


def page(facts: Mapping[str, Any]) -> str:
    """The page as HTML.

    facts  `facts.gather`
    """
    introduction = joined(
        element("p", named(facts["result"]), cls="result"),
        *(element("p", note, cls="note") for note in _notes(facts)),
    )
    sections = [
        element(
            "section",
            element("h2", "What was distilled from what"),
            element("div", lineage(facts), cls="flow"),
            cls="whole",
        ),
        figures_section(facts["models"]),
        *_plots(facts),
        *record_sections(facts),
        texts_section(facts),
        again_section(facts),
    ]
    style = (_TEMPLATES / "report.css").read_text(encoding="utf-8")
    return whole_page("report", facts["name"], introduction, sections, style)


def named(sentence: str) -> Markup:
    """A sentence in which names stand in backquotes, these set apart."""
    pieces = re.split(r"`([^`]*)`", sentence)
    return joined(*(element("b", p) if i % 2 else p for i, p in enumerate(pieces)))


def _notes(facts: Mapping[str, Any]) -> list[str]:
    notes = list(facts["warnings"])
    if old := lacking(facts["models"]):
        notes.append(
            f"Figures of {', '.join(old)} are of an older version; coldstill evaluate measures "
            "what they lack."
        )
    return notes


def _plots(facts: Mapping[str, Any]) -> list[Markup]:
    rows = facts["models"]
    models = {row["name"] for row in rows}  # of a student that is not evaluated there is no row
    curves = {name: Curve(**curve) for name, curve in facts["curves"].items() if name in models}
    return [section(plot) for plot in (*trade_offs(rows), learning_curves(rows, curves))]
