"""The `coldstill store` commands: each parses its options, calls one function and prints."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from ..units import counted
from .group import CommandList
from .options import Number, json_option

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ...data.maintenance.shard import Problem
    from .progress import Progress

_SHOWN = 20


@click.group(cls=CommandList)
def store() -> None:
    """Verify, convert, merge, slice, shrink, retokenize or repair a store of teacher logits.

    PATH and TO are folders or addresses such as s3://bucket/store.
    """


def _format_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options for the codec and the format of the new store."""
    for option in (
        click.option("--zstd", type=click.IntRange(0, 22), help="Compression level, 0 to 22."),
        click.option("--levels", type=int, help="Levels of the compact codec, 15 to 254."),
        click.option("--store", "kind", metavar="NAME", help="Store format: arrow or zarr."),
        click.option("--codec", metavar="NAME", help="Codec: compact or plain."),
    ):
        command = option(command)
    return command


@store.command()
@click.argument("path")
@json_option()
def verify(path: str, as_json: bool) -> None:
    """Check every byte, record and rule of a store; exit 1 if anything is wrong.

    Example: coldstill store verify runs/demo/logits
    """
    from ...data.maintenance.verify import leftovers
    from ...data.maintenance.verify import verify as problems_of

    with _progress() as progress:
        problems = list(problems_of(path, _notify(progress, "verify")))
    for left in leftovers(path):
        click.echo(f"{left}: left by an interrupted write; the next writer deletes it", err=True)
    if as_json:
        found = [asdict(problem) for problem in problems]
        click.echo(json.dumps({"path": path, "whole": not problems, "problems": found}, indent=2))
    else:
        _print_problems(problems)
        click.echo(f"{path}: " + (_summary(problems) if problems else "whole"))
    sys.exit(1 if problems else 0)


@store.command()
@click.argument("path")
@click.option("--dry-run", is_flag=True, help="Only print what would be deleted.")
@json_option()
def repair(path: str, dry_run: bool, as_json: bool) -> None:
    """Delete damaged shards, so that teacher-logits makes them again.

    Example: coldstill store repair runs/demo/logits
    """
    from ...data.maintenance.verify import repair as step

    with _progress() as progress:
        done = step(path, pretend=dry_run, notify=_notify(progress, "repair"))
    if as_json:
        problems = [asdict(problem) for problem in done.problems]
        facts = {"dropped": done.dropped, "strays": done.strays, "missing": done.missing}
        click.echo(json.dumps({"path": path, "problems": problems, **facts}, indent=2))
        return
    _print_problems(done.problems)
    verb = "would delete" if dry_run else "deleted"
    if done.dropped or done.strays:
        what = [counted(len(done.dropped), "shard")] if done.dropped else []
        what += [counted(len(done.strays), "stray file")] if done.strays else []
        click.echo(f"{path}: {verb} {' and '.join(what)}")
    if done.missing:
        shards = counted(done.missing, "shard")
        click.echo(f"{path}: {shards} missing; run coldstill teacher-logits again")
    elif not done.strays:
        click.echo(f"{path}: whole, nothing to repair")


@store.command()
@click.argument("path")
@click.argument("to")
@_format_options
@click.option(
    "--to",
    "foreign",
    type=click.Choice(["distillkit", "axolotl"]),
    help="Write a folder in the format of another project instead; it keeps the head alone.",
)
@click.option("--lossy", is_flag=True, help="With --to: drop the samples of the store.")
@json_option()
def convert(
    path: str, to: str, foreign: str | None, lossy: bool, as_json: bool, **wanted: Any
) -> None:
    """Write a store with another codec or store format, or in another project's format.

    Example: coldstill store convert runs/demo/logits plain-logits --codec plain
    """
    if foreign is None and lossy:
        raise click.UsageError("--lossy needs --to.")
    if foreign is not None:
        if any(value is not None for value in wanted.values()):
            raise click.UsageError("--to excludes the options of codecs and store formats.")
        from ...data.maintenance.foreign import export

        with _progress() as progress:
            rows = export(path, to, foreign, lossy=lossy, notify=_notify(progress, "convert"))
        facts = {"wrote": to, "format": foreign, "rows": rows}
        click.echo(json.dumps(facts, indent=2) if as_json else f"wrote {to}: {rows:,} documents")
        return
    from ...data.maintenance.rewrite import convert as step

    with _progress() as progress:
        step(path, to, *_formats(wanted), notify=_notify(progress, "convert"))
    _wrote(to, as_json)


@store.command()
@click.argument("paths", nargs=-1, required=True, metavar="PATH... TO")
@_format_options
@json_option()
def merge(paths: tuple[str, ...], as_json: bool, **wanted: Any) -> None:
    """Write several stores of one teacher as one, in the given order.

    Example: coldstill store merge runs/a/logits runs/b/logits both
    """
    from ...data.maintenance.merge import merge as step

    *sources, to = paths
    if not sources:
        raise click.UsageError("name at least one store to read and the one to write")
    with _progress() as progress:
        step(sources, to, *_formats(wanted), notify=_notify(progress, "merge"))
    _wrote(to, as_json)


