"""Before stage two: cut a student out of the teacher and save the model it starts with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..data.errors import ColdstillError
from ..data.files import read_json
from .models.loading import load_tokenizer
from .report import Report, Reporter, silent
from .students.job import PRUNING, StudentJob, make_student

if TYPE_CHECKING:
    from ..data.store.reader import StoreReader

STAGE = "prune-student"


def prune_student(
    job: StudentJob, store: StoreReader, report: Reporter = silent
) -> list[dict[str, Any]]:
    """Make the student's next cut, if the training before it is done; do not train.

    Returns the records of all cuts so far, in order.

    Raises
        ColdstillError: as `make_student`, or the store has no supervised position
    """
    if store.positions == 0:
        raise ColdstillError(f"{store.place}: no supervised position to measure importance on")
    for each in job.remaining_rounds():
        if each.model_folder.is_dir():
            continue
        tokenizer = load_tokenizer(str(store.tokenizer_folder()), str(store.place))
        started = each.start.is_dir()
        stage = f"{STAGE} {each.stage}"
        report(Report(stage=stage, doing="load the model to cut"))
        made = make_student(each, store, tokenizer, report)
        if started:
            note = f"already pruned: {each.start}"
        else:
            job.begin()
            report(Report(stage=stage, doing="save the pruned model"))
            made.save(each)
            note = f"{made.model.num_parameters():,} parameters left: {each.start}"
        report(Report(stage=stage, note=note))
        break
    else:
        report(Report(stage=f"{STAGE} {job.name}", note=f"already trained: {job.model_folder}"))
    records = [each.folder / PRUNING for each in job.rounds()]
    return [read_json(record) for record in records if record.exists()]
