"""Before stage two: cut a student out of the teacher, and write down what it begins with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..data.errors import ColdstillError
from ..data.files import read_json
from .models.loading import load_tokenizer
from .report import Report, Reporter, silent
from .students.origin import PRUNING, StudentJob, make_student
from .students.rounds import rounds_of, rounds_to_go

if TYPE_CHECKING:
    from ..data.store.reader import StoreReader

STAGE = "prune-student"


def prune_student(
    job: StudentJob, store: StoreReader, report: Reporter = silent
) -> list[dict[str, Any]]:
    """Make the student's next cut, if it is due, and leave the training to `train_student`.

    Returns what is told of each cut that was made, the first one first.

    Raises
        ColdstillError: as `train_student`, of the model; a store with nothing to measure by
    """
    if store.positions == 0:
        raise ColdstillError(f"{store.place}: no supervised position, nothing to measure by")
    for each in rounds_to_go(job):
        if each.model_folder.is_dir():
            continue
        tokenizer = load_tokenizer(str(store.tokenizer_folder()), str(store.place))
        begun = each.start.is_dir()
        report(Report(stage=f"{STAGE} {each.stage}", doing="load the model that is cut"))
        made = make_student(each, store, tokenizer, report)
        if begun:
            note = f"already pruned: {each.start}"
        else:
            job.begin()
            report(Report(stage=f"{STAGE} {each.stage}", doing="save what is left"))
            made.save(each)
            note = f"{made.model.num_parameters():,} parameters left: {each.start}"
        report(Report(stage=f"{STAGE} {each.stage}", note=note))
        break
    else:
        report(Report(stage=f"{STAGE} {job.name}", note=f"already trained: {job.model_folder}"))
    records = [each.folder / PRUNING for each in rounds_of(job)]
    return [read_json(record) for record in records if record.exists()]
