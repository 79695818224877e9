"""What a model costs where it is used: arithmetic, time to write, and memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from ..libraries import first_line
from ..models.loading import context_length
from ..report import Report
from .flops import flops_per_token
from .generation_speed import BATCHES, GenerationSpeed, generation_speeds

if TYPE_CHECKING:
    from collections.abc import Callable

    from ...data.schema import Sequences

T = TypeVar("T")

SEQUENCES = max(BATCHES)
"""So many of the first held-out sequences are read: the same for teacher, students and exports."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """All of it, as far as it is known."""

    flops_per_token: int | None = None
    generation: tuple[GenerationSpeed, ...] = ()

    @classmethod
    def of(cls, record: Any) -> Usage:
        """From a store's measurements; nothing is known where they say nothing that can be read:
        they are no part of the record."""
        try:
            return _USAGE.validate_python(record or {})
        except ValidationError:
            return cls()


_USAGE = TypeAdapter(Usage)


def longest_asked(model: Any, sequence_length: int) -> int:
    """Tokens that a model is asked about at once."""
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
    """Measure a model of transformers.

    sequences  the first `SEQUENCES` of the held-out store
    tell       hears what could not be measured: what a model of another kind cannot do, or a device
               has no memory for, is left out, so that nothing else is lost with it
    seconds    that writing may take
    measured   hears of how many batch sizes writing is measured
    """
    longest = longest_asked(model, sequence_length)
    operations = _tried(lambda: flops_per_token(model, longest), "arithmetic", tell)
    speeds = _tried(
        lambda: generation_speeds(model, sequences, longest, seconds, measured), "writing", tell
    )
    return Usage(flops_per_token=operations, generation=tuple(speeds or ()))


def writing_progress(stage: str, done: int) -> Report:
    """What is shown while writing is measured."""
    return Report(stage=f"{stage} speed", done=done, total=len(BATCHES), unit="batch sizes")


def _tried(measure: Callable[[], T], what: str, tell: Callable[[str], None]) -> T | None:
    try:
        return measure()
    except Exception as error:  # models of other kinds raise anything
        tell(f"{what} could not be measured: {first_line(error)}")
        return None
