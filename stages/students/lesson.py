"""The stores, captures and losses of a student, checked before any model is made.

All students of a recipe are checked before the first one is trained.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...data.errors import ColdstillError
from ..models.building import expect_sizes
from ..training.arguments import step_shape
from ..training.mixture import mixed_stores
from ..training.objective import expect_weight, mixed_terms

if TYPE_CHECKING:
    from ...data.schema import Capture
    from ...data.store.reader import StoreReader
    from ..training.chunked_loss import Term
    from .origin import StudentJob


@dataclass(frozen=True, slots=True, kw_only=True)
class Lesson:
    """The stores and losses that a student is trained with."""

    stores: list[StoreReader]
    """The run's own store first, then those of further teachers with a share."""
    captures: list[Capture]
    """The capture of each store."""
    terms: list[Term]


def lesson(job: StudentJob, store: StoreReader) -> Lesson:
    """The stores and losses of one student.

    Raises
        ColdstillError: an objective that the stores cannot support or whose weights are always 0, a
            store without supervised positions, stores of different sequences, sizes that do not
            divide
    """
    where = f"students.{job.name}"
    stores, shares = mixed_stores((store, *job.others), job.shares, f"{where}.teachers")
    captures = [(each.manifest.capture, str(each.place)) for each in stores]
    terms = mixed_terms(job.objective, captures, shares, f"{where}.objective")
    expect_weight(terms, job.config.steps, f"{where}.objective")
    if store.positions == 0:
        raise ColdstillError(f"{store.place}: no supervised position, nothing to learn")
    if job.architecture is not None:
        expect_sizes(job.architecture, f"{where}.architecture")
    step_shape(job.config, store.manifest.packing.sequence_length, f"train-student {job.name}")
    return Lesson(stores=stores, captures=[capture for capture, _ in captures], terms=terms)
