"""The loaded teacher, as everything that asks it sees it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..models.isolation import Isolation
    from ..models.output_head import OutputHead
    from .answering import Answering


@dataclass(frozen=True, slots=True, kw_only=True)
class Teacher:
    """The loaded teacher."""

    head: OutputHead
    isolation: Isolation
    answering: Answering | None = None
    """Which prompts it answers together; None where it was not tried."""
    name: str = "teacher"
    """For messages."""
    lockstep: bool = False
    """Whether all processes run it together, each a slice of every layer."""
