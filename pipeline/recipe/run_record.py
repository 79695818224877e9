"""The records of a run: its recipe as written, its validated recipe, and the environment.

A run can have students that its recipe file does not name: variants and points of a sweep. The
validated recipe has all of them with their own settings, so that the run's folder, used as a
recipe, makes each of them again.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import re
import sys
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from ...data.errors import ColdstillError
from ...data.files import read_json, whole_file, write_json
from ...data.places.claims import claimed
from .tables import NAME_PATTERN, TEACHER, StudentTable

if TYPE_CHECKING:
    from .reading import LoadedRecipe
    from .run_folder import Run, StudentFolder


def record_recipe(run: Run, loaded: LoadedRecipe, *, student: bool = False) -> None:
    """Write the three records into the run's folder.

    student  the next result is a student, so the recorded seed of everything else is kept
    """
    with claimed(run.recording, wait=True):  # other processes may add their students
        with whole_file(run.verbatim) as scratch:
            scratch.write_bytes(loaded.text.encode())
        resolved = _resolved(run, loaded, _recorded_seed(run) if student else None)
        write_json(run.resolved, {"recipe": resolved, "base": str(loaded.base)})
        write_json(run.environment, _environment())


def _resolved(run: Run, loaded: LoadedRecipe, seed: int | None) -> Any:
    recipe = loaded.recipe
    seed = recipe.seed if seed is None else seed
    students = {name: (table, recipe.seed) for name, table in recipe.students.items()}
    for name in run.student_names:
        # a trained student keeps its settings, even if the recipe has changed
        trained = _trained_with(run.student(name))
        if trained is not None and re.fullmatch(NAME_PATTERN, name) and name != TEACHER:
            students[name] = trained
    seeded = {name: _seeded(table, own, seed) for name, (table, own) in students.items()}
    whole = recipe.model_copy(update={"seed": seed, "students": seeded})
    return json.loads(whole.model_dump_json())


def _trained_with(folder: StudentFolder) -> tuple[StudentTable, int] | None:
    """Return a student's table and seed, or None if its record cannot be read."""
    try:
        match read_json(folder.settings):
            case {"student": dict() as table, "seed": int(seed)}:
                return StudentTable.model_validate(table), seed
    except (ColdstillError, ValidationError):
        pass  # reported when this student is used
    return None


def _seeded(student: StudentTable, own: int, seed: int) -> StudentTable:
    """Return the student with its own seed, or without one if it equals the recipe's seed."""
    now = own if student.train.seed is None else student.train.seed
    train = dataclasses.replace(student.train, seed=None if now == seed else now)
    return student.model_copy(update={"train": train})


def _recorded_seed(run: Run) -> int | None:
    try:
        match read_json(run.resolved):
            case {"recipe": {"seed": int(seed)}}:
                return seed
    except ColdstillError:
        pass  # nothing is recorded yet
    return None


def _environment() -> dict[str, str]:
    packages = ("coldstill", "torch", "transformers", "pyarrow", "numpy", "tokenizers")
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        **{package: version(package) for package in packages},
    }
