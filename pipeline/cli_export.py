"""`coldstill export`: parse, call one function."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..stages.export import FORMATS
from .cli_recipe import run_options, work_of


@click.command()
@click.argument("recipe", metavar="RUN")
@click.argument("student")
@run_options
@click.option(
    "--to",
    "formats",
    multiple=True,
    required=True,
    type=click.Choice(list(FORMATS)),
    help="A format; may be repeated.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Write below this folder instead of the student's own.",
)
def export(
    recipe: str,
    student: str,
    settings: Any,
    runs: str,
    progress: Any,
    formats: tuple[str, ...],
    output: Path | None,
) -> None:
    """Write a trained student for other runtimes, each checked against it on held-out text.

    RUN is a run's folder or name, or a recipe. What is written lies in
    RUN/students/STUDENT/exports/FORMAT, with export.json: what was compared, and what it costs.

    Example: coldstill export demo small --to hf --to onnx-int8
    """
    from .export import export as step

    step(work_of(recipe, settings, runs, progress), student, formats, output)
