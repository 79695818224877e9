"""Whether a recipe's trainings can begin, asked before anything is read, trained or written."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ..recipe.tables import Recipe


def expect_trainable(recipe: Recipe, students: Iterable[str], *, teacher: bool) -> None:
    """Refuse settings of the trainer that would end a training in its beginning.

    students  those that will be trained
    teacher   whether the recipe's teacher will be trained too, if it has a training

    Raises
        ColdstillError: the first such setting
    """
    tables = {f"students.{name}": recipe.student(name).train for name in students}
    if teacher and recipe.teacher.train is not None:
        tables = {"teacher": recipe.teacher.train, **tables}
    if not any(table.trainer for table in tables.values()):
        return  # without settings there is nothing to try, and torch need not be loaded
    from ...stages.training.rehearsal import expect_trainable as expect

    for where, table in tables.items():
        expect(table, where)
