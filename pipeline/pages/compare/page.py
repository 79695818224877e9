"""A comparison as one page: nothing outside itself, no script; it can be printed and sent."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from ...results.caveats import warnings, without_calibration
from ...results.curves import read_curves
from ...results.figures import students_of, teachers_of
from ...results.names import visible
from ...units import counted
from ..plots.drawing import standalone
from ..self_contained import rendered, write_file
from .plots import loss_against_bytes, make_plots
from .tables import table_values

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from ...recipe.run_folder import Run
    from ...results.curves import Curve
    from ...results.figures import ModelFigures


def write_page(path: Path, runs: Sequence[Run], rows: Sequence[ModelFigures]) -> None:
    """Write the page of a comparison whole.

    Raises
        ColdstillError: the path is a folder
    """
    names = [visible(str(run.root)) for run in runs]
    write_file(path, page(rows, read_curves(runs), names))


def write_plot(path: Path, rows: Sequence[ModelFigures], width: int = 760) -> None:
    """Write the plot of loss against cached bytes as an SVG file for a document.

    The file follows the light or dark theme of the reader, also as an image on a web page.

    Raises
        ColdstillError: the path is a folder
    """
    (panel,) = loss_against_bytes(rows).panels
    write_file(path, standalone(dataclasses.replace(panel.chart, width=width, height=360)))


def page(rows: Sequence[ModelFigures], curves: Mapping[str, Curve], runs: Sequence[str]) -> str:
    """The page as HTML.

    runs  folders of the runs, for the head of the page
    """
    names = [name.rstrip("/").rpartition("/")[2] for name in runs]
    notes = warnings(rows)
    if old := without_calibration(rows):
        notes.append(f"no calibration in older figures of {', '.join(old)}; run coldstill evaluate")
    return rendered(
        "compare.html",
        command="compare",
        title=names[0] if len(names) == 1 else f"{len(names)} runs",
        notes=notes,
        facts=_facts(rows, runs),
        plots=make_plots(rows, curves),
        **table_values(rows),
    )


def _facts(rows: Sequence[ModelFigures], runs: Sequence[str]) -> list[tuple[str, str]]:
    """Names and values for the head of the page."""
    # an export is measured on a sample
    positions = sorted({row.positions for row in rows if row.positions and not row.is_export})
    students, teachers = len(students_of(rows)), len(teachers_of(rows))
    measured = " or ".join(f"{count:,}" for count in positions)
    return [
        ("runs" if len(runs) > 1 else "run", ", ".join(runs)),
        ("models", f"{counted(students, 'student')}, {counted(teachers, 'teacher')}"),
        ("measured on", f"{measured} held-out positions" if measured else ""),
    ]
