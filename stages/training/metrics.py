"""What training measures: a line of metrics.jsonl per log step, and reports of progress.

Every figure is over all micro-batches and processes: sums are added up and divided once, so none of
them is a mean of means.
"""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from ...data.files import whole_file
from ..ranks import rank, sum_over_all
from ..report import Report, Reporter

if TYPE_CHECKING:
    from pathlib import Path

    from .batch import Batch

_OF_A_HEAD = ("teacher_mass", "student_mass", "agreement")
"""Figures that mean nothing where the record has no head."""
_COUNTS = ("positions", "tokens")
_CLOCKS = ("seconds", "seconds_waiting", "processes")


class Metrics(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Adds up what the loss measures; writes a line per log step; reports progress."""

    def __init__(
        self,
        path: Path,
        *,
        stage: str,
        steps: int,
        step_tokens: int,
        has_head: bool,
        report: Reporter,
    ) -> None:
        """Begin with nothing measured.

        path         of metrics.jsonl
        step_tokens  what a step counts as in reports
        has_head     whether the record has one
        """
        self._path, self._stage, self._has_head = path, stage, has_head
        self._steps, self._step_tokens = steps, step_tokens
        self._report = report
        self._sums: dict[str, Any] = {}
        self._waiting = 0.0
        self._since = time.perf_counter()
        self._shown: dict[str, float] = {}

    def add(self, loss: torch.Tensor, sums: dict[str, torch.Tensor], batch: Batch) -> None:
        """Take one micro-batch.

        loss  the objective's sum over its positions, `sums` that of its parts
        """
        added = {
            "loss": loss.detach().double(),
            **sums,
            "positions": len(batch.targets),
            "tokens": batch.inputs["input_ids"].numel(),
        }
        for name, value in added.items():
            self._sums[name] = self._sums.get(name, 0.0) + value

    def waited(self, seconds: float) -> None:
        """Take the time in which nothing was done for want of data."""
        self._waiting += seconds

    def take(self) -> dict[str, float]:
        """Means per position since the last time, tokens per second, and the share of the time that
        was spent waiting for data. All processes call it at the same time."""
        now = time.perf_counter()
        clocks = dict(zip(_CLOCKS, (now - self._since, self._waiting, 1.0), strict=True))
        sums = _total(self._sums | clocks)
        self._sums, self._waiting, self._since = {}, 0.0, now
        # of a step whose sequences have no position, there is nothing to divide by
        positions = max(1.0, sums["positions"])
        means = {
            name: value / positions
            for name, value in sums.items()
            if name not in (*_COUNTS, *_CLOCKS) and (self._has_head or name not in _OF_A_HEAD)
        }
        seconds = max(1e-9, sums["seconds"])
        # seconds are added up over processes as tokens are, though they pass side by side
        means["tokens_per_second"] = sums["tokens"] / seconds * sums["processes"]
        means["data_wait"] = sums["seconds_waiting"] / seconds
        return means

    def open_interval(self) -> dict[str, float]:
        """Sums since the last line, for a checkpoint between two. All processes call it."""
        return _total(self._sums) if self._sums else {}

    def go_on(self, step: int, measured: dict[str, float]) -> None:
        """Begin after a checkpoint: with its sums, and without the lines that will be written
        again. Only one process adds the sums, which are everybody's."""
        if rank() != 0:
            return
        self._sums = dict(measured)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if not self._path.exists():
            return
        lines = self._path.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
        with whole_file(self._path) as scratch:
            scratch.write_text("".join(line + "\n" for line in kept), encoding="utf-8")

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock, and report where the training starts: after a checkpoint, not at 0."""
        self._since, self._waiting = time.perf_counter(), 0.0
        self._tell(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Report progress."""
        self._tell(state.global_step, self._step_tokens)

    def saving(self) -> None:
        """Report that a checkpoint is being saved."""
        self._report(Report(stage=self._stage, doing="save a checkpoint"))

    def _tell(self, steps: int, new: int = 0) -> None:
        self._report(
            Report(
                stage=self._stage,
                done=steps * self._step_tokens,
                total=self._steps * self._step_tokens,
                step=new,
                figures=self._shown,
            )
        )

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Write a line."""
        if not logs or "loss" not in logs or not state.is_world_process_zero:
            return
        self._shown = {"loss": logs["loss"], "step": state.global_step}
        line = {"step": state.global_step, **logs}
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")


def _total(sums: dict[str, Any]) -> dict[str, float]:
    """Over all processes, which must have the same names."""
    device = next((v.device for v in sums.values() if isinstance(v, torch.Tensor)), None)
    names = sorted(sums)
    own = [torch.as_tensor(sums[name], dtype=torch.float64, device=device) for name in names]
    return dict(zip(names, sum_over_all(torch.stack(own)).tolist(), strict=True))


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The lines of a run's `metrics.jsonl`."""
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
