"""A sweep: one student for each point of a grid, all on one store, told side by side."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ...data.errors import ColdstillError
from ...data.settings import first_difference
from ...stages.ranks import rank
from ..recipe.keys import set_value
from ..recipe.tables import TEACHER
from .grid import Point, points_of, read_grids

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ..recipe.reading import LoadedRecipe, RecipeSource
    from ..recipe.tables import StudentTable
    from ..results.figures import ModelFigures
    from .work import Work

Row = dict[str, Any]

NEW_NAME = "with a --grid of that key too"
"""What gives a point of other settings a name of its own."""


@dataclass(frozen=True, slots=True)
class Sweep:
    """What is to be trained."""

    points: list[Point]
    """Each once."""
    loaded: LoadedRecipe
    """The recipe with all of them among its students."""

    @property
    def names(self) -> list[str]:
        """Of the students."""
        return [point.name for point in self.points]


def plan_sweep(source: RecipeSource, texts: Sequence[str]) -> Sweep:
    """The points of grids, checked as a recipe.

    A point that is the recipe's own student in every setting is that student.

    Raises
        ColdstillError: grids that cannot be read, settings that a recipe cannot have, a point whose
            name another student has
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
                f"another name {NEW_NAME}, or call that student something else"
            )
        points.setdefault(point.name, point)
    students = own | {name: made[name] for name in points}
    recipe = plain.recipe.model_copy(update={"students": students})
    return Sweep(list(points.values()), replace(plain, recipe=recipe))


def _made(source: RecipeSource, points: Sequence[Point]) -> Mapping[str, StudentTable]:
    """Each point as its student's table with the settings in it, read by the recipe's own rules."""
    students = source.table["students"]
    varied: dict[str, Any] = {}
    for point in points:
        varied[point.name] = copy.deepcopy(students[point.student])
        for key, value in point.settings.items():
            set_value(varied[point.name], [*key], value, f"--grid students.{point.student}")
    table = {**source.table, "students": students | varied}
    return replace(source, table=table).understood().recipe.students


def _difference(old: StudentTable, new: StudentTable, seed: int) -> str | None:
    """The first setting in which two students differ; without a seed, one has the recipe's."""
    one, other = (student.model_dump(mode="json", exclude={"like"}) for student in (old, new))
    for table in (one, other):
        if table["train"]["seed"] is None:
            table["train"]["seed"] = seed
    return first_difference(one, other)


def told(sweep: Sweep, work: Work) -> list[Row]:
    """Every point: its name, its settings by key, and whether it is trained; how many are is said
    aloud."""
    facts: list[Row] = [
        {
            "name": point.name,
            "settings": {
                ".".join(("students", point.student, *key)): value
                for key, value in point.settings.items()
            },
            "trained": work.run.student(point.name).model.exists(),
        }
        for point in sweep.points
    ]
    done = sum(fact["trained"] for fact in facts)
    already = f", {done} of them trained already" if done else ""
    work.say("sweep", f"{len(facts)} point{'s' * (len(facts) > 1)}{already}")
    return facts


def listed(sweep: Sweep, facts: Sequence[Row]) -> str:
    """The same for a terminal, keys without their student."""
    width = max(len(fact["name"]) for fact in facts)
    lines = []
    for point, fact in zip(sweep.points, facts, strict=True):
        settings = [f"{'.'.join(key)} = {_shown(v)}" for key, v in point.settings.items()]
        done = ["(trained)"] if fact["trained"] else []
        lines.append("  ".join([fact["name"].ljust(width), *settings, *done]))
    return "\n".join(lines)


def _shown(value: Any) -> str:
    return json.dumps(value, default=str, ensure_ascii=False)


def train_sweep(work: Work, sweep: Sweep) -> tuple[list[ModelFigures], dict[str, str]]:
    """Train what is missing, measure it, and compare.

    Returns the rows of the teacher and of each point, the best first, and the points that were left
    out because their loss became no number, with the reason. Of several processes only the first
    one gets rows.

    Raises
        ColdstillError: as `students.train_students`, before anything is trained
    """
    from .comparison import compare_runs
    from .evaluation import evaluate
    from .students import train_students

    facts = told(sweep, work)
    left_out = train_students(work, sweep.names, new_name=NEW_NAME, go_on=True)
    settings = {f["name"]: f["settings"] for f in facts if f["name"] not in left_out}
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
    """What is said in the end of points that were left out."""
    return ColdstillError(
        f"sweep: {len(left_out)} of {count} points left out, their loss became no number: "
        f"{', '.join(left_out)}; sweep lower learning rates, or leave these values out"
    )
