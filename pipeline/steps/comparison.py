"""The step that compares all models of one run or of several, and writes the page."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...data.files import whole_file, write_json
from ...stages.report import Report, Reporter
from ..pages.compare.page import write_page
from ..pages.self_contained import expect_file
from ..results.caveats import warnings, without_calibration
from ..results.figures import json_rows
from ..results.rows import compared_rows
from ..results.table import markdown

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ..recipe.run_folder import Run
    from ..results.figures import ModelFigures

_STAGE = "compare"


def compare_runs(runs: Sequence[Run], file: Path | None, report: Reporter) -> list[ModelFigures]:
    """The rows of these runs. The page is written to `file` if given, and beside a single run.

    Raises
        ColdstillError: as `compare`, or `file` is a folder
    """
    if file is not None:
        expect_file(file)
    report(Report(stage=_STAGE, doing="gather the figures"))
    rows = compare(runs)
    for warning in warnings(rows):
        report(Report(stage=_STAGE, note=warning, warning=True))
    if old := without_calibration(rows):
        names = ", ".join(old)
        note = f"no calibration in older figures of {names}; coldstill evaluate measures them again"
        report(Report(stage=_STAGE, note=note))
    if file is not None:
        write_page(file, runs, rows)
    page = file or (runs[0].comparison.with_suffix(".html") if len(runs) == 1 else None)
    if page is not None:
        report(Report(stage=_STAGE, note=f"plots: {page}; open it in a browser"))
    return rows


def compare(runs: Sequence[Run]) -> list[ModelFigures]:
    """A row for each teacher, then one for every evaluated student and each of its exports, the
    lowest loss first.

    The comparison of one run is also written beside it, as JSON, Markdown and a page. For several
    runs, models are called RUN/NAME, and a teacher whose figures two runs share has one row.

    Raises
        ColdstillError: as `compared_rows`
    """
    rows = compared_rows(runs)
    if len(runs) == 1:
        _write_beside(runs[0], rows)
    return rows


def _write_beside(run: Run, rows: Sequence[ModelFigures]) -> None:
    write_json(run.comparison, json_rows(rows))
    with whole_file(run.comparison.with_suffix(".md")) as scratch:
        scratch.write_text(markdown(rows), encoding="utf-8")
    write_page(run.comparison.with_suffix(".html"), [run], rows)
