"""The commands `report`, `export` and `inspect`: results as pages, text, JSON and other formats."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ...data.errors import ColdstillError
from ...stages.export import FORMATS
from ...stages.report import Report
from ..units import counted, size
from .options import json_option, run_options, work_of

if TYPE_CHECKING:
    from ..pages.inspect.path import Subject


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
@json_option("the facts of the page as JSON")
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

    The page has the result in a sentence, the teacher, the corpus and the students, figures, plots,
    the store in numbers, sample text of every model, and the commands that reproduce the run. RUN
    is a run's folder or name, or a recipe. Sample text is generated once and kept beside the page.

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
    work.note(_STAGE, f"page: {path}; open it in a browser")
    click.echo(json.dumps(facts.to_json(), indent=2) if as_json else facts.result)


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
@json_option("the exports' records as a JSON list")
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


_TOP_TEXT = 5
_TOP_PAGE = 8
_COUNT = 12


class PositionRange(click.ParamType[range]):
    """`A:B`, from A to B without B; either can be omitted."""

    name = "A:B"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> range:
        if isinstance(value, range):
            return value
        first, colon, end = str(value).partition(":")
        numbers = [first or "0", end or str(sys.maxsize)]
        if not colon or not all(n.isascii() and n.isdecimal() for n in numbers):
            self.fail(f"{value!r} is not a range such as 10:20", param, ctx)
        positions = range(int(numbers[0]), int(numbers[1]))
        if not positions:
            self.fail(f"{value!r} contains no position", param, ctx)
        return positions


@click.command()
@click.argument("path")
@click.option(
    "--sequence",
    "sequences",
    type=int,
    multiple=True,
    metavar="N",
    help="Show sequence N as text, position by position; may be repeated.",
)
@click.option("--positions", type=PositionRange(), help="Only positions A to B, without B.")
@click.option(
    "--top",
    type=click.IntRange(min=1),
    metavar="K",
    help=f"Most probable tokens per position.  [default: {_TOP_TEXT}, on a page {_TOP_PAGE}]",
)
@click.option(
    "--html",
    "page",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write a page for a browser; about 300 bytes per token.",
)
@click.option(
    "--count",
    type=click.IntRange(min=1),
    metavar="N",
    help=f"Number of sequences on the page, a seeded sample.  [default: {_COUNT}]",
)
@json_option()
def inspect(
    path: str,
    sequences: tuple[int, ...],
    positions: range | None,
    top: int | None,
    page: Path | None,
    count: int | None,
    as_json: bool,
) -> None:
    """Show what a store contains.

    It prints the teacher, corpus, capture and shards; with --sequence the stored predictions; with
    --html a page with both. PATH is a store (a folder or an address), a run's folder, or one shard
    of a store.

    Example: coldstill inspect runs/demo/logits
    """
    if not (sequences or page) and (positions is not None or top is not None):
        raise click.UsageError("--positions and --top go with --sequence or --html")
    if count is not None and (page is None or sequences):
        raise click.UsageError("--count goes with --html, without --sequence")
    from ..pages.inspect.path import LoneShard, find
    from ..pages.inspect.store import describe, describe_lone
    from ..pages.inspect.text import glyphs_for, lone_text, store_text

    subject = find(path)
    if isinstance(subject, LoneShard):
        if sequences or page:
            raise ColdstillError(f"{path}: {subject.why}; without it no target can be read")
        lone = describe_lone(subject)
        click.echo(_json(lone.to_json()) if as_json else lone_text(lone))
    elif page is not None:
        from ..pages.inspect.page import write_page

        rows = sequences or _sample(subject, count or _COUNT)
        wrote = write_page(subject, page, rows, positions, top or _TOP_PAGE)
        click.echo(
            _json(wrote)
            if as_json
            else f"wrote {page}: {counted(len(rows), 'sequence')}, {wrote['tokens']:,} tokens, "
            f"{size(wrote['bytes'])}; open it in a browser"
        )
    elif sequences:
        _print_sequences(subject, sequences, positions, top or _TOP_TEXT, as_json)
    else:
        facts = describe(subject)
        glyphs = glyphs_for(sys.stdout.encoding)
        click.echo(_json(facts.to_json()) if as_json else store_text(facts, glyphs))


def _print_sequences(
    subject: Subject, rows: tuple[int, ...], positions: range | None, top: int, as_json: bool
) -> None:
    from ..pages.inspect.sequence import read_sequence, to_json
    from ..pages.inspect.text import glyphs_for, listing
    from ..results.token_texts import token_texts

    sequences = [read_sequence(subject, row, positions) for row in rows]
    texts = token_texts(subject.store)
    if as_json:
        found = [to_json(sequence, texts, top) for sequence in sequences]
        click.echo(_json({"path": subject.path, "sequences": found}))
        return
    glyphs = glyphs_for(sys.stdout.encoding)
    text = "\n\n".join(listing(one, texts, glyphs, top, subject.path) for one in sequences)
    if sys.stdout.isatty() and text.count("\n") >= shutil.get_terminal_size().lines:
        click.echo_via_pager(text + "\n")
    else:
        click.echo(text)


def _sample(subject: Subject, count: int) -> tuple[int, ...]:
    """Return a seeded sample of the finished sequences, in order."""
    import numpy as np

    manifest = subject.store.manifest
    rows = [row for shard in subject.shards for row in manifest.shard_rows(shard)]
    if not rows:
        raise ColdstillError(
            f"{subject.path}: has no sequence yet, so there is nothing to show on a page"
        )
    chosen = np.random.default_rng(0).choice(rows, min(count, len(rows)), replace=False)
    return tuple(sorted(chosen.tolist()))


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, allow_nan=False)
