"""What a student is to learn, of whom, and whether that can be: known before a model is made, so it
is asked of all students before the first one is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...data.errors import ColdstillError
from ..models.building import expect_sizes
from .arguments import step_shape
from .mixture import mixed_stores
from .objective import expect_weight, mixed_terms

if TYPE_CHECKING:
    from ...data.schema import Capture
    from ...data.store.reader import StoreReader
    from ..students.job import StudentJob
    from .chunked_loss import Term


@dataclass(frozen=True, slots=True, kw_only=True)
class Lesson:
    """What a student is taught."""

    stores: list[StoreReader]
    """Its own first, then those of further teachers that have a share."""
    captures: list[Capture]
    """What each of them keeps."""
    terms: list[Term]


def lesson(job: StudentJob, store: StoreReader) -> Lesson:
    """What one student learns from its store and those of further teachers.

    Raises
        ColdstillError: an objective that the stores cannot support or that never weighs anything, a
            store with nothing to learn, stores of different sequences, sizes that do not divide
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
