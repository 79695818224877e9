"""A recipe and its run, and how a step finds out that its result exists already.

A finished result is never made again and never overwritten. A result that was made with other
settings is refused; the message names the setting.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...data.errors import ColdstillError
from ...data.files import first_difference, read_json, write_json
from ...data.packaged import packaged
from ...stages.models.gguf_file import GGUF, unpacked
from ...stages.report import Report
from ..quiet import quiet
from .reading import load_recipe, run_folder
from .run_folder import open_run, record_recipe

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ...stages.report import Reporter
    from .reading import LoadedRecipe
    from .run_folder import Run
    from .tables import Recipe

READ_TEACHER = "read the teacher's weights for its fingerprint"
"""Progress text of the step before a teacher is loaded."""


@dataclass(frozen=True, slots=True)
class Work:
    """A recipe, its run, and where its steps report."""

    loaded: LoadedRecipe
    run: Run
    report: Reporter

    @property
    def recipe(self) -> Recipe:
        return self.loaded.recipe

    @property
    def named(self) -> str:
        """The name of this run on a command line: the recipe's name, or the run's folder if it
        differs."""
        own = self.recipe.name
        return own if self.run.root.name == own else shlex.quote(str(self.run.root))

    def note(self, stage: str, note: str, *, warning: bool = False) -> None:
        """Report a sentence for the user."""
        self.report(Report(stage=stage, note=note, warning=warning))

    def doing(self, stage: str, what: str) -> None:
        """Report the start of something that can take long and is not counted."""
        self.report(Report(stage=stage, doing=what))

    def begin(self, *, student: bool = False) -> None:
        """Record the recipe in the run.

        Called just before the first result is written, so that a refused command leaves the run
        unchanged.

        student  the result is a student
        """
        record_recipe(self.run, self.loaded, student=student)

    @property
    def teacher_model(self) -> str:
        """The teacher's folder or hub name; the folder in this run if it is trained here."""
        teacher = self.recipe.teacher
        if teacher.model is None or teacher.is_trained_here:
            return str(self.run.teacher_model)
        return self.local(teacher.model)

    def has_file(self, model: str) -> bool:
        """Whether a model is one file that exists on this machine."""
        try:
            return self._path(model).is_file()
        except ColdstillError:
            return False

    def _path(self, model: str) -> Path:
        return packaged(model, model) or self.loaded.base / Path(model).expanduser()

    def local(self, model: str) -> str:
        """Return a model's folder (relative to the recipe), or its hub name unchanged.

        A GGUF file is unpacked into a folder, which takes a while the first time.

        Raises
            ColdstillError: the folder, file or package does not exist, or the file cannot be
                unpacked
        """
        folder = self._path(model)
        if folder.suffix == GGUF:
            with quiet():  # transformers draws bars of its own while it reads and writes weights
                return str(unpacked(folder, model, self.report))
        looks_like_a_hub_name = model[0] not in "./~" and model.count("/") == 1
        if looks_like_a_hub_name and not folder.is_dir() and folder.parent.is_dir():
            raise ColdstillError(f"{model}: no such folder in {folder.parent}")
        return str(folder) if folder.is_dir() else model


def open_work(
    recipe: str | Path,
    settings: Sequence[str],
    runs: str | Path,
    report: Reporter,
    student: str | None = None,
) -> Work:
    """Load a recipe and open its run; parameters as `load_recipe`."""
    loaded = load_recipe(str(recipe), settings, student, Path(runs))
    return Work(loaded, run_of(recipe, runs, loaded), report)


def run_of(recipe: str | Path, runs: str | Path, loaded: LoadedRecipe) -> Run:
    """Return the run of a recipe; a copied or renamed run folder stays that run."""
    folder = run_folder(str(recipe), Path(runs))
    if folder is None:
        return open_run(Path(runs), loaded.recipe.name, loaded)
    return open_run(folder.parent, folder.name, loaded)


def beginning(
    work: Work, record: Path, settings: dict[str, Any], stale: Path | None = None
) -> Callable[[], None]:
    """Return a function that training calls first, after all checks have passed.

    stale  figures of a student's earlier model, which are deleted
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
    """Return whether `product` exists and was made with these settings.

    as_now  converts the record of an older version

    Raises
        ColdstillError: it was made, or begun, with other settings; the first one is named
    """
    settings = json.loads(json.dumps(settings))
    if record.exists():
        changed = first_difference(as_now(read_json(record)), settings)
        if changed is not None:
            raise ColdstillError(
                f"{record.parent}: {where} was trained with {changed}; train another under a new "
                f"name ({remedy}), or delete this folder to train it again"
            )
        return product.exists()
    return False
