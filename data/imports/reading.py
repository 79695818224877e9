"""How the rows of a source are read, and what happens to them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..errors import ColdstillError

if TYPE_CHECKING:
    from ..schema import Capture


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """How the rows of a source are read, as decided from the first ones."""

    alignment: str
    values: str
    rounding: float
    exact: int
    capture: Capture
    vocabulary: int
    sequence_length: int


@dataclass(slots=True)
class Tally:
    """What happened to the rows and records of a part of a source."""

    skip: bool
    """Whether bad ones are left out; otherwise the first is an error."""
    counts: Counter[str] = field(default_factory=Counter)
    documents: int = 0
    longest: int = 0

    def bad(self, where: str, what: str, count: int = 1) -> None:
        """Count something bad, or raise ColdstillError."""
        if not self.skip:
            raise ColdstillError(
                f"{where}: {what}; fetch the source again, or leave out what is bad with "
                "--bad-rows skip"
            )
        self.counts[f"skipped: {what.partition(':')[0]}"] += count
