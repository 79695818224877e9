"""The training loop of teachers and students: `transformers.Trainer` with our loss and order.

The Trainer brings mixed precision, accumulation, schedules, distributed training, checkpoints. Ours
are the order (a pure function of seed and epoch), the normalisation (a sum over positions divided
by their count over all micro-batches and ranks) and the measurements.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from ..data.errors import ColdstillError
from ..data.files import whole_file, write_json
from .feed import Collate, EpochSampler
from .objective import attach_objective
from .report import Report, Reporter, silent

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from ..data.schema import Capture
    from .chunked_loss import Term
    from .config import TrainConfig
    from .feed import CorpusDataset, StoreDataset
    from .isolation import Isolation
    from .mixture import MixedDataset
    from .output_head import OutputHead

_FREE = {"report_to", "save_total_limit", "save_strategy", "dataloader_pin_memory", "use_cpu"}
"""Trainer arguments that have a value here and may be given another."""
_WHOLE = "whole.json"
"""Written into a checkpoint after everything else: without it, the checkpoint was cut short."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingJob:
    """Everything one training run needs."""

    stage: str
    """For reports."""
    head: OutputHead
    """The model, split at its head."""
    dataset: CorpusDataset | StoreDataset | MixedDataset
    isolation: Isolation
    capture: Capture
    """Of the record that figures are of,"""
    others: Sequence[Capture] = ()
    """and of further teachers' records."""
    terms: Sequence[Term]
    config: TrainConfig
    sequence_length: int
    seed: int
    folder: Path
    """Where `checkpoints/` and `metrics.jsonl` go."""
    begin: Callable[[], None] = lambda: None
    """Called once, when everything is checked and nothing is written yet."""


def train(job: TrainingJob, report: Reporter = silent) -> None:
    """Train the job's model in place; go on from the last whole checkpoint if there is one.

    Raises
        ColdstillError: settings the trainer refuses, or a loss that is no number
    """
    checkpoints = job.folder / "checkpoints"
    last = last_whole_checkpoint(checkpoints)
    arguments = _arguments(job, checkpoints)
    attach_objective(job.head, job.terms, job.capture, job.others)
    metrics = _Metrics(job, report)
    try:
        trainer = _Trainer(
            model=job.head.model,
            args=arguments,
            train_dataset=job.dataset,
            data_collator=Collate(job.isolation, job.head.model.dtype, job.capture),
            callbacks=[metrics],
        )
    except (ValueError, RuntimeError, ImportError) as error:
        raise _refusal(job, error) from error
    job.begin()
    metrics.keep_until(0 if last is None else _step_of(last))
    trainer.metrics = metrics
    trainer.sampler_seed = job.seed
    trainer.remove_callback(PrinterCallback)
    if last is not None:
        report(Report(stage=job.stage, note=f"going on from step {_step_of(last)}"))
    try:
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
    finally:
        # the model leaves as it came: without the objective, and ready to be asked
        del job.head.model.forward
        job.head.model.eval()


