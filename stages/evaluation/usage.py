"""Cost of running a model: operations, generation speed and memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from pydantic import TypeAdapter, ValidationError
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ...data.errors import first_line
from ..models.loading import context_length
from ..report import Report
from .speed import BATCHES, GenerationSpeed, generation_speeds

if TYPE_CHECKING:
    from collections.abc import Callable

    from ...data.schema import Sequences

_SHORT = 16


@torch.no_grad()
def flops_per_token(model: Any, length: int) -> int:
    """Floating point operations per token of a forward pass over `length` tokens, with logits.

    A multiply-add counts as two operations. torch counts the matrix products that the model
    computes, so no family needs its own formula. Attention counts both halves, also the one that
    the causal mask removes, as in kernels that do not skip blocks.

    Every product grows linearly or quadratically with the length. So three short sequences give the
    count for any length, without the attention matrices of a long sequence in memory.
    """
    lengths = [_SHORT, 2 * _SHORT, 3 * _SHORT]
    if length <= lengths[-1]:
        return _counted(model, length) // length
    one, two, three = (_counted(model, short) for short in lengths)
    # quadratic through three equidistant points (Newton's forward differences)
    steps = Fraction(length, _SHORT) - 1
    total = one + steps * (two - one) + steps * (steps - 1) / 2 * (three - 2 * two + one)
    return int(total) // length


def _counted(model: Any, length: int) -> int:
    tokens = torch.zeros((1, length), dtype=torch.long, device=model.device)
    # fused kernels hide their matrix products from the counter
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(input_ids=tokens, use_cache=False)
    return int(counter.get_total_flops())


T = TypeVar("T")

SEQUENCES = max(BATCHES)
"""Number of held-out sequences to measure on: the same for teacher, students and exports."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Measured costs of a model."""

    flops_per_token: int | None = None
    generation: tuple[GenerationSpeed, ...] = ()

    @classmethod
    def of(cls, record: Any) -> Usage:
        """The costs that a store records; empty if they are missing or unreadable.

        Measurements are not part of a store's data, so unreadable ones are not an error.
        """
        try:
            return _USAGE.validate_python(record or {})
        except ValidationError:
            return cls()


_USAGE = TypeAdapter(Usage)


def longest_asked(model: Any, sequence_length: int) -> int:
    """Longest input in tokens that a model gets."""
    return min(context_length(model.config) or sequence_length, sequence_length)


def measure_usage(
    model: Any,
    sequences: Sequences,
    sequence_length: int,
    warn: Callable[[str], None],
    *,
    seconds: float = math.inf,
    measured: Callable[[int], None] = lambda batches: None,
) -> Usage:
    """Measure a transformers model. A measurement that fails is left out.

    sequences  the first `SEQUENCES` of the held-out store
    warn       is called with the reason of a failed measurement: another kind of model, too little
               memory
    seconds    time limit of the generation speed
    measured   is called with the number of measured batch sizes
    """
    longest = longest_asked(model, sequence_length)
    operations = _tried(lambda: flops_per_token(model, longest), "arithmetic", warn)
    speeds = _tried(
        lambda: generation_speeds(model, sequences, longest, seconds, measured), "generation", warn
    )
    return Usage(flops_per_token=operations, generation=tuple(speeds or ()))


def writing_progress(stage: str, done: int) -> Report:
    """Progress of measuring the generation speed."""
    return Report(stage=f"{stage} speed", done=done, total=len(BATCHES), unit="batch sizes")


def _tried(measure: Callable[[], T], what: str, warn: Callable[[str], None]) -> T | None:
    try:
        return measure()
    except Exception as error:  # other kinds of models raise any exception
        warn(f"{what} could not be measured: {first_line(error)}")
        return None
