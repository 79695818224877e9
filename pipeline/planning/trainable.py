"""Checks that a recipe's trainings can start, before anything is read, trained or written."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ..recipe.tables import Recipe


def expect_trainable(recipe: Recipe, students: Iterable[str], *, teacher: bool) -> None:
    """Refuse Trainer settings that would end a training at its start.

    students  names of the students that will be trained
    teacher   whether a teacher with `train` will be trained too

    Raises
        ColdstillError: the first wrong setting
    """
    tables = {f"students.{name}": recipe.student(name).train for name in students}
    if teacher and recipe.teacher.train is not None:
        tables = {"teacher": recipe.teacher.train, **tables}
    if not any(table.trainer for table in tables.values()):
        return  # nothing to check, so torch is not loaded
    from ...stages.training.rehearsal import expect_trainable as expect

    for where, table in tables.items():
        expect(table, where)
