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
import itertools
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from ...data.errors import ColdstillError, DivergedError, StoppedError, first_line
from ..interruption import Interruption
from ..models.inputs import attention_windows
from ..ranks import gather_from_all, lost_process_errors, rank, sum_over_all, wait_for_all
from ..report import Report, Reporter, silent
from .arguments import step_shape, taking, training_arguments
from .batch import collate
from .checkpoints import (
    CheckpointState,
    checkpoint_state,
    declare_whole,
    drop_cut_short,
    expect_own,
    expect_own_tensors,
    full_disk_errors,
    last_whole_checkpoint,
)
from .execution import keep_inputs_exact, running_blocks, shard_on_cpu, whole_afterwards
from .feed import StepBatches
from .metrics import Metrics
from .objective import CurrentStep, attach_objective
from .rehearsal import expect_parts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from transformers import TrainingArguments

    from ...data.schema import Capture
    from ..config import TrainConfig
    from ..models.inputs import Isolation
    from ..models.output_head import OutputHead
    from .batch import Batch
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
    """The capture of the first teacher's targets."""
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
    callbacks: Sequence[TrainerCallback] = ()
    """Further callbacks of the Trainer."""


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
            report(Report(stage=job.stage, note=f"resuming from step {state.step}"))
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
            f"{stage}: the trainer cannot continue: {first_line(error)}; {_REMEDY}"
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
            job,
            arguments,
            StepBatches(job.dataset, job.seed, shape, rank=rank(), steps=config.steps),
            Metrics(
                job.folder / "metrics.jsonl",
                stage=job.stage,
                steps=config.steps,
                step_tokens=shape.sequences * job.sequence_length,
                has_head=job.capture.head > 0,
                report=report,
            ),
            asked,
        )
    for callback in (current, *job.callbacks):
        trainer.add_callback(callback)
    return trainer


_NAMED = 5
"""Sequences that a message names."""


