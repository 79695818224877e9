"""What a model costs where it is used: arithmetic, and time to write."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from ..models import context_length
from .flops import flops_per_token
from .generation_speed import GenerationSpeed, generation_speed

if TYPE_CHECKING:
    from ...data.schema import Sequences


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Both, as far as they are known."""

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


def measure_usage(model: Any, sequences: Sequences) -> Usage:
    """Measure a model on held-out sequences.

    What a model of another kind cannot do, or a device has no memory for, is left out: it must not
    cost what was measured before.
    """
    length = int(sequences.tokens.lengths.max())
    operations: int | None = None
    speeds: tuple[GenerationSpeed, ...] = ()
    try:
        operations = flops_per_token(model, length)
        speeds = generation_speed(model, sequences, context_length(model.config))
    except (RuntimeError, ValueError, TypeError, AttributeError):
        pass
    return Usage(flops_per_token=operations, generation=speeds)
