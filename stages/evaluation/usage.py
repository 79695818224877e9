"""Cost of running a model: operations, generation speed and memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from ...data.errors import first_line
from ..models.loading import context_length
from ..report import Report
from .flops import flops_per_token
from .generation_speed import BATCHES, GenerationSpeed, generation_speeds

if TYPE_CHECKING:
    from collections.abc import Callable

    from ...data.schema import Sequences

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
        """From the measurements in a store; empty if they are missing or unreadable.

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
    tell: Callable[[str], None],
    *,
    seconds: float = math.inf,
    measured: Callable[[int], None] = lambda batches: None,
) -> Usage:
    """Measure a transformers model. A measurement that fails is left out.

    sequences  the first `SEQUENCES` of the held-out store
    tell       is called with the reason of a failed measurement: another kind of model, too little
               memory
    seconds    time limit of the generation speed
    measured   is called with the number of measured batch sizes
    """
    longest = longest_asked(model, sequence_length)
    operations = _tried(lambda: flops_per_token(model, longest), "arithmetic", tell)
    speeds = _tried(
        lambda: generation_speeds(model, sequences, longest, seconds, measured), "generation", tell
    )
    return Usage(flops_per_token=operations, generation=tuple(speeds or ()))


def writing_progress(stage: str, done: int) -> Report:
    """Progress of measuring the generation speed."""
    return Report(stage=f"{stage} speed", done=done, total=len(BATCHES), unit="batch sizes")


def _tried(measure: Callable[[], T], what: str, tell: Callable[[str], None]) -> T | None:
    try:
        return measure()
    except Exception as error:  # other kinds of models raise any exception
        tell(f"{what} could not be measured: {first_line(error)}")
        return None
