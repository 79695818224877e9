"""Loss weights that change over training.

A weight is a pure function of the step and the number of steps. A resumed run therefore has the
same weights, and processes that train together agree without communication.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

if TYPE_CHECKING:
    from ..config import WeightConfig


def weight_at(weight: WeightConfig, step: int, steps: int) -> float:
    """The value of a weight in one step.

    step   the step, counted from 0
    steps  steps of the whole training

    `linear` goes from `start` in the first step to `weight` in the last. `wsd` (warm-up, stable,
    decay; as a loss weight: arXiv 2410.16215) rises from `start` to `weight` in
    ceil(warmup * steps) steps, stays constant, and falls to `end` in the last ceil(decay * steps)
    steps.
    """
    if weight.schedule == "constant":
        return weight.weight
    if weight.schedule == "linear":
        return _between(weight.start, weight.weight, step / (steps - 1) if steps > 1 else 1.0)
    rising = _count(weight.warmup, steps)
    falling = min(_count(weight.decay, steps), steps - rising)
    if step < rising:
        return _between(weight.start, weight.weight, step / rising)
    if step >= steps - falling:
        return _between(weight.weight, weight.end, (step - (steps - falling) + 1) / falling)
    return weight.weight


def _between(first: float, last: float, part: float) -> float:
    return (1.0 - part) * first + part * last


def _count(share: float, steps: int) -> int:
    """Steps in a share of all steps, rounded up except for rounding errors of the product."""
    return math.ceil(share * steps - 1e-9)


class CurrentStep(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """The number of the current step. The Trainer sets it before each step."""

    def __init__(self, steps: int) -> None:
        """Start before the first of `steps` steps."""
        self.step, self.steps = 0, steps

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Take the step from the Trainer, which knows it after a resumption too."""
        self.step = state.global_step
