"""Words that the teacher might say beside the text, in the tokens of a student.

A student that spells a word of the teacher with several tokens meets the later ones only where the
text has the word. A branch is such a word at another place: it leaves the text behind one token and
reads the tokens of the word, of which each but the first is learned. `retokenized/drawn.py` draws
branches from the teacher's records; the text itself goes on as if they were not there.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from .ragged import Ragged, Rows

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Branches(Rows):
    """The branches of N sequences, of each sequence by place."""

    places: Ragged
    """[N][B] int32 position of the token behind which each branch begins."""
    sizes: Ragged
    """[N][B] int32 tokens of each branch, at least 2."""
    tokens: Ragged
    """[N][sum of sizes] int32 the tokens of all branches, one after the other."""
    weights: Ragged
    """[N][B] float32 probability that each branch stands for. The sum over a branch's position is
    in expectation the teacher's probability of the word there; of a word that may begin a longer
    token of the student, the share that is left to its own spelling."""

    def __len__(self) -> int:
        return len(self.places)

    @classmethod
    def gather(cls, chosen: Sequence[tuple[Branches, int]]) -> Branches:
        """Sequences of several parts, each named by its part and its index there."""
        columns = [(part.columns(), row) for part, row in chosen]
        names = [each.name for each in fields(cls)]
        return cls(**{n: Ragged.gather([(each[n], row) for each, row in columns]) for n in names})

    def columns(self) -> dict[str, Ragged]:
        """The fields by name."""
        return {each.name: getattr(self, each.name) for each in fields(self)}