class StoreTrainer(Trainer):  # type: ignore[misc]  # transformers is untyped
    """Divides summed losses by positions, follows the store's order, and stops on a NaN or infinite
    loss or gradient.

    If `asked` returns True, it finishes the step, saves a checkpoint and sets `stopped`. All
    processes agree on this, since they save together.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        job: TrainingJob,
        arguments: TrainingArguments,
        batches: StepBatches,
        metrics: Metrics,
        asked: Callable[[], bool],
    ) -> None:
        """Check the arguments. Nothing is written.

        Raises
            ValueError, RuntimeError, ImportError: transformers refuses them
        """
        self.stopped = False
        self._job, self._batches, self._metrics, self._asked = job, batches, metrics, asked
        self._losses: list[tuple[torch.Tensor, tuple[int, ...]]] = []
        model = job.head.model
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=job.dataset,
            data_collator=functools.partial(
                collate,
                isolation=job.isolation,
                dtype=model.dtype,
                branches=any(term.loss.beside_text for term in job.terms),
                windows=attention_windows(model.config),
            ),
            callbacks=[_Steps(self, len(job.dataset)), metrics],
        )
        self.remove_callback(PrinterCallback)

    def resume(self, state: CheckpointState) -> None:
        self._batches.resume(state.step, state.place)
        self._metrics.resume(state.step, state.measured)

    def create_accelerator_and_postprocess(self) -> None:
        """Shard the weights if the arguments ask for it, also on CPUs."""
        super().create_accelerator_and_postprocess()
        if self.args.fsdp and self.args.world_size > 1:
            shard_on_cpu(self.accelerator, self.args.fsdp_plugin_args)
            keep_inputs_exact(self.accelerator)
            self.is_fsdp_enabled = True

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The batches of this process. accelerate does not divide them: it would fill the last
        batches of an epoch with sequences that were already used."""
        return DataLoader(
            self.train_dataset,
            batch_sampler=self._batches,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            multiprocessing_context=self.args.dataloader_multiprocessing_context,
            pin_memory=self.args.dataloader_pin_memory,
            # without its own generator, the loader would change the random numbers of dropout
            generator=torch.Generator(),
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor]:
        """The micro-batches of a step, and the number of positions of all processes in this step,
        by which the sum of losses is divided."""
        began = time.perf_counter()
        try:
            batches = list(itertools.islice(epoch_iterator, num_batches))
        except ColdstillError as error:
            raise _without_traceback(error) from error
        self._metrics.waited(time.perf_counter() - began)
        count = torch.tensor(sum(len(batch.targets) for batch in batches), device=device)
        return batches, sum_over_all(count).clamp(min=1)

    def _prepare_inputs(self, batch: Batch) -> Batch:
        """Move a batch to the device. The Trainer's own method expects a dict of tensors; this is
        the only place that adapts."""
        return batch.to(self.args.device, non_blocking=self.args.dataloader_pin_memory)

    def compute_loss(
        self,
        model: Any,
        batch: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The part of the step's mean loss that one micro-batch contributes."""
        output = model(batch)
        self._metrics.add(output["loss"], output["sums"], batch)
        self._losses.append((output["loss"].detach(), batch.sequence_ids))
        # data parallelism averages over processes, but the parts must be summed
        loss = output["loss"] / num_items_in_batch * self.args.world_size
        return (loss, output) if return_outputs else loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """The norm of the gradient.

        Also checks that the losses of all processes are finite, and sets `stopped` if any process
        was asked to stop.
        """
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        losses, self._losses = self._losses, []
        total = torch.stack([loss.double() for loss, _ in losses]).sum()
        seen = torch.stack([total, total.new_tensor(float(self._asked()))])
        loss, asked = sum_over_all(seen).tolist()
        self.stopped = asked > 0
        if not math.isfinite(loss):
            self._refuse_step(f"the loss is {loss}", losses)
        # in fp16 the scaler handles such a gradient: it lowers the scale and skips the step
        if norm is not None and not self.args.fp16 and not math.isfinite(float(norm)):
            self._refuse_step(f"the norm of the gradient is {float(norm)}", losses)
        return norm

    def _refuse_step(self, what: str, losses: list[tuple[torch.Tensor, tuple[int, ...]]]) -> None:
        wrong = [ids for loss, ids in losses if not loss.isfinite()]
        gathered = gather_from_all([int(i) for ids in wrong for i in ids])
        if not gathered:
            gathered = gather_from_all([int(i) for _, ids in losses for i in ids])
        if rank() != 0:  # one process reports
            raise StoppedError
        named = ", ".join(map(str, gathered[:_NAMED]))
        more = f" and {len(gathered) - _NAMED} more" if len(gathered) > _NAMED else ""
        last = last_whole_checkpoint(Path(self.args.output_dir))
        kept = "no checkpoint was written yet" if last is None else f"{last} is kept"
        raise DivergedError(
            f"{self._job.stage}: step {self.state.global_step + 1}: {what}, in a batch with the "
            f"sequences {named}{more}; the step was not applied, {kept}; train under a new name "
            "with a lower learning_rate, or check these sequences for errors"
        )

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Always 0: the estimate of transformers visits every parameter in every step."""
        return 0

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Refuse a checkpoint with missing or unknown tensors, which the Trainer would only log."""
        expect_own_tensors(
            self.model, load_result.missing_keys, load_result.unexpected_keys, self._job.stage
        )
        super()._issue_warnings_after_load(load_result)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self._metrics.report(Report(stage=self._job.stage, doing="save a checkpoint"))
        with full_disk_errors(Path(self.args.output_dir)):
            super()._save_checkpoint(model, trial)
        step = self.state.global_step
        state = CheckpointState(
            step=step,
            place=self._batches.position_after(step),
            measured=self._metrics.open_interval(),
            settings=self._job.settings,
        )
        wait_for_all()  # every process writes a part of the checkpoint
        if rank() == 0:
            declare_whole(Path(self.args.output_dir) / f"checkpoint-{step}", state)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Replace the Trainer's own mean loss by exact metrics."""
        if "loss" in logs:
            logs |= self._metrics.take()
        super().log(logs, start_time)


class _Steps(TrainerCallback):  # type: ignore[misc]  # likewise
    """Sets the epoch and the stop flag of the Trainer after every step."""

    def __init__(self, trainer: StoreTrainer, sequences: int) -> None:
        self._trainer, self._sequences = trainer, sequences

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        place = self._trainer._batches.position_after(state.global_step)
        state.epoch = place.epoch + place.sequences / self._sequences
        if self._trainer.stopped:
            control.should_save = control.should_training_stop = True


def _without_traceback(error: ColdstillError) -> ColdstillError:
    """The error of a data loader's process without the traceback that torch puts into its text."""
    text = str(error)
    if "\n" not in text:
        return error
    return type(error)(text.strip().splitlines()[-1].partition(": ")[2])
