"""Options that commands share, the run that they name, and the command that is useful next."""

from __future__ import annotations

import functools
import math
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ...stages.ranks import rank
from ..quiet import quiet_imports, quiet_libraries

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ..recipe.work import Work


class Number(click.FloatRange):
    """A number in a range. NaN is in none, though no border excludes it."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        found = super().convert(value, param, ctx)
        if math.isnan(found):
            self.fail(f"{value} is not a number.", param, ctx)
        return found


NEXT: Mapping[str, str] = {
    "init": "plan",
    "plan": "teacher-logits",
    "train-teacher": "teacher-logits",
    "teacher-logits": "train-student",
    "prune-student": "train-student",
    "train-student": "evaluate",
    "evaluate": "compare",
    "compare": "report",
    "sweep": "report",
    "run": "report",
}
FOLLOWING = "coldstill.following"
"""Key in the context's `meta` for a command that is useful next instead."""


def print_next(context: click.Context) -> None:
    """Print the next useful command with the same run, to stderr; nothing with --json."""
    following = context.meta.get(FOLLOWING) or NEXT.get(context.info_name or "")
    asked = context.params
    if following is None or asked.get("as_json") or asked.get("dry_run") or rank() != 0:
        return
    named = asked.get("recipe") or asked.get("name") or asked["named"]
    if not isinstance(named, str):  # compare takes several runs; a report is of one
        if len(named) > 1:
            return
        [named] = named
    words = ["coldstill", *following.split(), named]
    for setting in asked.get("settings", ()):
        words += ["--set", setting]
    if asked.get("runs", "runs") != "runs":
        words += ["--runs", asked["runs"]]
    if following in ("train-student", "evaluate", "rounds next"):
        for student in asked.get("students", ()):
            words += ["--student", student]
    click.echo(f"next: {shlex.join(words)}", err=True)


def run_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of every command that works on runs; it gets a reporter as `progress`."""

    @click.option(
        "--set",
        "settings",
        multiple=True,
        metavar="KEY=VALUE",
        help="Set a key of the recipe; may be repeated.",
    )
    @click.option("--runs", default="runs", show_default=True, help="Folder that holds the runs.")
    @functools.wraps(command)
    def wrapped(**options: Any) -> None:
        from .progress import Progress

        context = click.get_current_context()
        with Progress(context.info_name or "") as progress:
            command(progress=progress, **options)
        print_next(context)

    return wrapped


def recipe_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the argument RECIPE and the options of `run_options`.

    The command gets `recipe`, `settings`, `runs` and `report`, as the steps take them.
    """

    @functools.wraps(command)
    def wrapped(progress: Any, **options: Any) -> None:
        command(report=progress, **options)

    return click.argument("recipe")(run_options(wrapped))


def student_option(command: Callable[..., None]) -> Callable[..., None]:
    """Add --student and --all; without either, a command works on all students."""

    @click.option(
        "--student",
        "students",
        multiple=True,
        metavar="NAME",
        help="Only this student; may be repeated.",
    )
    @click.option("--all", "everyone", is_flag=True, help="All students, as without --student.")
    @functools.wraps(command)
    def wrapped(students: tuple[str, ...], everyone: bool, **options: Any) -> None:
        if everyone and students:
            raise click.UsageError("--all and --student exclude each other; keep one of them.")
        command(students=students, **options)

    return wrapped


def ray_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of steps that Ray can spread; the command gets a `Pool` or None as `pool`."""

    @click.option(
        "--ray",
        "address",
        is_flag=False,
        flag_value="",
        metavar="[ADDRESS]",
        help="Use a Ray cluster; without an address the running one, or a new one here.",
    )
    @click.option("--workers", type=click.IntRange(min=1), help="With --ray: most workers.")
    @click.option(
        "--gpus-per-worker",
        "gpus",
        type=click.IntRange(min=0),
        help="With --ray: GPUs of a worker; 1 if the cluster has any.",
    )
    @click.option(
        "--cpus-per-worker",
        "cpus",
        type=click.IntRange(min=1),
        help="With --ray: CPUs of a worker, and threads of a model on CPUs; 1 if unset.",
    )
    @functools.wraps(command)
    def wrapped(
        address: str | None, workers: int | None, gpus: int | None, cpus: int | None, **options: Any
    ) -> None:
        if address is None:
            given = {"--workers": workers, "--gpus-per-worker": gpus, "--cpus-per-worker": cpus}
            for option in (name for name, value in given.items() if value is not None):
                raise click.UsageError(f"{option} needs --ray.")
            command(pool=None, **options)
            return
        if workers is None:
            raise click.UsageError("--ray needs --workers N.")
        from ..steps.on_ray.cluster import Pool

        command(pool=Pool(address=address, workers=workers, gpus=gpus, cpus=cpus or 1), **options)

    return wrapped


def json_option(
    what: str = "a JSON object",
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add --json; the command gets `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help=f"Print {what}.")


def work_of(
    recipe: str,
    settings: tuple[str, ...],
    runs: str,
    progress: Any,
    *,
    loads_models: bool = True,
) -> Work:
    """Open the run of a recipe that was named on the command line."""
    from ..recipe.work import open_work

    work = open_work(recipe, settings, Path(runs), progress)
    quiet_imports()
    if loads_models:
        quiet_libraries()
    return work
