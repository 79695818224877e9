"""The `coldstill import` command: caches of other projects as stores."""

from __future__ import annotations

import json
from typing import Any

import click

from ..units import counted
from .options import Number, json_option


@click.command("import")
@click.argument("source", nargs=-1, required=True)
@click.argument("to", metavar="STORE")
@click.option("--format", "kind", metavar="NAME", help="Format; told by the columns if left out.")
@click.option(
    "--tokenizer",
    required=True,
    metavar="NAME",
    help="The teacher's tokenizer: a folder, a GGUF file, or a model's name.",
)
@click.option("--config", metavar="FILE", help="The codec's parameters, as YAML or JSON.")
@click.option(
    "--teacher",
    default="",
    metavar="NAME",
    help="The teacher's name, for the record; for hidden states its folder.",
)
@click.option(
    "--tokens",
    multiple=True,
    metavar="FILE",
    help="The tokens of a source that has none: files with a column input_ids (may be repeated), "
    "or the .idx of a data set of Megatron-LM.",
)
@click.option(
    "--alignment",
    type=click.Choice(["own", "next"]),
    help="Whether a row is about its own token or the next; for sources too short to measure it.",
)
@click.option(
    "--bad-rows",
    type=click.Choice(["refuse", "skip"]),
    default="refuse",
    show_default=True,
    help="What to do with rows that break a rule.",
)
@click.option(
    "--accept-text",
    is_flag=True,
    help="Accept tokens that the tokenizer would not make of their text.",
)
@click.option("--head", type=click.IntRange(0), help="Most probable tokens to keep; all if unset.")
@click.option(
    "--tail", type=click.IntRange(0), help="Samples, from a source of whole distributions."
)
@click.option(
    "--temperature",
    "temperatures",
    type=Number(0, 100, min_open=True),
    multiple=True,
    help="Another temperature, from a source of whole distributions; may be repeated.",
)
@click.option("--heldout", is_flag=True, help="Make a store to evaluate on.")
@click.option("--sequence-length", type=click.IntRange(2), help="Most tokens of a record.")
@click.option(
    "--codec",
    default="plain",
    show_default=True,
    metavar="NAME",
    help="plain (the numbers as they are) or compact.",
)
@click.option("--store", "store_format", default="arrow", show_default=True, help="arrow or zarr.")
@json_option()
def import_(
    source: tuple[str, ...],
    to: str,
    kind: str | None,
    config: str | None,
    heldout: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Make a store of another project's cache of teacher logits.

    SOURCE is files, folders, globs, addresses such as s3://bucket/folder, or hub:ORG/NAME. The
    alignment, the mass and the tokenizer are measured, not believed. The command can be interrupted
    and run again, and several processes can share it.

    Example: coldstill import logits/ store --tokenizer teacher/
    """
    from ...data.imports.plan import Request
    from ..quiet import quiet
    from ..steps.imports import import_cache, read_config
    from .progress import Progress

    request = Request(
        source=source,
        store=to,
        format=kind,
        config=read_config(config) if config else {},
        split="heldout" if heldout else "train",
        **options,
    )
    with Progress("import") as progress, quiet():
        result = import_cache(request, progress)
    manifest = result.manifest
    if as_json:
        facts = {
            "store": to,
            "complete": manifest is not None,
            "sequences": None if manifest is None else manifest.sequences,
            "positions": result.positions,
            "head": None if manifest is None else manifest.capture.head,
            "imported": None
            if manifest is None or manifest.imported is None
            else manifest.to_json()["imported"],
        }
        click.echo(json.dumps(facts, indent=2))
    elif manifest is None:
        click.echo(f"{to}: another process writes the last shards")
    else:
        positions = f", {result.positions:,} positions" if result.positions else ""
        click.echo(f"wrote {to}: {counted(manifest.sequences, 'sequence')}{positions}")
