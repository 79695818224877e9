"""`coldstill inspect`: choose one of its views and print or write it."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ...data.errors import ColdstillError
from .options import json_option

if TYPE_CHECKING:
    from ..pages.inspect.glyphs import Glyphs
    from ..pages.inspect.path import LoneShard, Subject

_TOP_TEXT = 5
_TOP_PAGE = 8
_COUNT = 12


class PositionRange(click.ParamType[range]):
    """`A:B`, from A to B without B; either can be omitted."""

    name = "A:B"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> range:
        """Parse two integers, of which the first is smaller."""
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
    help="Show sequence N as text, position by position; can be repeated.",
)
@click.option("--positions", type=PositionRange(), help="Only positions A to B, without B.")
@click.option(
    "--top",
    type=click.IntRange(min=1),
    metavar="K",
    help=f"Best tokens shown at each position.  [default: {_TOP_TEXT}, on a page {_TOP_PAGE}]",
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
    _check_options(sequences, positions, top, page, count)
    from ..pages.inspect.path import LoneShard, find

    subject = find(path)
    if isinstance(subject, LoneShard):
        if sequences or page:
            raise ColdstillError(f"{path}: {subject.why}; without it no target can be read")
        _print_lone_shard(subject, as_json)
    elif page is not None:
        chosen = sequences or _sample(subject, count or _COUNT)
        _write(subject, page, chosen, positions, top or _TOP_PAGE, as_json)
    elif sequences:
        _print_sequences(subject, sequences, positions, top or _TOP_TEXT, as_json)
    else:
        _print_store(subject, as_json)


def _check_options(
    sequences: tuple[int, ...],
    positions: range | None,
    top: int | None,
    page: Path | None,
    count: int | None,
) -> None:
    if not (sequences or page) and (positions is not None or top is not None):
        raise click.UsageError("--positions and --top go with --sequence or --html")
    if count is not None and (page is None or sequences):
        raise click.UsageError("--count goes with --html, without --sequence")


def _print_store(subject: Subject, as_json: bool) -> None:
    from ..pages.inspect.store import describe
    from ..pages.inspect.text import store_text

    facts = describe(subject)
    click.echo(_json(facts.to_json()) if as_json else store_text(facts, _glyphs()))


def _print_lone_shard(shard: LoneShard, as_json: bool) -> None:
    from ..pages.inspect.shard import describe_lone
    from ..pages.inspect.text import lone_text

    facts = describe_lone(shard)
    click.echo(_json(facts.to_json()) if as_json else lone_text(facts))


def _print_sequences(
    subject: Subject, rows: tuple[int, ...], positions: range | None, top: int, as_json: bool
) -> None:
    from ..pages.inspect.listing import listing
    from ..pages.inspect.sequence import read_sequence, to_json
    from ..results.token_texts import token_texts

    sequences = [read_sequence(subject, row, positions) for row in rows]
    texts = token_texts(subject.store)
    if as_json:
        found = [to_json(sequence, texts, top) for sequence in sequences]
        click.echo(_json({"path": subject.path, "sequences": found}))
        return
    glyphs = _glyphs()
    _show("\n\n".join(listing(one, texts, glyphs, top, subject.path) for one in sequences))


def _show(text: str) -> None:
    """Print a text; through a pager if a terminal is too small for it."""
    if sys.stdout.isatty() and text.count("\n") >= shutil.get_terminal_size().lines:
        click.echo_via_pager(text + "\n")
    else:
        click.echo(text)


def _write(
    subject: Subject,
    page: Path,
    rows: tuple[int, ...],
    positions: range | None,
    top: int,
    as_json: bool,
) -> None:
    from ..pages.inspect.page import write_page
    from ..units import counted, size

    wrote = write_page(subject, page, rows, positions, top)
    click.echo(
        _json(wrote)
        if as_json
        else f"wrote {page}: {counted(len(rows), 'sequence')}, {wrote['tokens']:,} tokens, "
        f"{size(wrote['bytes'])}; open it in a browser"
    )


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


def _glyphs() -> Glyphs:
    from ..pages.inspect.glyphs import glyphs_for

    return glyphs_for(sys.stdout.encoding)
