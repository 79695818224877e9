"""`coldstill export`."""

from __future__ import annotations

import json
from dataclasses import asdict
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
    help=f"One of {', '.join(FORMATS)}; may be repeated.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Write below this folder instead of the student's own folder.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the exports' records as a JSON list.")
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
    """Write a trained student for other runtimes.

    RUN is a run's folder or name, or a recipe. Each export is compared with the student on held-out
    text. It is written to RUN/students/STUDENT/exports/FORMAT, with the record export.json. If one
    of several formats fails, the others are still written, and the command fails at its end.

    Example: coldstill export demo small --to hf --to onnx-int8
    """
    from ..steps.export import export as step

    records = []
    try:
        records = step(work_of(recipe, settings, runs, progress), student, formats, output)
    except ColdstillError as error:
        records = getattr(error, "done", [])
        raise
    finally:
        if as_json and records:
            click.echo(json.dumps([asdict(record) for record in records], indent=2))
