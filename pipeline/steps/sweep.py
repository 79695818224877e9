"""A sweep: one student for each point of a grid, all trained from one store and then compared.

A point is named by its settings, such as `small-learning_rate-0.003-steps-200`. The name depends
only on its own settings, so a larger grid finds the students of a smaller one.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import re
import tomllib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from ...data.errors import ColdstillError
from ...data.files import first_difference, json_sha256
from ...stages.ranks import rank
from ..recipe.reading import set_value, split_key, toml_value
from ..recipe.reference import student_keys
from ..recipe.tables import TEACHER

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from ..recipe.reading import LoadedRecipe, RecipeSource
    from ..recipe.tables import StudentTable
    from ..recipe.work import Work
    from ..results.figures import ModelFigures
    from .on_ray.cluster import Pool


MOST = 1000
"""Most points of a sweep; a larger grid is refused as a typing mistake."""
_LONGEST = 100
"""Most characters of a name, which is also a folder name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """One key of one student, and its values."""

    student: str
    key: tuple[str, ...]
    """Parts of the key below the student, such as ("train", "steps")."""
    values: tuple[Any, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One student of a sweep."""

    name: str
    student: str
    """The student of the recipe that this point varies."""
    settings: dict[tuple[str, ...], Any]
    """Values by key below the student."""


def read_grids(texts: Sequence[str], students: Collection[str]) -> list[Grid]:
    """Parse grids, `students.NAME.KEY=V1,V2`; values are TOML or bare words.

    students  names of the recipe's students

    Raises
        ColdstillError: unknown key or student, no values, or one key twice
    """
    grids: list[Grid] = []
    for text in texts:
        named, equals, values = text.partition("=")
        where = f"--grid {text}"
        key = split_key(named, students) if equals else None
        if key is None:
            raise ColdstillError(f"{where}: expected students.NAME.KEY=V1,V2")
        _expect_below_student(key, students, where)
        grid = Grid(student=key[1], key=tuple(key[2:]), values=_values(values, where))
        for other in grids:
            short, long = sorted((grid.key, other.key), key=len)
            if other.student == grid.student and long[: len(short)] == short:
                raise ColdstillError(
                    f"{where}: this key has a grid already; give all its values in one --grid"
                    if short == long
                    else f"{where}: {'.'.join(long)} is a part of {'.'.join(short)}, which has a "
                    "grid too; keep one of them"
                )
        grids.append(grid)
    return grids


def points_of(grids: Iterable[Grid]) -> list[Point]:
    """Return the product of each student's grids, one student after the other.

    Raises
        ColdstillError: two points would have one name, or there are too many points
    """
    of_students: dict[str, list[Grid]] = {}
    for grid in grids:
        of_students.setdefault(grid.student, []).append(grid)
    count = sum(math.prod(len(g.values) for g in each) for each in of_students.values())
    if count > MOST:
        raise ColdstillError(f"--grid: {count:,} points are more than {MOST:,}; take fewer values")
    points: dict[str, Point] = {}
    for student, own in of_students.items():
        own.sort(key=lambda grid: grid.key)
        suffixes = [_suffix(grid.key, [other.key for other in own]) for grid in own]
        for values in itertools.product(*(grid.values for grid in own)):
            point = Point(
                name=_name(student, suffixes, values),
                student=student,
                settings=dict(zip((grid.key for grid in own), values, strict=True)),
            )
            same = points.setdefault(point.name, point)
            if same.settings != point.settings or same.student != student:
                raise ColdstillError(
                    f"--grid: two points would both be called {point.name}; write one of the "
                    "values differently, or sweep it by itself"
                )
    return list(points.values())


def _expect_below_student(key: list[str], students: Collection[str], where: str) -> None:
    if key == ["seed"]:
        raise ColdstillError(
            f"{where}: another seed of the recipe would need another store; sweep "
            "students.NAME.train.seed"
        )
    if key[0] != "students":
        raise ColdstillError(
            f"{where}: only keys below students. can be swept: another {'.'.join(key)} would need "
            "another store, in another run"
        )
    if len(key) > 1 and key[1] not in students:
        raise ColdstillError(
            f"{where}: no student '{key[1]}' (have: {', '.join(students) or 'none'})"
        )
    if len(key) < 3:
        raise ColdstillError(f"{where}: expected a student's key, students.NAME.KEY=V1,V2")


def _values(text: str, where: str) -> tuple[Any, ...]:
    try:
        found = tomllib.loads(f"values = [{text}]")
        values = found["values"] if found.keys() == {"values"} else [""]
    except tomllib.TOMLDecodeError:
        # bare words; text with brackets or quotes is wrong TOML
        words = [""] if re.search(r"[\[\]{}\"'\n]", text) else text.split(",")
        values = [toml_value(word) for word in words]
    if not values or any(value == "" for value in values):
        raise ColdstillError(
            f"{where}: expected values separated by commas, as in TOML; put quotes around them if "
            "the shell changes them"
        )
    return tuple(values)


def _suffix(key: tuple[str, ...], swept: Collection[tuple[str, ...]]) -> str:
    """Return the shortest end of a key that no other key of a student has."""
    others = (student_keys() | set(swept)) - {key}
    for length in range(1, len(key)):
        if all(other[-length:] != key[-length:] for other in others):
            return ".".join(key[-length:])
    return ".".join(key)


def _name(student: str, suffixes: Sequence[str], values: Sequence[Any]) -> str:
    parts = [f"{key}-{_in_name(value)}" for key, value in zip(suffixes, values, strict=True)]
    name = "-".join([student, *parts])
    return name if len(name) <= _LONGEST else f"{student}-{_digest([*parts])}"


def _in_name(value: Any) -> str:
    """Return a value as a part of a name."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return _number(value)
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9._-]{1,32}", value):
        return value
    if isinstance(value, str) and re.fullmatch(r"[0-9.]{1,8}%", value):
        return f"{value[:-1]}pct"  # a name cannot contain a percent sign
    if isinstance(value, list) and value and all(type(item) is int for item in value):
        listed = "_".join(map(str, value))
        return listed if len(listed) <= 32 else _digest(value)
    return _digest(value)


