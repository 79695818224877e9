"""`coldstill report`: one page about a run, and its result for the terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from ...stages.report import Report
from .options import run_options, work_of

_STAGE = "report"
_PROMPTS = 3


@click.command()
@click.argument("named", metavar="RUN")
@run_options
@click.option(
    "--html",
    "file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write the page here instead of report/index.html in the run.",
)
@click.option(
    "--prompts",
    type=click.IntRange(1, 50),
    default=_PROMPTS,
    show_default=True,
    metavar="N",
    help="Number of held-out prompts that the models continue.",
)
@click.option("--no-continuations", is_flag=True, help="Load no model and show no text.")
@click.option("--json", "as_json", is_flag=True, help="Print the facts of the page as JSON.")
def report(
    named: str,
    settings: Any,
    runs: str,
    progress: Any,
    file: Path | None,
    prompts: int,
    no_continuations: bool,
    as_json: bool,
) -> None:
    """Write one page about a run.

    The page has the result in a sentence, what was distilled from what, figures, plots, the
    teacher's cache in numbers, sample text of every model, and the commands that make the run
    again. RUN is a run's folder or name, or a recipe. Sample text is generated once and kept beside
    the page.

    Example: coldstill report demo
    """
    from ..pages.report.page import write_page
    from ..pages.self_contained import expect_file
    from ..results.facts import gather

    work = work_of(named, settings, runs, progress, loads_models=False)
    path = file or work.run.report
    expect_file(path)
    work.doing(_STAGE, "gather the figures")
    facts = gather(work, 0 if no_continuations else prompts)
    work.doing(_STAGE, "write the page")
    write_page(path, facts)
    for warning in facts.warnings:
        progress(Report(stage=_STAGE, note=warning, warning=True))
    work.say(_STAGE, f"page: {path}; open it in a browser")
    click.echo(json.dumps(facts.to_json(), indent=2) if as_json else facts.result)
