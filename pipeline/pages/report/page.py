"""The report as one page: nothing outside itself, no script; it can be printed and sent."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...recipe.tables import TEACHER
from ...results.caveats import without_calibration
from ..compare.tables import table_values
from ..compare.training_plots import learning_curves
from ..self_contained import rendered, write_file
from .pictures import covered_mass, entropies, trade_offs
from .sections import cards, environment_lines, plain, record_lines, student_lines
from .texts import no_texts, texts_caption

if TYPE_CHECKING:
    from pathlib import Path

    from ...results.facts import ReportFacts

_LOST = (
    "Changed settings cannot be given on the command line; recipe.resolved.json in the run has "
    "every setting."
)


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
    return rendered(
        "report.html",
        command="report",
        title=facts.name,
        result=facts.result,
        notes=notes,
        cards=cards(facts),
        students=student_lines(facts),
        count=len(facts.students),
        plots=[*trade_offs(rows), learning_curves(rows, curves)],
        no_record=no_record,
        numbers=numbers,
        record_plots=record_plots,
        texts=facts.continuations,
        texts_caption=texts_caption(facts.continuations) if facts.continuations else "",
        no_texts=no_texts(facts),
        teacher=TEACHER,
        baseline=facts.baseline,
        commands=plain("\n".join(again.commands)),
        again_note=_LOST if again.recipe is not None and again.settings is None else "",
        again=environment_lines(facts),
        recipe=None if again.recipe is None else plain(again.recipe),
        **table_values(rows),
    )
