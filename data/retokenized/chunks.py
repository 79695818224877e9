"""Two tokenisations of one document, laid over its bytes, and the chunks between shared borders.

A place is counted in units: one for each byte of text, and for a special token as many as the
student has tokens for it, at least one. A border is a place where a token begins or ends. A chunk
is the shortest stretch between two borders that both tokenisations have.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, eq=False)
class Laid:
    """The tokens of a document and the places where each begins and ends, increasing."""

    starts_T: NDArray[np.int64]
    ends_T: NDArray[np.int64]

    @property
    def borders(self) -> NDArray[np.int64]:
        """The places where a token begins or ends."""
        return np.union1d(self.starts_T, self.ends_T)


@dataclass(frozen=True, slots=True, eq=False)
class Chunks:
    """The C chunks of a document in order, as ranges of tokens of both sides."""

    teacher_C: NDArray[np.int64]
    """[C] the teacher's first token of each chunk."""
    teacher_counts_C: NDArray[np.int64]
    """[C] the number of the teacher's tokens."""
    student_C: NDArray[np.int64]
    student_counts_C: NDArray[np.int64]
    whole_C: NDArray[np.bool_]
    """[C] whether the tokens of both sides cover the chunk without gaps or tokens of no width."""

    def __len__(self) -> int:
        return len(self.teacher_C)


def chunks_of(teacher: Laid, student: Laid) -> Chunks:
    """The chunks of two tokenisations of the same bytes.

    The teacher's tokens follow one another without gaps. Those of the student may leave out places:
    a chunk there has no token of the student.
    """
    borders = np.intersect1d(teacher.borders, student.borders, assume_unique=True)
    ends_t = np.searchsorted(teacher.starts_T, borders, side="left")
    ends_s = np.searchsorted(student.starts_T, borders, side="left")
    counts_t, counts_s = np.diff(ends_t), np.diff(ends_s)
    widths_C = np.diff(borders)
    covered = np.ones(len(widths_C), np.bool_)
    for laid, edges in ((teacher, ends_t), (student, ends_s)):
        widths_T = laid.ends_T - laid.starts_T
        sums = np.append(0, np.cumsum(widths_T))
        empty = np.append(0, np.cumsum(widths_T == 0))
        covered &= np.diff(sums[edges]) == widths_C
        covered &= np.diff(empty[edges]) == 0
    return Chunks(
        teacher_C=ends_t[:-1],
        teacher_counts_C=counts_t,
        student_C=ends_s[:-1],
        student_counts_C=counts_s,
        whole_C=covered & (counts_s > 0) & (counts_t > 0),
    )
