"""Stage two: prune and train a student from the store. Runs the teacher only to prune it."""

from __future__ import annotations

import contextlib
import copy
import shutil
from typing import TYPE_CHECKING, Any

from ..data.errors import ColdstillError
from ..data.files import read_json, whole_folder, write_json
from .export import unable
from .libraries import asking
from .models.branching import expect_branching
from .models.device import best_device
from .models.ends import report_ends, store_ends, with_end
from .models.grids import RECORD as GRID
from .models.grids import SCHEMES
from .models.isolation import student_isolation
from .models.loading import load_tokenizer
from .models.output_head import connect_head
from .ranks import rank, wait_for_all
from .report import Report, Reporter, silent
from .students.adapters import adapt, merge_adapters
from .students.job import PRUNING, NewStudent, StudentJob, make_student
from .students.lesson import lesson
from .targets.losses.chunks import ChunkLikelihood
from .targets.losses.forward_kl import ForwardKL
from .training.checkpoints import full_disk_errors
from .training.feed import MixedDataset, StoreDataset
from .training.loop import TrainingJob, train
from .training.objective import supports

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from ..data.store.reader import StoreReader
    from .students.few_bits import Rounding
    from .students.lesson import Lesson
    from .training.chunked_loss import Term
    from .training.feed import Trainable

STAGE, PRUNE = "train-student", "prune-student"
_MOST_AMBIGUOUS = 0.1
"""Share of the probability of ambiguous tokens above which there is a warning."""
_MOST_KNOWN = 0.99
"""Share of positions with a distribution below which an objective without labels is warned of."""


def train_student(job: StudentJob, store: StoreReader, report: Reporter = silent) -> None:
    """Train one student and write it to `folder/model`.

    A student with several cuts is trained after each of them.

    Raises
        ColdstillError: as `make_student`; an objective that the store does not support, a store
            without supervised positions, stores of different sequences, impossible adapters, layers
            that a format of few bits cannot hold, or a loss that is NaN or infinite
    """
    for each in job.remaining_rounds():
        if not each.model_folder.is_dir():
            _train_student(each, store, report)


def _train_student(job: StudentJob, store: StoreReader, report: Reporter) -> None:
    where, stage = f"students.{job.name}", f"{STAGE} {job.stage}"
    manifest = store.manifest
    taught = lesson(job, store)
    tokenizer = load_tokenizer(str(store.tokenizer_folder()), str(store.place))
    report(Report(stage=stage, doing="make or load the model"))
    made = make_student(job, store, tokenizer, report)
    model = made.model
    model.to(best_device())
    isolation = student_isolation(model, store, where, report)
    head = connect_head(model, manifest.tokenizer.size, report)
    if any(term.loss.beside_text for term in taught.terms):
        expect_branching(head, manifest.packing.sequence_length, f"{where}.objective")
    report(Report(stage=stage, doing="find the tokens that end texts"))
    ends = store_ends(store, tokenizer)
    judged = supports(taught.terms, taught.captures, manifest.tokenizer.size)
    if manifest.retokenized is not None:
        _report_chunks(taught.terms, store, stage, report)
    begin = _beginning(job, made, judged, report)
    adapters = None if job.lora is None else adapt(model, job.lora, job.seed, f"{where}.lora")
    rounding = _rounding(job, model, report)
    learned = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    train(
        TrainingJob(
            stage=stage,
            head=head,
            dataset=_dataset(job, taught),
            isolation=isolation,
            capture=manifest.capture,
            terms=taught.terms,
            config=job.config,
            sequence_length=manifest.packing.sequence_length,
            seed=job.seed,
            folder=job.folder,
            begin=begin,
            settings=job.settings,
            callbacks=() if rounding is None else (rounding,),
        ),
        report,
    )
    if adapters is not None:
        merge_adapters(adapters)
    report(Report(stage=stage, doing="save the model"))
    report_ends(model, tokenizer, ends, stage, report)
    grid = None if rounding is None else rounding.finish()
    _save(job, model, with_end(tokenizer, ends.tokens), grid)
    size = f"{model.num_parameters():,} parameters"
    merged = f"{learned:,} adapter weights trained and merged into {size}"
    note = f"{size} trained" if job.lora is None else merged
    report(Report(stage=stage, note=note))


