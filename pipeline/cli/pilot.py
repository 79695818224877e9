"""`plan --pilot`: measure, print, recommend, and write into the recipe on request."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from ...data.errors import ColdstillError
from ..planning.sizes import store_sizes
from ..planning.text import pilot_text, recommendation_text
from ..recipe.writing import editable_recipe, write_capture
from ..steps.pilot import run_pilot

if TYPE_CHECKING:
    from ..recipe.work import Work


def pilot(
    work: Work, count: int, budget: float | None, write_to: str | None, *, as_json: bool
) -> None:
    """Run a pilot and print what it measured and recommends.

    count     sequences to measure
    budget    bytes per position; those of the recipe's own capture if None
    write_to  the recipe as the user named it, if the recommendation will be written into it

    Raises
        ColdstillError: as `run_pilot`, a recipe that cannot be edited, or a budget that no capture
            fits
    """
    path = None if write_to is None else editable_recipe(write_to, work.loaded, work.run)
    from ...stages.interruption import Interruption

    with Interruption().listening():  # its temporary files are deleted
        measured = run_pilot(work, count)
    own = measured.own_row(work.recipe)
    choice = measured.recommended(work.recipe, budget)
    store = store_sizes(work)["train"]
    recommendation = recommendation_text(choice, own, measured, budget)
    if as_json:
        row = None if choice is None else asdict(choice)
        click.echo(json.dumps({**asdict(measured), "recommended": row}, indent=2))
    else:
        length = work.recipe.corpus.sequence_length
        click.echo(f"{pilot_text(measured, own, store, length)}\n\n{recommendation}")
    if path is None:
        return
    if choice is None:
        raise ColdstillError(f"--write: {recommendation}; raise --budget")
    changed = write_capture(path, choice.head, choice.tail)
    line = f"head = {choice.head}, tail = {choice.tail}"
    work.say("plan", f"{path}: {line}" if changed else f"{path}: has {line} already")
