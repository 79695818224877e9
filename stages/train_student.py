"""Stage two: train a student from the store. Runs the teacher only to prune it."""

from __future__ import annotations

import contextlib
import copy
import shutil
from typing import TYPE_CHECKING, Any

from ..data.files import whole_folder
from .libraries import asking
from .models.device import best_device
from .models.ends import report_ends, store_ends, with_end
from .models.isolation_choice import student_isolation
from .models.loading import load_tokenizer
from .models.output_head import connect_head
from .ranks import rank, wait_for_all
from .report import Report, Reporter, silent
from .students.adapters import adapt, expect_peft, merge
from .students.job import NewStudent, StudentJob, make_student
from .students.lesson import lesson
from .training.checkpoints import full_disk_errors
from .training.feed import StoreDataset
from .training.loop import TrainingJob, train
from .training.objective import supports

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ..data.store.reader import StoreReader

__all__ = ["StudentJob", "make_student", "student_isolation", "train_student"]

STAGE = "train-student"


def train_student(job: StudentJob, store: StoreReader, report: Reporter = silent) -> None:
    """Train one student and write it to `folder/model`.

    A student with several cuts is trained after each of them.

    Raises
        ColdstillError: as `make_student`; an objective that the store does not support, a store
            without supervised positions, stores of different sequences, impossible adapters, or a
            loss that is NaN or infinite
    """
    for each in job.remaining_rounds():
        if not each.model_folder.is_dir():
            _train_student(each, store, report)


def _train_student(job: StudentJob, store: StoreReader, report: Reporter) -> None:
    where = f"students.{job.name}"
    manifest = store.manifest
    taught = lesson(job, store)
    if job.lora is not None:
        expect_peft(f"{where}.lora")
    tokenizer = load_tokenizer(str(store.tokenizer_folder()), str(store.place))
    report(Report(stage=f"{STAGE} {job.stage}", doing="make or load the model"))
    made = make_student(job, store, tokenizer, report)
    model = made.model
    model.to(best_device())
    isolation = student_isolation(model, store, where, report)
    head = connect_head(model, manifest.tokenizer.size, report)
    report(Report(stage=f"{STAGE} {job.stage}", doing="find the tokens that end texts"))
    ends = store_ends(store, tokenizer)
    judged = supports(taught.terms, taught.captures, manifest.tokenizer.size)
    begin = _beginning(job, made, judged, report)
    adapters = None if job.lora is None else adapt(model, job.lora, job.seed, f"{where}.lora")
    learned = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    train(
        TrainingJob(
            stage=f"{STAGE} {job.stage}",
            head=head,
            dataset=StoreDataset(*taught.stores),
            isolation=isolation,
            capture=manifest.capture,
            terms=taught.terms,
            config=job.config,
            sequence_length=manifest.packing.sequence_length,
            seed=job.seed,
            folder=job.folder,
            begin=begin,
            settings=job.settings,
        ),
        report,
    )
    if adapters is not None:
        merge(adapters)
    report(Report(stage=f"{STAGE} {job.stage}", doing="save the model"))
    report_ends(model, tokenizer, ends, f"{STAGE} {job.stage}", report)
    _save(job, model, with_end(tokenizer, ends.tokens))
    size = f"{model.num_parameters():,} parameters"
    merged = f"{learned:,} adapter weights trained and merged into {size}"
    note = f"{size} trained" if job.lora is None else merged
    report(Report(stage=f"{STAGE} {job.stage}", note=note))


def _save(job: StudentJob, model: Any, tokenizer: Any) -> None:
    folder = job.model_folder
    if rank() == 0:
        job.delete_rounds()  # before the model exists: a later run would not delete them
        with whole_folder(folder) as scratch, full_disk_errors(folder):
            with asking("transformers", "save the student", where=str(folder)):
                model.save_pretrained(scratch)
            tokenizer.save_pretrained(scratch)
        shutil.rmtree(job.start, ignore_errors=True)
    wait_for_all()  # the next step reads the model


def _beginning(
    job: StudentJob, made: NewStudent, judged: str, report: Reporter
) -> Callable[[], None]:
    """Make the function that training calls before its first step. Must be called before adapters
    and the trainer change the model."""
    model = made.model
    config = copy.deepcopy(model.config)
    weights = model.state_dict() if job.is_of_the_teacher else None

    def begin() -> None:
        job.begin()
        if weights is not None and not job.start.is_dir() and rank() == 0:
            with _unchanged(model, config):
                made.save(job, weights)
        if judged:
            report(Report(stage=f"{STAGE} {job.stage}", note=f"{judged} with this record"))

    return begin


@contextlib.contextmanager
def _unchanged(model: Any, config: Any) -> Iterator[None]:
    """Restore the configuration and the frozen weights, which adapters exclude from saving."""
    now = model.config, model._keys_to_ignore_on_save
    model.config, model._keys_to_ignore_on_save = config, type(model)._keys_to_ignore_on_save
    try:
        yield
    finally:
        model.config, model._keys_to_ignore_on_save = now
