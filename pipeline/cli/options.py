"""What commands that work on a recipe share: their argument, their options, and the work itself."""

from __future__ import annotations

import functools
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..recipe.reading import LoadedRecipe
    from ..steps.work import Work


def run_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options of every command that works on recipes and runs."""

    @click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Override a key.")
    @click.option("--runs", default="runs", show_default=True, help="Folder that holds the runs.")
    @functools.wraps(command)
    def wrapped(**options: Any) -> None:
        from .progress import Progress

        with Progress(click.get_current_context().info_name or "") as progress:
            command(progress=progress, **options)

    return wrapped


def recipe_options(command: Callable[..., None]) -> Callable[..., None]:
    """The argument and options of every command that works on one recipe."""
    return click.argument("recipe")(run_options(command))


def student_option(command: Callable[..., None]) -> Callable[..., None]:
    """Which students a command is about; none named means all, which --all says aloud."""

    @click.option("--student", "students", multiple=True, metavar="NAME", help="Only this student.")
    @click.option("--all", "everyone", is_flag=True, help="All students, as without --student.")
    @functools.wraps(command)
    def wrapped(students: tuple[str, ...], everyone: bool, **options: Any) -> None:
        if everyone and students:
            raise click.UsageError("--all and --student exclude each other; keep one of them.")
        command(students=students, **options)

    return wrapped


def work_of(
    recipe: str,
    settings: tuple[str, ...],
    runs: str,
    progress: Any,
    student: str | None = None,
    *,
    loads_models: bool = True,
) -> Work:
    """A recipe, as it was named on the command line, being carried out in its run."""
    from ..recipe.reading import load_recipe

    loaded = load_recipe(recipe, settings, student, Path(runs))
    return work_on(loaded, recipe, runs, progress, loads_models=loads_models)


def work_on(
    loaded: LoadedRecipe, recipe: str, runs: str, progress: Any, *, loads_models: bool = True
) -> Work:
    """The same of a recipe that is loaded."""
    from ..recipe.reading import run_folder
    from ..recipe.run_folder import open_run
    from ..steps.work import Work

    # a folder that was copied or renamed is the run that it is, whatever its recipe is called
    folder = run_folder(recipe, Path(runs))
    run = open_run(
        Path(runs) if folder is None else folder.parent,
        loaded.recipe.name if folder is None else folder.name,
        loaded,
    )
    quiet_imports()
    if loads_models:
        quiet_libraries()
    return Work(loaded, run, progress)


def quiet_imports() -> None:
    """Libraries that speak while they are imported, for commands that may come to import them."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # transformers imports torchao where it is installed, which tells of every GPU it does not find
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


def quiet_libraries() -> None:
    """One voice on the terminal: ours."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging as model_logging

    hub_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    model_logging.set_verbosity_error()
    model_logging.disable_progress_bar()
