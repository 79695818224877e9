"""`coldstill compare`: what is said beside the table, and where the page goes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...stages.report import Report, Reporter
from ..compare import compare, lacking, warnings
from ..self_contained import expect_file
from .page import write_page

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ..compare import Row
    from ..run import Run

_STAGE = "compare"


def compare_runs(runs: Sequence[Run], file: Path | None, report: Reporter) -> list[Row]:
    """The rows of these runs; the page is written to `file`, if given, and of one run beside it.

    Raises
        ColdstillError: as `compare`, or `file` is a folder
    """
    if file is not None:
        expect_file(file)
    rows = compare(runs)
    for warning in warnings(rows):
        report(Report(stage=_STAGE, note=warning, warning=True))
    if old := lacking(rows):
        names = ", ".join(old)
        note = f"no calibration in older figures of {names}; coldstill evaluate measures them anew"
        report(Report(stage=_STAGE, note=note))
    if file is not None:
        write_page(file, runs, rows)
    page = file or (runs[0].comparison.with_suffix(".html") if len(runs) == 1 else None)
    if page is not None:
        report(Report(stage=_STAGE, note=f"plots: {page}; open it in a browser"))
    return rows
