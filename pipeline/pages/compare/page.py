"""A comparison as one page: a single file without scripts, which can be printed and sent."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...recipe.run_folder import open_run
from ...results.curves import read_curves
from ...results.figures import students_of, teachers_of
from ...results.model_tables import (
    COST,
    groups_of,
    heldout_groups,
    machine_groups,
    missing,
    notes,
    quality_columns,
    warnings,
    without_calibration,
)
from ...results.rows import compared_rows, visible
from ...units import counted
from ..plots.drawing import standalone
from ..self_contained import rendered, write_file
from .panels import looks, outlines
from .plots import loss_against_bytes, make_plots

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ...recipe.run_folder import Run
    from ...results.curves import Curve
    from ...results.figures import ModelFigures
    from ...results.model_tables import Column


_QUALITY = (
    "Measured on held-out text. Bold: the best student of each column, where figures compare and "
    "differ. Stored: bytes for each position of the stores a student was trained from. Loss is the "
    "mean of -log q(next token) in nats, perplexity its exponential, bits/byte the same loss for "
    "each byte of text. KL (from teacher to model, in nats), agreement (same most probable token) "
    "and acceptance (share of tokens that speculative decoding accepts) compare with the teacher; "
    "ECE is the calibration error. Own text: KL and acceptance on a student's own answers to "
    "held-out prompts, which the teacher scored."
)
_COST = (
    "Size is that of the weights on disk; FLOPs are those of one token. One text at once (batch "
    "1): prompt tokens read in a second, time to the first token, median and 95th percentile of "
    "the time of a further token, and peak memory, weights included. Eight texts at once (batch "
    "8): time of a step, and tokens of all texts in a second; exports are timed with one text."
)


@dataclass(frozen=True, slots=True)
class TableView:
    """A table on a page."""

    title: str
    label: str
    caption: str
    columns: tuple[Column, ...]


def table_values(rows: Sequence[ModelFigures]) -> dict[str, Any]:
    """Both tables of a page, as values for its template."""
    machines = "; ".join(machine_groups(rows))
    where = f" Measured on {machines}." if machines else ""
    cost = " ".join([_COST + where, *notes(rows), *missing(rows)])
    views = [
        TableView("Figures", "Quality of all models", _QUALITY, quality_columns(rows)),
        TableView("What it costs to run", "Cost of all models", cost, COST),
    ]
    functions = {"best": best, "groups": groups_of, "looks": looks, "outlines": outlines}
    return {"rows": rows, "views": views, **functions}


def best(columns: tuple[Column, ...], rows: Sequence[ModelFigures]) -> set[tuple[str, str]]:
    """Model and key of the best figure of every column among students.

    Several figures are marked if they are equal as shown. Nothing is marked if all figures of a
    column are equal as shown, or do not compare: quality on different held-out stores, speed and
    memory on different machines. Exports are never marked, because their gain is that of their
    format.
    """
    students = students_of(rows)
    comparable = {
        "model": True,
        "text": len(heldout_groups(rows)) < 2,
        "machine": len(machine_groups(students)) < 2,
    }
    found: set[tuple[str, str]] = set()
    for column in columns:
        known = [row for row in students if column.value(row) is not None]
        if not column.better or not comparable[column.depends_on]:
            continue
        if len({column.cell(row) for row in known}) > 1:
            pick = min if column.better == "less" else max
            first = column.cell(pick(known, key=column.value))
            found |= {(row.name, column.key) for row in known if column.cell(row) == first}
    return found


def write_page(path: Path, runs: Sequence[Run], rows: Sequence[ModelFigures]) -> None:
    """Write the page of a comparison whole."""
    names = [visible(str(run.root)) for run in runs]
    write_file(path, page(rows, read_curves(runs), names))


def write_plot(path: Path, rows: Sequence[ModelFigures], width: int = 760) -> None:
    """Write the plot of loss against stored bytes as an SVG file for a document.

    The file follows the light or dark theme of the reader, also as an image on a web page. From the
    command line: `python -m coldstill.pipeline.pages.compare.page FILE RUN`.
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


def main(file: str, run: str) -> None:
    """Write the plot of a finished run."""
    folder = Path(run)
    write_plot(Path(file), compared_rows([open_run(folder.parent, folder.name)]))


if __name__ == "__main__":
    main(*sys.argv[1:])
