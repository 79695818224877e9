"""What a run says of itself: its recipe, as it was written and as it was understood, and the
machine.

A run may hold students that no recipe file names: variants, the points of a sweep. The recipe as it
was understood knows each of them, with the settings that are in its own folder, so that the run's
folder, taken for a recipe, makes every one of them again.
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
from ..recipe.tables import NAME_PATTERN, TEACHER, StudentTable

if TYPE_CHECKING:
    from ..recipe.reading import LoadedRecipe
    from ..recipe.run_folder import Run, StudentFolder


def record_recipe(run: Run, loaded: LoadedRecipe, *, student: bool = False) -> None:
    """Write all three into the run's folder.

    student  what is about to be made is a student: the seed of everything else stays what it was
    """
    with claimed(run.recording, wait=True):  # others may be adding their students
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
        # what was trained is as it was, whatever has become of it in the recipe since
        trained = _trained_with(run.student(name))
        if trained is not None and re.fullmatch(NAME_PATTERN, name) and name != TEACHER:
            students[name] = trained
    seeded = {name: _seeded(table, own, seed) for name, (table, own) in students.items()}
    whole = recipe.model_copy(update={"seed": seed, "students": seeded})
    return json.loads(whole.model_dump_json())


def _trained_with(folder: StudentFolder) -> tuple[StudentTable, int] | None:
    """A student's table and seed, if its record can be read."""
    try:
        match read_json(folder.settings):
            case {"student": dict() as table, "seed": int(seed)}:
                return StudentTable.model_validate(table), seed
    except (ColdstillError, ValidationError):
        pass  # whoever asks for this student is told
    return None


def _seeded(student: StudentTable, own: int, seed: int) -> StudentTable:
    """The same with its own seed, unless that follows from the recipe's."""
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
