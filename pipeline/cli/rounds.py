"""The `coldstill rounds` commands: who acts next, the student's text, and the teacher's scores."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import click

from .group import CommandList
from .options import json_option, recipe_options, student_option, work_of


@click.group(cls=CommandList)
def rounds() -> None:
    """Let students learn from text that they write and the teacher scores.

    For students with 'rounds'. The student's machine trains and writes, the teacher's machine
    scores; 'next' says whose turn it is. coldstill run does everything on one machine.
    """


@rounds.command("next")
@recipe_options
@student_option
@json_option("a JSON list")
def next_(
    recipe: str, settings: Any, runs: str, report: Any, students: Any, *, as_json: bool
) -> None:
    """Show which machine acts next for each student, and its command.

    Example: coldstill rounds next my-run
    """
    from ..steps.rounds import next_acts

    acts = next_acts(work_of(recipe, settings, runs, report, loads_models=False), students)
    if as_json:
        click.echo(json.dumps([asdict(one) for one in acts], indent=2))
    else:
        click.echo("\n".join(one.in_words() for one in acts))


@rounds.command()
@recipe_options
@student_option
def write(recipe: str, settings: Any, runs: str, report: Any, students: Any) -> None:
    """Let trained students write text, without the teacher.

    Example: coldstill rounds write my-run --student small
    """
    from ..steps.rounds import write_texts

    write_texts(work_of(recipe, settings, runs, report), students)


@rounds.command()
@recipe_options
@student_option
def capture(recipe: str, settings: Any, runs: str, report: Any, students: Any) -> None:
    """Let the teacher score what students wrote, without the students.

    Example: coldstill rounds capture my-run --student small
    """
    from ..steps.rounds import capture_texts

    capture_texts(work_of(recipe, settings, runs, report), students)