def last_whole_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end."""
    whole = [path.parent for path in folder.glob(f"checkpoint-*/{_WHOLE}")]
    return max(whole, key=_step_of, default=None)


def sequences_per_step(config: TrainConfig, sequence_length: int) -> int:
    """How many sequences an optimiser step sees."""
    return max(1, config.batch_tokens // sequence_length)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rsplit("-", 1)[1])


def _arguments(job: TrainingJob, checkpoints: Path) -> TrainingArguments:
    config = job.config
    batch = sequences_per_step(config, job.sequence_length)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    micro = batch // world
    if config.micro_batch_tokens is not None:
        micro = min(micro, max(1, config.micro_batch_tokens // job.sequence_length))
    if micro == 0 or batch % (micro * world):
        raise ColdstillError(
            f"{job.stage}: a step of {batch} sequences cannot be shared out as {micro} per forward "
            f"pass on {world} processes; choose batch_tokens and micro_batch_tokens that divide"
        )
    settings: dict[str, Any] = {
        "output_dir": str(checkpoints),
        "max_steps": config.steps,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": batch // (micro * world),
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": "constant_with_warmup"
        if config.schedule == "constant"
        else config.schedule,
        "warmup_steps": round(config.warmup * config.steps),
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.gradient_clip,
        "bf16": config.precision == "bf16",
        "fp16": config.precision == "fp16",
        "logging_steps": config.log_every,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,
        "save_strategy": "steps",
        # a checkpoint in the middle of a log interval would lose what was measured in it
        "save_steps": -(-config.checkpoint_every // config.log_every) * config.log_every,
        "save_total_limit": 2,
        "seed": job.seed,
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "report_to": "none",
    }
    if ours := sorted((settings.keys() - _FREE) & config.trainer.keys()):
        raise ColdstillError(
            f"{job.stage}: train.trainer: {ours[0]!r} follows from the keys of train itself "
            "(steps, batch_tokens, learning_rate and so on); set those"
        )
    try:
        return TrainingArguments(**(settings | config.trainer))
    except (TypeError, ValueError, ImportError) as error:
        raise _refusal(job, error) from error


def _refusal(job: TrainingJob, error: Exception) -> ColdstillError:
    reason = str(error).splitlines()[0].replace("TrainingArguments.__init__() ", "")
    return ColdstillError(f"{job.stage}: train.trainer: {reason.strip()}")


class _Trainer(Trainer):  # type: ignore[misc]  # transformers is untyped
    """`Trainer` with a sum for a loss, positions for its count, and the store's order."""

    metrics: _Metrics
    sampler_seed: int
    loss_is_scaled_for_ga = True

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochSampler:
        dataset = train_dataset if train_dataset is not None else self.train_dataset
        return EpochSampler(dataset, self.sampler_seed)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """Supervised positions over all micro-batches and ranks: what the sum is divided by."""
        count = torch.tensor(sum(len(batch["labels"]) for batch in batch_samples), device=device)
        if self.args.world_size > 1:
            count = self.accelerator.gather(count).sum()
        return count

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        output = model(**inputs)
        self.metrics.add(output["sums"], inputs)
        # data parallelism averages over ranks what should be added up
        loss = output["loss"] / num_items_in_batch * self.args.world_size
        if not torch.isfinite(loss):
            raise ColdstillError(
                f"{self.metrics.stage}: the loss is {loss.item()} after step "
                f"{self.state.global_step}; the last checkpoint is kept, lower the learning rate"
            )
        return (loss, output) if return_outputs else loss

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted: the estimate of transformers walks over every parameter at every step."""
        return 0

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        with full_disk_told(Path(self.args.output_dir)):
            super()._save_checkpoint(model, trial)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= self.metrics.take()
        super().log(logs, start_time)


class _Metrics(TrainerCallback):  # type: ignore[misc]  # likewise
    """Adds up what the loss measures; writes a line per log step; reports progress."""

    def __init__(self, job: TrainingJob, report: Reporter) -> None:
        self.stage = job.stage
        self._report, self._steps = report, job.config.steps
        self._step_tokens = (
            sequences_per_step(job.config, job.sequence_length) * job.sequence_length
        )
        self._has_head = job.capture.head > 0
        self._path = job.folder / "metrics.jsonl"
        self._sums: dict[str, torch.Tensor] | None = None
        self._positions = self._tokens = 0
        self._since = time.perf_counter()
        self._shown: dict[str, float] = {}

    def add(self, sums: dict[str, torch.Tensor], inputs: dict[str, Any]) -> None:
        """Take one micro-batch."""
        old = self._sums
        self._sums = sums if old is None else {name: old[name] + sums[name] for name in sums}
        self._positions += len(inputs["labels"])
        self._tokens += inputs["input_ids"].numel()

    def take(self) -> dict[str, float]:
        """Means per position since the last time, and tokens per second."""
        assert self._sums is not None
        means = {name: float(value) / self._positions for name, value in self._sums.items()}
        if not self._has_head:
            for name in ("teacher_mass", "student_mass", "agreement"):
                del means[name]
        now = time.perf_counter()
        means["tokens_per_second"] = self._tokens / max(1e-9, now - self._since)
        self._sums, self._positions, self._tokens, self._since = None, 0, 0, now
        return means

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._since = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._report(
            Report(
                stage=self.stage,
                done=state.global_step * self._step_tokens,
                total=self._steps * self._step_tokens,
                step=self._step_tokens,
                figures=self._shown,
            )
        )

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if not logs or "loss" not in logs or not state.is_world_process_zero:
            return
        self._shown = {"loss": logs["loss"], "step": state.global_step}
        line = {"step": state.global_step, **logs}
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            write_json(folder / _WHOLE, {"step": state.global_step})

    def keep_until(self, step: int) -> None:
        """Drop the lines that a resumed run is about to write again."""
        if not self._path.exists():
            self._path.parent.mkdir(parents=True, exist_ok=True)
            return
        lines = self._path.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
        with whole_file(self._path) as scratch:
            scratch.write_text("".join(line + "\n" for line in kept), encoding="utf-8")


@contextlib.contextmanager
def full_disk_told(folder: Path) -> Iterator[None]:
    """torch and safetensors have errors of their own for a disk that takes no more.

    Raises
        ColdstillError: something could not be saved
    """
    try:
        yield
    except (RuntimeError, SafetensorError) as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # torch trips over what Ctrl-C left
            raise error.__context__ from None
        reason = str(error).splitlines()[0]
        raise ColdstillError(
            f"{folder}: cannot be written, most likely the disk is full ({reason}); what was "
            "finished is kept, free some space and run the same command again"
        ) from error


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The lines of a run's `metrics.jsonl`."""
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
