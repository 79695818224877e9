"""How much one split of a corpus holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ...data.prepared import SplitRecord
    from ..recipe.tables import Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitSize:
    """What a prepared split holds, or what its text lets expect."""

    sequences: int
    tokens: int
    positions: int
    counted: bool
    basis: str = ""
    """What it was estimated from, for the user; empty where it is counted."""


def answered(prompts: SplitRecord | SplitSize, recipe: Recipe, basis: str = "") -> SplitSize:
    """At most: where the teacher answers prompts, only it knows how long its answers get."""
    generate = recipe.teacher.generate
    longest = 0 if generate is None else prompts.sequences * generate.max_new_tokens
    room = prompts.sequences * recipe.corpus.sequence_length - prompts.tokens
    positions = max(0, min(longest, room))
    return SplitSize(
        sequences=prompts.sequences,
        tokens=prompts.tokens + positions,
        positions=positions,
        counted=False,
        basis=basis,
    )
