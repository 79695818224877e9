"""Weights that change over training.

A weight is a pure function of the step and of how many there are: a run that was killed goes on
with the weights it would have had, and processes that train together agree without a word.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

if TYPE_CHECKING:
    from ..config import WeightConfig


def weight_at(weight: WeightConfig, step: int, steps: int) -> float:
    """What a weight is in one step.

    step   counted from 0
    steps  of the whole training

    `linear` is `start` in the first step and `weight` in the last. `wsd` (warm-up, stable, decay;
    as a weight: arXiv 2410.16215) is `start` in the first and `weight` after ceil(warmup * steps)
    of them, stays, and comes to `end` in the last, the ceil(decay * steps)-th of its way down.
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
    """Steps in a share of them; a product that is off by its rounding is no step more."""
    return math.ceil(share * steps - 1e-9)


class CurrentStep(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """The number of the current step. The Trainer sets it before each step."""

    def __init__(self, steps: int) -> None:
        """Start before the first of `steps` steps."""
        self.step, self.steps = 0, steps

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Take the step from the Trainer, which knows it after a resumption too."""
        self.step = state.global_step
