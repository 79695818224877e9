"""A recipe being carried out, and how a step knows that it is done.

A finished thing is never made again and never overwritten. What is there but was made with other
settings is refused, naming the setting.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...data.errors import ColdstillError
from ...data.files import read_json, write_json
from ...data.settings import first_difference
from ...stages.report import Report
from .run_record import record_recipe

if TYPE_CHECKING:
    from collections.abc import Callable

    from ...stages.report import Reporter
    from ..recipe.reading import LoadedRecipe
    from ..recipe.run_folder import Run
    from ..recipe.tables import Recipe

READ_TEACHER = "read the teacher's weights for its fingerprint"
"""What comes before a teacher is loaded."""


@dataclass(frozen=True, slots=True)
class Work:
    """A recipe being carried out in a run."""

    loaded: LoadedRecipe
    run: Run
    report: Reporter

    @property
    def recipe(self) -> Recipe:
        """What is asked for."""
        return self.loaded.recipe

    @property
    def named(self) -> str:
        """What to type for it: its recipe's name, or the run's folder where that has another."""
        own = self.recipe.name
        return own if self.run.root.name == own else shlex.quote(str(self.run.root))

    def say(self, stage: str, note: str, *, warning: bool = False) -> None:
        """Tell the user a sentence."""
        self.report(Report(stage=stage, note=note, warning=warning))

    def doing(self, stage: str, what: str) -> None:
        """Tell that something begins that may take long and is not counted."""
        self.report(Report(stage=stage, doing=what))

    def begin(self, *, student: bool = False) -> None:
        """Record the recipe in the run: called when something is about to be made, so that a
        command that is refused leaves the run as it was.

        student  what is made is a student
        """
        record_recipe(self.run, self.loaded, student=student)

    @property
    def teacher_model(self) -> str:
        """Who speaks: the folder in this run, if it is trained here, or what the recipe names."""
        teacher = self.recipe.teacher
        if teacher.model is None or teacher.is_trained_here:
            return str(self.run.teacher_model)
        return self.local(teacher.model)

    def local(self, model: str) -> str:
        """A model's folder relative to the recipe, or its hub name as it is."""
        folder = self.loaded.base / Path(model).expanduser()
        looks_like_a_hub_name = model[0] not in "./~" and model.count("/") == 1
        if looks_like_a_hub_name and not folder.is_dir() and folder.parent.is_dir():
            raise ColdstillError(f"{model}: no such folder in {folder.parent}, so no model there")
        return str(folder) if folder.is_dir() else model


def beginning(
    work: Work, record: Path, settings: dict[str, Any], stale: Path | None = None
) -> Callable[[], None]:
    """What training does first, once nothing can be refused any more.

    stale  a student's figures, of a model that was there before: they say nothing of the next one
    """

    def begin() -> None:
        if stale is not None:
            stale.unlink(missing_ok=True)
        write_json(record, settings)
        work.begin(student=stale is not None)  # reads what was just written

    return begin


def is_done(
    record: Path,
    product: Path,
    settings: Any,
    where: str,
    remedy: str,
    as_now: Callable[[Any], Any] = lambda old: old,
) -> bool:
    """Whether `product` is there, made with these settings.

    as_now  what makes of an older record one as it is written now

    Raises
        ColdstillError: it was made, or begun, with others (the first that differs)
    """
    settings = json.loads(json.dumps(settings))
    if record.exists():
        changed = first_difference(as_now(read_json(record)), settings)
        if changed is not None:
            raise ColdstillError(
                f"{record.parent}: {where} was trained with {changed}; train another under a new "
                f"name ({remedy}), or delete this folder to train it anew"
            )
        return product.exists()
    return False
