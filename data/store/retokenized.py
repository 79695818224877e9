"""What the manifest of a store says that was written again in the tokens of a student."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

MASS_BINS = 20
"""Bins of 5 % of the probability."""

_Count = Annotated[int, Field(ge=0, le=2**62)]
_Sum = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]

Ambiguous = Literal["split", "map", "bucket"]
Unaligned = Literal["refuse", "skip"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Retokenized:
    """The teacher's tokens, what was decided, and what was measured over the whole operation."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid", "strict": True}
    fingerprint: str
    """SHA-256 of the teacher's table of tokens and ids."""
    size: Annotated[int, Field(ge=1, le=2**31 - 1)]
    """Number of the teacher's tokens."""
    ambiguous: Ambiguous = "split"
    """What became of the probability of ambiguous tokens."""
    unaligned: Unaligned = "refuse"
    """What happened with texts that the student's tokenizer does not reproduce byte by byte."""
    branches: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = 0.0
    """Most branches for each token of a sequence (`data/branches.py`)."""
    positions: _Count = 0
    """Positions with the teacher's distribution: the chunks."""
    ambiguous_mass: _Sum = 0.0
    """Sum over these positions of the probability of ambiguous tokens, as far as the record knows
    it."""
    ambiguous_bins: Annotated[tuple[_Count, ...], Field(max_length=MASS_BINS)] = ()
    """Of these positions, those where it is in [0, 5), [5, 10), ... percent."""
    unmapped_mass: _Sum = 0.0
    """Sum over these positions of the probability of tokens that the student cannot spell."""
    spelled_mass: _Sum = 0.0
    """Sum over these positions of the probability of tokens that the student spells with several of
    its own, and that its branches are drawn from; 0 in a store without branches."""
    counts: dict[str, _Count]
    """Counts: teacher_labels, left_labels (not in any chunk), lost_bytes, skipped_pieces,
    dropped_tokens."""

    def plus(self, other: Retokenized) -> Retokenized:
        """Both parts of a merged store."""
        bins = np.zeros(MASS_BINS, np.int64)
        for part in (self.ambiguous_bins, other.ambiguous_bins):
            bins[: len(part)] += np.array(part, np.int64)
        names = self.counts | other.counts
        return replace(
            self,
            positions=self.positions + other.positions,
            ambiguous_mass=self.ambiguous_mass + other.ambiguous_mass,
            ambiguous_bins=tuple(bins.tolist()),
            unmapped_mass=self.unmapped_mass + other.unmapped_mass,
            spelled_mass=self.spelled_mass + other.spelled_mass,
            counts={n: self.counts.get(n, 0) + other.counts.get(n, 0) for n in names},
        )
