"""Options of `coldstill evaluate` that run lm-eval task files."""

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
    """Which tasks run, and how."""

    paths: tuple[Path, ...]
    """Task files, and folders of task files."""
    limit: int | None
    """Number of examples of each task, the first ones; None for all."""
    download: bool
    """Tasks may fetch data that are not on this machine."""
    as_json: bool
    """Print a JSON list instead of a table."""


def task_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the task options to a command, as its argument `tasks`: None without --tasks."""

    @click.option(
        "--tasks",
        "paths",
        multiple=True,
        type=click.Path(path_type=Path),
        metavar="PATH",
        help="Run this lm-eval task file, or all task files in this folder, instead.",
    )
    @click.option(
        "--limit",
        type=click.IntRange(min=1),
        metavar="N",
        help="Use only the first N examples of each task.",
    )
    @click.option("--download", is_flag=True, help="Allow tasks to download missing data.")
    @click.option("--json", "as_json", is_flag=True, help="Print the results of tasks as JSON.")
    @functools.wraps(command)
    def wrapped(
        paths: tuple[Path, ...], limit: int | None, download: bool, as_json: bool, **options: Any
    ) -> None:
        given = {"--limit": limit is not None, "--download": download, "--json": as_json}
        if not paths and any(given.values()):
            option = next(name for name, used in given.items() if used)
            raise click.UsageError(f"{option} needs --tasks PATH.")
        tasks = TaskOptions(paths=paths, limit=limit, download=download, as_json=as_json)
        command(tasks=tasks if paths else None, **options)

    return wrapped
