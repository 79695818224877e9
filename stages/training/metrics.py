"""Training metrics: one line of metrics.jsonl per log step, and progress reports.

Every metric covers all micro-batches and processes. Sums are accumulated and divided once, so that
no metric is a mean of means.
"""

from __future__ import annotations

import json
import time
from dataclasses import KW_ONLY, dataclass
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
"""Metrics that have no meaning without a head."""
_COUNTS = ("positions", "tokens")
_CLOCKS = ("seconds", "seconds_waiting", "processes")


@dataclass(eq=False)
class Metrics(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Accumulates the sums of the loss, writes one line per log step, and reports progress."""

    path: Path
    _: KW_ONLY
    stage: str
    steps: int
    step_tokens: int
    """Tokens of a step, for reports."""
    has_head: bool
    """Whether the targets have a head."""
    report: Reporter

    def __post_init__(self) -> None:
        self._sums: dict[str, Any] = {}
        self._waiting = 0.0
        self._since = time.perf_counter()
        self._shown: dict[str, float] = {}

    def add(self, loss: torch.Tensor, sums: dict[str, torch.Tensor], batch: Batch) -> None:
        """Add one micro-batch.

        loss  the objective, summed over positions
        sums  its parts, summed over positions
        """
        added = {
            "loss": loss.detach().double(),
            **sums,
            "positions": len(batch.targets),
            "tokens": batch.text_tokens,
        }
        for name, value in added.items():
            self._sums[name] = self._sums.get(name, 0.0) + value

    def waited(self, seconds: float) -> None:
        """Add time that was spent waiting for data."""
        self._waiting += seconds

    def take(self) -> dict[str, float]:
        """Means per position since the last call, tokens per second, and the share of time spent
        waiting for data. All processes must call this together."""
        now = time.perf_counter()
        clocks = dict(zip(_CLOCKS, (now - self._since, self._waiting, 1.0), strict=True))
        sums = _total(self._sums | clocks)
        self._sums, self._waiting, self._since = {}, 0.0, now
        # a step may have no supervised position
        positions = max(1.0, sums["positions"])
        means = {
            name: value / positions
            for name, value in sums.items()
            if name not in (*_COUNTS, *_CLOCKS) and (self.has_head or name not in _OF_A_HEAD)
        }
        seconds = max(1e-9, sums["seconds"])
        # seconds are summed over processes like tokens, but pass in parallel
        means["tokens_per_second"] = sums["tokens"] / seconds * sums["processes"]
        means["data_wait"] = sums["seconds_waiting"] / seconds
        return means

    def open_interval(self) -> dict[str, float]:
        """Sums since the last line, for a checkpoint. All processes must call this together."""
        return _total(self._sums) if self._sums else {}

    def resume(self, step: int, measured: dict[str, float]) -> None:
        """Resume from a checkpoint: take its sums, and drop later lines, which are written again.

        Only the first process takes the sums, since they cover all processes.
        """
        if rank() != 0:
            return
        self._sums = dict(measured)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.path.exists():
            return
        lines = self.path.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
        with whole_file(self.path) as scratch:
            scratch.write_text("".join(line + "\n" for line in kept), encoding="utf-8")

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock and report the first step, which is above 0 after a resumption."""
        self._since, self._waiting = time.perf_counter(), 0.0
        self._report_steps(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._report_steps(state.global_step, self.step_tokens)

    def _report_steps(self, steps: int, new: int = 0) -> None:
        done, total = steps * self.step_tokens, self.steps * self.step_tokens
        self.report(Report(stage=self.stage, done=done, total=total, step=new, figures=self._shown))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if not logs or "loss" not in logs or not state.is_world_process_zero:
            return
        self._shown = {"loss": logs["loss"], "step": state.global_step}
        line = {"step": state.global_step, **logs}
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")


def _total(sums: dict[str, Any]) -> dict[str, float]:
    """Sums over all processes, which must have the same names."""
    device = next((v.device for v in sums.values() if isinstance(v, torch.Tensor)), None)
    names = sorted(sums)
    own = [torch.as_tensor(sums[name], dtype=torch.float64, device=device) for name in names]
    return dict(zip(names, sum_over_all(torch.stack(own)).tolist(), strict=True))
