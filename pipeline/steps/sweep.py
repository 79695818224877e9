"""A sweep: one student for each point of a grid, all trained from one store and then compared."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from ...data.errors import ColdstillError
from ...data.files import first_difference
from ...stages.ranks import rank
from ..recipe.keys import set_value
from ..recipe.tables import TEACHER
from .grid import Point, points_of, read_grids

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ..recipe.reading import LoadedRecipe, RecipeSource
    from ..recipe.tables import StudentTable
    from ..recipe.work import Work
    from ..results.figures import ModelFigures

NEW_NAME = "with a --grid of that key too"
"""How a point with other settings gets another name."""


@dataclass(frozen=True, slots=True)
class Sweep:
    """The points that will be trained."""

    points: list[Point]
    """Each point once."""
    loaded: LoadedRecipe
    """The recipe with all points among its students."""


@dataclass(frozen=True, slots=True)
class ListedPoint:
    """A point of a sweep, and whether its model exists."""

    point: Point
    trained: bool

    @property
    def settings(self) -> dict[str, Any]:
        """Values by the whole key, `students.small.train.steps`."""
        above = ("students", self.point.student)
        return {".".join((*above, *key)): value for key, value in self.point.settings.items()}

    def to_json(self) -> dict[str, Any]:
        """Return the point as a JSON value."""
        return {"name": self.point.name, "settings": self.settings, "trained": self.trained}


def plan_sweep(source: RecipeSource, texts: Sequence[str]) -> Sweep:
    """Return the points of grids, checked as a recipe.

    A point that has the settings of a student in the recipe is that student.

    Raises
        ColdstillError: a grid that cannot be read, wrong settings, or a point with the name of
            another student
    """
    plain = source.understood()
    own = plain.recipe.students
    found = points_of(read_grids(texts, own))
    made = _made(source, found)
    points: dict[str, Point] = {}
    for point in found:
        seed = plain.recipe.seed
        if _difference(own[point.student], made[point.name], seed) is None:
            point = replace(point, name=point.student)
        elif point.name in own and (
            changed := _difference(own[point.name], made[point.name], seed)
        ):
            raise ColdstillError(
                f"--grid: students.{point.name} is in the recipe already, with {changed}; get "
                f"another name {NEW_NAME}, or rename that student"
            )
        points.setdefault(point.name, point)
    students = own | {name: made[name] for name in points}
    recipe = plain.recipe.model_copy(update={"students": students})
    return Sweep(list(points.values()), replace(plain, recipe=recipe))


def _made(source: RecipeSource, points: Sequence[Point]) -> Mapping[str, StudentTable]:
    """Return each point as a student's table that was validated like a recipe."""
    students = source.table["students"]
    varied: dict[str, Any] = {}
    for point in points:
        varied[point.name] = copy.deepcopy(students[point.student])
        for key, value in point.settings.items():
            set_value(varied[point.name], [*key], value, f"--grid students.{point.student}")
    table = {**source.table, "students": students | varied}
    return replace(source, table=table).understood().recipe.students


def _difference(old: StudentTable, new: StudentTable, seed: int) -> str | None:
    """Return the first setting in which two students differ; an unset seed is the recipe's."""
    one, other = (student.model_dump(mode="json", exclude={"like"}) for student in (old, new))
    for table in (one, other):
        if table["train"]["seed"] is None:
            table["train"]["seed"] = seed
    return first_difference(one, other)


def listed_points(sweep: Sweep, work: Work) -> list[ListedPoint]:
    """Return every point, and report how many there are and how many are trained."""
    found = [
        ListedPoint(point, work.run.student(point.name).model.exists()) for point in sweep.points
    ]
    done = sum(one.trained for one in found)
    already = f", {done} of them trained already" if done else ""
    work.say("sweep", f"{len(found)} point{'s' * (len(found) > 1)}{already}")
    return found


def text(listed: Sequence[ListedPoint]) -> str:
    """Return the points as aligned text; keys are shown without their student."""
    rows = []
    for one in listed:
        settings = [
            f"{'.'.join(key)} = {json.dumps(value, default=str, ensure_ascii=False)}"
            for key, value in one.point.settings.items()
        ]
        rows.append([one.point.name, "  ".join([*settings, *["(trained)"] * one.trained])])
    return tabulate(rows, tablefmt="plain", disable_numparse=True)


def train_sweep(
    work: Work, listed: Sequence[ListedPoint]
) -> tuple[list[ModelFigures], dict[str, str]]:
    """Train missing points, measure all of them and compare.

    Returns the rows of the teacher and of each point, the lowest loss first, and the points that
    were left out because their loss became NaN or infinite, each with the reason. With several
    processes only the first one gets rows.

    Raises
        ColdstillError: as `students.train_students`, before anything is trained
    """
    from .comparison import compare_runs
    from .evaluation import evaluate
    from .students import train_students

    names = [one.point.name for one in listed]
    left_out = train_students(work, names, new_name=NEW_NAME, go_on=True)
    settings = {one.point.name: one.settings for one in listed if one.point.name not in left_out}
    if rank() != 0 or not settings:
        return [], left_out
    evaluate(work, [*settings])
    rows = [
        row
        for row in compare_runs([work.run], None, work.report)
        if row.name in {TEACHER, *settings}
    ]
    return [
        row.model_copy(update={"settings": settings.get(row.name, {})}) for row in rows
    ], left_out


def left_out_error(left_out: Mapping[str, str], count: int) -> ColdstillError:
    """Return the error for points that were left out."""
    return ColdstillError(
        f"sweep: {len(left_out)} of {count} points left out because their loss became NaN or "
        f"infinite: {', '.join(left_out)}; sweep lower learning rates, or leave these values out"
    )
