"""The training loop of teachers and students: `transformers.Trainer` with our loss and order.

The Trainer provides mixed precision, gradient accumulation, schedules, distributed training and
checkpoints. This project adds the order (a pure function of seed and epoch), the normalisation (the
sum over positions divided by their count over all micro-batches and ranks), the metrics, and the
mark of a complete checkpoint.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...data.errors import ColdstillError, StoppedError
from ..interruption import Interruption
from ..libraries import first_line
from ..ranks import lost_process_errors, rank
from ..report import Report, Reporter, silent
from .arguments import sequences_per_step, step_shape, taking, training_arguments
from .batch import collate
from .blocks import running_blocks
from .checkpoints import (
    checkpoint_state,
    drop_cut_short,
    expect_own,
    full_disk_errors,
    last_whole_checkpoint,
)
from .feed import StepBatches
from .metrics import Metrics, read_metrics
from .objective import attach_objective
from .rehearsal import expect_parts
from .schedule import CurrentStep
from .sharding import whole_afterwards
from .trainer import StoreTrainer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from ...data.schema import Capture
    from ..config import TrainConfig
    from ..models.isolation import Isolation
    from ..models.output_head import OutputHead
    from .chunked_loss import Term
    from .feed import Trainable

_REMEDY = (
    "lower train.micro_batch_tokens if memory is short; otherwise choose another model or other "
    "settings of train"
)
_OF_LIBRARIES = (
    ArithmeticError, AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError,
)  # fmt: skip
"""Errors that libraries raise. A full disk, a signal and our own errors have other types."""

__all__ = [
    "TrainingJob", "full_disk_errors", "last_whole_checkpoint", "read_metrics",
    "sequences_per_step", "train",
]  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingJob:
    """Everything that one training needs."""

    stage: str
    """Name of the stage, for reports."""
    head: OutputHead
    """The model, split at its output head."""
    dataset: Trainable
    isolation: Isolation
    capture: Capture
    """What the targets of the first teacher hold."""
    terms: Sequence[Term]
    config: TrainConfig
    sequence_length: int
    seed: int
    folder: Path
    """The folder of `checkpoints/` and `metrics.jsonl`."""
    begin: Callable[[], None] = lambda: None
    """Called once by the first process, after all checks and before anything is written."""
    settings: dict[str, Any] | None = None
    """All settings that decide the result, as JSON. Every checkpoint records them, and a checkpoint
    with other settings is refused."""


def train(job: TrainingJob, report: Reporter = silent) -> None:
    """Train the job's model in place. Resume from the last complete checkpoint, if one exists.

    All processes of `torchrun` take their part of every step; the first process writes.

    Raises
        ColdstillError: settings that the Trainer refuses, a checkpoint of another training, or a
            NaN or infinite loss
        StoppedError: stopped by SIGTERM; a checkpoint is saved
    """
    interruption = Interruption()
    with interruption.listening(), interruption.postponed():
        _train(job, report, lambda: interruption.asked)


def _train(job: TrainingJob, report: Reporter, asked: Callable[[], bool]) -> None:
    checkpoints = job.folder / "checkpoints"
    last = last_whole_checkpoint(checkpoints)
    state = checkpoint_state(last)
    if last is not None and job.settings is not None:
        expect_own(last, job.settings)
    model = job.head.model
    with contextlib.ExitStack() as held:
        held.callback(model.eval)  # the mode in which models are loaded
        # undoes sharding after the Trainer has released the model
        trainer = _make_trainer(job, checkpoints, report, asked, held)
        if rank() == 0:
            job.begin()
            drop_cut_short(checkpoints)
        trainer.resume(state)
        if last is not None:
            report(Report(stage=job.stage, note=f"going on from step {state.step}"))
        with _library_errors(job.stage), lost_process_errors(job.stage):
            trainer.train(resume_from_checkpoint=None if last is None else str(last))
            # schedule-free optimisers train other weights than the final ones
            trainer.optimizer.eval()
    if trainer.stopped:
        raise StoppedError


@contextlib.contextmanager
def _library_errors(stage: str) -> Iterator[None]:
    """Turn errors of the Trainer or the model during a step into one line."""
    try:
        yield
    except _OF_LIBRARIES as error:
        raise ColdstillError(
            f"{stage}: the trainer cannot go on: {first_line(error)}; {_REMEDY}"
        ) from error


def _make_trainer(
    job: TrainingJob,
    checkpoints: Path,
    report: Reporter,
    asked: Callable[[], bool],
    held: contextlib.ExitStack,
) -> StoreTrainer:
    """The Trainer. `held` gets the callbacks that undo its changes to the model."""
    config, model = job.config, job.head.model
    if len(job.dataset) == 0:
        raise ColdstillError(f"{job.stage}: there is no sequence to learn from")
    shape = step_shape(config, job.sequence_length, job.stage)
    arguments = training_arguments(config, shape, job.seed, checkpoints, job.stage)
    expect_parts(arguments, model, config.trainer, job.stage)  # before the Trainer creates a folder
    # the Trainer changes the configuration, for example `use_cache = False`
    held.callback(setattr, model, "config", copy.deepcopy(model.config))
    held.enter_context(whole_afterwards(model))
    held.enter_context(running_blocks(model, config, f"{job.stage}: train"))
    current = CurrentStep(config.steps)
    attach_objective(job.head, job.terms, current)
    held.callback(vars(model).pop, "forward", None)
    # accelerate sets it, which would affect later trainings in this process
    held.callback(os.environ.pop, "ACCELERATE_USE_FSDP", None)
    with taking(job.stage):
        trainer = StoreTrainer(
            model,
            arguments,
            stage=job.stage,
            dataset=job.dataset,
            collate=functools.partial(collate, isolation=job.isolation, dtype=model.dtype),
            batches=StepBatches(job.dataset, job.seed, shape, rank=rank(), steps=config.steps),
            metrics=Metrics(
                job.folder / "metrics.jsonl",
                stage=job.stage,
                steps=config.steps,
                step_tokens=shape.sequences * job.sequence_length,
                has_head=job.capture.head > 0,
                report=report,
            ),
            settings=job.settings,
            asked=asked,
        )
    trainer.add_callback(current)
    return trainer
