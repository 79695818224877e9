"""Whether a student is trained, and whether what is in its folder is of the settings asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...data.errors import ColdstillError
from ...data.fingerprint import json_sha256
from .work import is_done

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ...data.store.reader import StoreReader
    from ..recipe.run_folder import StudentFolder
    from ..recipe.tables import StudentTable
    from .work import Work

VARIANT = "--student NEW"
"""What gives a student of other settings a name of its own."""


def student_settings(
    work: Work, student: StudentTable, store: StoreReader, others: Mapping[str, StoreReader]
) -> dict[str, Any]:
    """Everything that decides what comes out of training it."""
    seed = work.recipe.seed if student.train.seed is None else student.train.seed
    alone = set() if student.teachers else {"teachers"}
    table = student.model_dump(mode="json", exclude={"like", "trust_remote_code", *alone})
    table["train"]["seed"] = seed  # whichever key of the recipe says it
    settings = {"student": table, "seed": seed, "store": json_sha256(store.manifest.to_json())}
    if student.other_stores:
        settings["others"] = {
            named: json_sha256(others[named].manifest.to_json()) for named in student.other_stores
        }
    return settings


def is_trained(work: Work, name: str, settings: dict[str, Any], new_name: str = VARIANT) -> bool:
    """Whether a student is trained with these settings; if not, its folder is fit to train it in.

    new_name  how one with other settings gets a name

    Raises
        ColdstillError: it was trained, or begun, with others (the first that differs), or with
            nobody knows which
    """
    folder = work.run.student(name)
    where = f"students.{name}"
    done = is_done(folder.settings, folder.model, settings, where, new_name, _as_now)
    if not done:
        _expect_own(folder, settings, where)
    return done


def _as_now(record: Any) -> Any:
    """An older record, with the seed in the student's own table too."""
    match record:
        case {"seed": seed, "student": {"train": dict() as train, **student}}:
            return {**record, "student": {**student, "train": {**train, "seed": seed}}}
    return record


def _expect_own(folder: StudentFolder, settings: dict[str, Any], where: str) -> None:
    """Refuse to go on from what another training has left: a folder that was copied, a record that
    was deleted."""
    from ...stages.training.checkpoints import expect_own, last_whole_checkpoint

    last = last_whole_checkpoint(folder.checkpoints)
    says_so = last is not None and expect_own(last, settings)
    if folder.settings.exists():
        return
    # what a cut left says itself what it was made of
    start = None if folder.pruning.exists() else folder.start
    left = [folder.model] if says_so else [folder.model, last, start]
    unknown = next((path for path in left if path is not None and path.exists()), None)
    if unknown is not None:
        raise ColdstillError(
            f"{unknown}: {where} has no {folder.settings.name} beside it, so nobody knows what it "
            f"was trained with; put that back, or delete {folder.root} to train it anew"
        )