def _dataset(job: StudentJob, taught: Lesson) -> Trainable:
    """What a student reads: the stores of its teachers, or one store and text of its own."""
    if job.training is None or job.training == 1:
        return StoreDataset(*taught.stores)
    return MixedDataset(taught.stores[0], job.own, job.own_share)


def _report_chunks(terms: Sequence[Term], store: StoreReader, stage: str, report: Reporter) -> None:
    """Report what a store with a student's tokens knows, and where nothing is learned."""
    commits = list(store.commits())
    made = store.manifest.retokenized
    known = 0 if made is None else made.positions
    share = min(1.0, known / max(1, sum(commit.positions for commit in commits)))
    note = f"the teacher's distribution is known at {share:.1%} of the positions"
    if share < 1.0 and any(isinstance(term.loss, ForwardKL) for term in terms):
        note += "; kl learns from an estimate at the others, which lie inside a chunk"
    mapped = [
        term for term in terms
        if term.loss.needs_targets and not isinstance(term.loss, ChunkLikelihood)
    ]  # fmt: skip
    if made is not None and not made.spelled_mass and any(t.loss.beside_text for t in terms):
        nothing = (
            "branches learns nothing: the student spells none of the teacher's words with several "
            "tokens"
        )
        report(Report(stage=stage, note=nothing, warning=True))
    ambiguous = 0.0 if made is None else made.ambiguous_mass / max(1, made.positions)
    if mapped and ambiguous > _MOST_AMBIGUOUS:
        warning = (
            f"{ambiguous:.0%} of the teacher's probability is of tokens that may begin a longer "
            f"token of the student, so {mapped[0].loss.name} may aim at tokens that do not occur; "
            "chunk_likelihood and cross_entropy do not depend on them"
        )
        report(Report(stage=stage, note=warning, warning=True))
    alone = not any(term.loss.inside_chunks for term in terms)
    if alone and share < 1.0:
        note += (
            "; nothing is learned at the others, which lie inside a chunk: add kl or cross_entropy "
            "to the objective"
        )
    report(Report(stage=stage, note=note, warning=alone and share < _MOST_KNOWN))


def _rounding(job: StudentJob, model: Any, report: Reporter) -> Rounding | None:
    """Make the layers round if the student is to have few bits."""
    if job.quantize is None:
        return None
    from .students.few_bits import round_layers  # imports torchao

    scheme, stage = job.quantize.scheme, f"{STAGE} {job.stage}"
    rounding = round_layers(model, job.quantize, job.config.steps, f"students.{job.name}")
    report(Report(stage=stage, note=f"{scheme}: {rounding.note()}"))
    kind, fitting = model.config.model_type, SCHEMES[scheme].formats
    if unable(kind, fitting) == list(fitting):
        note = (
            f"{scheme} is for {' and '.join(fitting)}, which cannot hold students of the family "
            f"{kind!r}: no export will have the rounded weights"
        )
        report(Report(stage=stage, note=note, warning=True))
    return rounding


def _save(job: StudentJob, model: Any, tokenizer: Any, grid: dict[str, Any] | None) -> None:
    """Write the model.

    grid  record of the grid that its weights lie on
    """
    folder = job.model_folder
    if rank() == 0:
        job.delete_rounds()  # before the model exists: a later run would not delete them
        with whole_folder(folder) as scratch, full_disk_errors(folder):
            with asking("transformers", "save the student", where=str(folder)):
                model.save_pretrained(scratch)
            tokenizer.save_pretrained(scratch)
            if grid is not None:
                write_json(scratch / GRID, grid)
        shutil.rmtree(job.start, ignore_errors=True)
    wait_for_all()  # the next step reads the model


def _beginning(
    job: StudentJob, made: NewStudent, judged: str, report: Reporter
) -> Callable[[], None]:
    """Make the function that training calls before its first step. Must be called before adapters
    and the trainer change the model."""
    model = made.model
    config = copy.deepcopy(model.config)
    weights = model.state_dict() if job.starts_from_teacher else None

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
        stage = f"{PRUNE} {each.stage}"
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
        report(Report(stage=f"{PRUNE} {job.name}", note=f"already trained: {job.model_folder}"))
    records = [each.folder / PRUNING for each in job.rounds()]
    return [read_json(record) for record in records if record.exists()]
