"""`coldstill export`: parse, call one function."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from ...data.errors import ColdstillError
from ...stages.export import FORMATS
from .options import run_options, work_of


@click.command()
@click.argument("recipe", metavar="RUN")
@click.argument("student")
@run_options
@click.option(
    "--to",
    "formats",
    multiple=True,
    metavar="FORMAT",
    help=f"Of {', '.join(FORMATS)}; may be repeated.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Write below this folder instead of the student's own.",
)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list of what is known of each.")
def export(
    recipe: str,
    student: str,
    settings: Any,
    runs: str,
    progress: Any,
    formats: tuple[str, ...],
    output: Path | None,
    as_json: bool,
) -> None:
    """Write a trained student for other runtimes, each checked against it on held-out text.

    RUN is a run's folder or name, or a recipe. What is written lies in
    RUN/students/STUDENT/exports/FORMAT, with export.json: what was compared, and what it costs.
    Of several formats those that can be written are; the others fail the command in the end.

    Example: coldstill export demo small --to hf --to onnx-int8
    """
    from ..steps.export import export as step

    try:
        records = step(work_of(recipe, settings, runs, progress), student, formats, output)
    except ColdstillError as error:
        if as_json and (done := getattr(error, "done", None)):
            click.echo(json.dumps(done, indent=2))
        raise
    if as_json:
        click.echo(json.dumps(records, indent=2))
