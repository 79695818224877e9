"""Whether a student is trained, and whether its folder belongs to the current settings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...data.errors import ColdstillError
from ...data.files import json_sha256
from ..recipe.work import is_done

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ...data.store.reader import StoreReader
    from ..recipe.run_folder import StudentFolder
    from ..recipe.tables import StudentTable
    from ..recipe.work import Work

VARIANT = "--student NEW"
"""How a student with other settings gets another name."""


def student_settings(
    work: Work, student: StudentTable, store: StoreReader, others: Mapping[str, StoreReader]
) -> dict[str, Any]:
    """Return everything that determines the trained weights."""
    seed = work.recipe.seed if student.train.seed is None else student.train.seed
    alone = set() if student.teachers else {"teachers"}
    table = student.model_dump(mode="json", exclude={"like", "trust_remote_code", *alone})
    table["train"]["seed"] = seed  # whichever key of the recipe sets it
    settings = {"student": table, "seed": seed, "store": json_sha256(store.manifest.to_json())}
    if student.other_stores:
        settings["others"] = {
            named: json_sha256(others[named].manifest.to_json()) for named in student.other_stores
        }
    return settings


def is_trained(work: Work, name: str, settings: dict[str, Any], new_name: str = VARIANT) -> bool:
    """Return whether a student is trained with these settings; if not, it can be trained now.

    new_name  how a student with other settings gets another name, for messages

    Raises
        ColdstillError: it was trained, or begun, with other settings (the first one is named), or
            with unknown ones
    """
    folder = work.run.student(name)
    where = f"students.{name}"
    done = is_done(folder.settings, folder.model, settings, where, new_name, _as_now)
    if not done:
        _expect_own(folder, settings, where)
    return done


def _as_now(record: Any) -> Any:
    """Return an older record in today's form, with the seed also in the student's table."""
    match record:
        case {"seed": seed, "student": {"train": dict() as train, **student}}:
            return {**record, "student": {**student, "train": {**train, "seed": seed}}}
    return record


def _expect_own(folder: StudentFolder, settings: dict[str, Any], where: str) -> None:
    """Refuse files of another training, such as a copied folder or one without its record."""
    from ...stages.training.checkpoints import expect_own, last_whole_checkpoint

    last = last_whole_checkpoint(folder.checkpoints)
    last_is_own = last is not None and expect_own(last, settings)
    if folder.settings.exists():
        return
    # a cut's record names its own settings
    start = None if folder.pruning.exists() else folder.start
    left = [folder.model] if last_is_own else [folder.model, last, start]
    unknown = next((path for path in left if path is not None and path.exists()), None)
    if unknown is not None:
        raise ColdstillError(
            f"{unknown}: {where} has no {folder.settings.name} beside it, so its settings are "
            f"unknown; put that file back, or delete {folder.root} to train it again"
        )
