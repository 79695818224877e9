"""The report as one page: nothing outside itself, no script; it can be printed and sent."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...results.caveats import without_calibration
from ..compare.plot import drawn
from ..compare.tables import table_views
from ..compare.training_plots import learning_curves
from ..self_contained import rendered, write_file
from .pictures import covered_mass, entropies, trade_offs
from .sections import cards, environment_lines, plain, record_lines, student_list
from .texts import texts_view

if TYPE_CHECKING:
    from pathlib import Path

    from ...results.facts import ReportFacts


def write_page(path: Path, facts: ReportFacts) -> None:
    """Write the page of a report whole.

    Raises
        ColdstillError: the path is a folder
    """
    write_file(path, page(facts))


def page(facts: ReportFacts) -> str:
    """The page as HTML."""
    rows, record, again = facts.models, facts.record, facts.reproduce
    notes = list(facts.warnings)
    if old := without_calibration(rows):
        notes.append(
            f"Figures of {', '.join(old)} are of an older version; coldstill evaluate measures "
            "what they lack."
        )
    curves = {row.name: facts.curves[row.name] for row in rows if row.name in facts.curves}
    record_plots, numbers, no_record = [], [], ""
    if record is None or not record.positions:
        no_record = facts.no_record or "it holds no position yet"
    else:
        numbers = record_lines(record, facts.heldout)
        record_plots = [entropies(record), *([covered_mass(record)] if record.capture.head else [])]
    lost = again.recipe is not None and again.settings is None
    return rendered(
        "report.html",
        command="report",
        title=facts.name,
        result=facts.result,
        notes=notes,
        cards=cards(facts),
        students=student_list(facts),
        views=table_views(rows),
        plots=[drawn(plot) for plot in (*trade_offs(rows), learning_curves(rows, curves))],
        no_record=no_record,
        numbers=numbers,
        record_plots=[drawn(plot) for plot in record_plots],
        texts=texts_view(facts),
        commands=plain("\n".join(again.commands)),
        again_note="Changed settings cannot be given on the command line; recipe.resolved.json in "
        "the run has every setting." if lost else "",
        again=environment_lines(facts),
        recipe=None if again.recipe is None else plain(again.recipe),
    )  # fmt: skip