def _number(value: float) -> str:
    """Return one text for equal numbers: 3e-3 and 0.003, 1 and 1.0."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        value = int(value)
    digits, _, exponent = repr(value).partition("e")
    return f"{digits}e{int(exponent)}" if exponent else digits


def _digest(value: Any) -> str:
    """Return one digest for equal values."""
    return json_sha256(json.loads(json.dumps(_plain(value))))[:8]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    if isinstance(value, bool):
        return value
    return _number(value) if isinstance(value, int | float) else str(value)


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
        return {"name": self.point.name, "settings": self.settings, "trained": self.trained}


def plan_sweep(source: RecipeSource, texts: Sequence[str]) -> Sweep:
    """Return the points of grids, checked as a recipe.

    A point that has the settings of a student in the recipe is that student.

    Raises
        ColdstillError: a grid that cannot be read, wrong settings, a student with rounds, or a
            point with the name of another student
    """
    plain = source.validated()
    own = plain.recipe.students
    found = points_of(read_grids(texts, own))
    made = _made(source, found)
    points: dict[str, Point] = {}
    for point in found:
        if made[point.name].rounds is not None:
            raise ColdstillError(
                f"--grid: students.{point.student} has 'rounds', between which the teacher acts, "
                "so a sweep cannot train it; name each student in the recipe and use coldstill run"
            )
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
    return replace(source, table=table).validated().recipe.students


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
    work.note("sweep", f"{len(found)} point{'s' * (len(found) > 1)}{already}")
    return found


def points_text(listed: Sequence[ListedPoint]) -> str:
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
    work: Work, listed: Sequence[ListedPoint], pool: Pool | None = None
) -> tuple[list[ModelFigures], dict[str, str]]:
    """Train missing points, measure all of them and compare.

    pool  workers of a Ray cluster that train the points; if None, this process trains them

    Returns the rows of the teacher and of each point, the lowest loss first, and the points that
    were left out because their loss became NaN or infinite, each with the reason. With several
    processes only the first one gets rows.
    """
    from .evaluation import compare_runs, evaluate
    from .students import train_students

    names = [one.point.name for one in listed]
    if pool is None:
        left_out = train_students(work, names, new_name=NEW_NAME, go_on=True)
    else:
        from .on_ray.sweep import train_points

        left_out = train_points(work, names, NEW_NAME, pool)
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
    return ColdstillError(
        f"sweep: {len(left_out)} of {count} points left out because their loss became NaN or "
        f"infinite: {', '.join(left_out)}; sweep lower learning rates, or leave these values out"
    )
