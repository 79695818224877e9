"""What `evaluate` is told about tasks on the command line."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskOptions:
    """Which tasks, and how."""

    paths: tuple[Path, ...]
    """Task files, and folders of them."""
    limit: int | None
    """Only so many examples of each task, from the first on."""
    download: bool
    """Let tasks fetch data that are not on this machine."""
    as_json: bool
    """Print a JSON list instead of a table."""


def task_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options that stand for `tasks`: a `TaskOptions`, or None without --tasks."""

    @click.option(
        "--tasks",
        "paths",
        multiple=True,
        type=click.Path(path_type=Path),
        metavar="PATH",
        help="Run lm-eval on this task file, or those of this folder, instead.",
    )
    @click.option(
        "--limit", type=click.IntRange(min=1), metavar="N", help="Only N examples of each task."
    )
    @click.option("--download", is_flag=True, help="Let tasks fetch data that are not here.")
    @click.option("--json", "as_json", is_flag=True, help="Print the tasks' results as JSON.")
    @functools.wraps(command)
    def wrapped(
        paths: tuple[Path, ...],
        limit: int | None,
        download: bool,
        as_json: bool,
        **options: Any,
    ) -> None:
        named = (("--limit", limit is not None), ("--download", download), ("--json", as_json))
        for option, given in named:
            if given and not paths:
                raise click.UsageError(f"{option} is about tasks; give them by --tasks PATH too.")
        asked = TaskOptions(paths=paths, limit=limit, download=download, as_json=as_json)
        command(tasks=asked if paths else None, **options)

    return wrapped