@store.command("slice")
@click.argument("path")
@click.argument("to")
@click.option("--sequences", metavar="A:B", help="Sequences by index in the store, B not included.")
@click.option("--documents", metavar="A:B", help="Sequences that hold one of these documents.")
@click.option("--fraction", type=float, metavar="F", help="Random share of the sequences, 0 to 1.")
@click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of the random share."
)
@json_option()
def slice_(path: str, to: str, as_json: bool, **wanted: Any) -> None:
    """Write a part of a store: the sequences that meet all given options.

    Example: coldstill store slice runs/demo/logits tenth --fraction 0.1
    """
    from ...data.maintenance.shrink import matching_rows, take
    from ...data.store.reader import open_store

    with _progress() as progress:
        notify = _notify(progress, "slice")
        rows = matching_rows(open_store(path), **wanted, notify=notify)
        take(path, to, rows, notify=notify)
    _wrote(to, as_json)


@store.command()
@click.argument("path")
@click.argument("to")
@click.option("--head", type=click.IntRange(0), required=True, help="Most probable tokens to keep.")
@click.option("--tail", type=click.IntRange(0), required=True, help="Samples of the other tokens.")
@json_option()
def shrink(path: str, to: str, head: int, tail: int, as_json: bool) -> None:
    """Write a store with a smaller head or tail, without the teacher.

    Example: coldstill store shrink runs/demo/logits small --head 8 --tail 8
    """
    from ...data.maintenance.shrink import shrink as step

    with _progress() as progress:
        step(path, to, head, tail, notify=_notify(progress, "shrink"))
    _wrote(to, as_json)


@store.command("retokenize")
@click.argument("path")
@click.argument("to")
@click.option(
    "--tokenizer", metavar="NAME", required=True, help="Folder or hub name of the student's model."
)
@click.option(
    "--ambiguous",
    type=click.Choice(["split", "map", "bucket"]),
    default="split",
    show_default=True,
    help="Teacher tokens that may begin a longer token of the student: split their probability as "
    "the texts go on, map them alone, or leave it in the bucket.",
)
@click.option(
    "--unaligned",
    type=click.Choice(["refuse", "skip"]),
    default="refuse",
    show_default=True,
    help="Texts that the tokenizer does not reproduce: refuse them, or learn nothing of them.",
)
@click.option(
    "--special",
    multiple=True,
    metavar="TOKEN=TEXT",
    help="What the student reads for a special token of the teacher. May be repeated.",
)
@click.option(
    "--branches",
    type=Number(0.0, 4.0),
    default=0.25,
    show_default=True,
    help="Words beside the text, for each token of a sequence, for the loss branches.",
)
@json_option()
def retokenize_(path: str, to: str, as_json: bool, tokenizer: str, **wanted: Any) -> None:
    """Write a store in the tokens of a student's tokenizer, without the teacher.

    Example: coldstill store retokenize runs/demo/logits other --tokenizer my-student
    """
    from ..quiet import quiet
    from ..steps.retokenize import retokenized

    with _progress() as progress, quiet():
        notify = _notify(progress, "retokenize")
        retokenized(path, to, tokenizer, wanted, "--tokenizer", notify, progress)
    _wrote(to, as_json)


def _progress() -> Progress:
    from .progress import Progress

    return Progress(f"store {click.get_current_context().info_name}")


def _notify(progress: Progress, stage: str) -> Callable[[str, int, int], None]:
    """A callback that draws the progress of a step of `data.maintenance`."""
    from ...stages.report import Report

    progress(Report(stage=f"store {stage}", unit="sequences"))

    def notify(what: str, done: int, total: int) -> None:
        name = f"store {stage}" if what in (stage, "write") else f"store {stage}: {what}"
        progress(Report(stage=name, done=done, total=total, unit="sequences"))

    return notify


def _formats(wanted: dict[str, Any]) -> tuple[Any, Any]:
    """The codec and the format in the options, for `data.store.manifest.format_settings`."""
    codec, levels = wanted["codec"], wanted["levels"]
    if levels is not None:
        codec = {"name": codec or "compact", "levels": levels}
    kind, zstd = wanted["kind"], wanted["zstd"]
    if zstd is not None:
        kind = {"name": kind, "zstd": zstd} if kind else {"zstd": zstd}
    return codec, kind


def _print_problems(problems: Sequence[Problem]) -> None:
    for problem in problems[:_SHOWN]:
        click.echo(str(problem))
    if len(problems) > _SHOWN:
        click.echo(f"and {len(problems) - _SHOWN} more")


def _summary(problems: Sequence[Problem]) -> str:
    count = counted(len(problems), "problem")
    damaged = [problem for problem in problems if not problem.missing]
    if not damaged:
        return f"{count}, all of missing shards; finish the store with coldstill teacher-logits"
    first = next((problem for problem in damaged if problem.shard is not None), damaged[0])
    where = f"at {first.where}" if first.where else "outside the shards"
    text = f"{count}, the first damage {where}"
    return text + ("; delete the damage with coldstill store repair" if first.where else "")


def _wrote(to: str, as_json: bool) -> None:
    from ...data.store.reader import open_store

    made = open_store(to)
    size = made.totals.bytes
    facts = {"wrote": to, "sequences": len(made), "positions": made.positions, "bytes": size}
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    per = size / max(1, made.positions)
    click.echo(
        f"wrote {to}: {len(made):,} sequences, {made.positions:,} positions, {per:.1f} bytes each"
    )
