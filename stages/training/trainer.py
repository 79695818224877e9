"""`transformers.Trainer` with our loss and order, and a check before every step."""

from __future__ import annotations

import itertools
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from ...data.errors import ColdstillError, DivergedError, StoppedError
from ..ranks import gather_from_all, rank, sum_over_all, wait_for_all
from .checkpoints import (
    CheckpointState,
    declare_whole,
    expect_own_tensors,
    full_disk_errors,
    last_whole_checkpoint,
)
from .sharding import keep_inputs_exact, shard_on_cpu

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from transformers import TrainingArguments

    from .batch import Batch, Rows
    from .feed import StepBatches, Trainable
    from .metrics import Metrics

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
        model: Any,
        arguments: TrainingArguments,
        *,
        stage: str,
        dataset: Trainable,
        collate: Callable[[Rows], Batch],
        batches: StepBatches,
        metrics: Metrics,
        settings: dict[str, Any] | None,
        asked: Callable[[], bool],
    ) -> None:
        """Check the arguments. Nothing is written.

        Raises
            ValueError, RuntimeError, ImportError: transformers refuses them
        """
        self.stopped = False
        self._stage, self._batches, self._metrics, self._asked = stage, batches, metrics, asked
        self._settings = settings
        self._losses: list[tuple[torch.Tensor, tuple[int, ...]]] = []
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=dataset,
            data_collator=collate,
            callbacks=[_Steps(self, len(dataset)), metrics],
        )
        self.remove_callback(PrinterCallback)

    def resume(self, state: CheckpointState) -> None:
        """Resume from the state of a checkpoint."""
        self._batches.resume(state.step, state.place)
        self._metrics.resume(state.step, state.measured)

    def create_accelerator_and_postprocess(self) -> None:
        """Shard the weights if the arguments say so, also on CPUs."""
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
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self._check_step(norm)
        return norm

    def _check_step(self, norm: Any) -> None:
        """Check that the losses of all processes are finite, and whether any process is to stop."""
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
            f"{self._stage}: step {self.state.global_step + 1}: {what}, in a batch with the "
            f"sequences {named}{more}; it was not taken, {kept}; train under a new name with a "
            "lower learning_rate, or check these sequences for errors"
        )

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Always 0: the estimate of transformers visits every parameter in every step."""
        return 0

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Refuse a checkpoint with missing or unknown tensors, which the Trainer would only log."""
        expect_own_tensors(
            self.model, load_result.missing_keys, load_result.unexpected_keys, self._stage
        )
        super()._issue_warnings_after_load(load_result)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self._metrics.saving()
        with full_disk_errors(Path(self.args.output_dir)):
            super()._save_checkpoint(model, trial)
        step = self.state.global_step
        state = CheckpointState(
            step=step,
            place=self._batches.position_after(step),
            measured=self._metrics.open_interval(),
            settings=self._settings,
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
