"""Which command is useful after another one."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

import click

from ...stages.ranks import rank

if TYPE_CHECKING:
    from collections.abc import Mapping

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


def print_next(context: click.Context) -> None:
    """Print the next useful command with the same run, to stderr; nothing with --json."""
    following = NEXT.get(context.info_name or "")
    asked = context.params
    if following is None or asked.get("as_json") or asked.get("dry_run") or rank() != 0:
        return
    named = asked.get("recipe") or asked.get("name") or asked["named"]
    if not isinstance(named, str):  # compare takes several runs; a report is of one
        if len(named) > 1:
            return
        [named] = named
    words = ["coldstill", following, named]
    for setting in asked.get("settings", ()):
        words += ["--set", setting]
    if asked.get("runs", "runs") != "runs":
        words += ["--runs", asked["runs"]]
    if following in ("train-student", "evaluate"):
        for student in asked.get("students", ()):
            words += ["--student", student]
    click.echo(f"next: {shlex.join(words)}", err=True)
