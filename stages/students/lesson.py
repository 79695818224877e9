"""The stores, captures and losses of a student, checked before any model is made.

All students of a recipe are checked before the first one is trained. Targets of several teachers
can be mixed only if they describe the same position of the same tokens. The first store, the run's
own, decides the order. `StoreDataset` reads the others row by row beside it and compares the id and
the hash of every sequence on every read.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING

from ...data.errors import ColdstillError
from ...data.order import WINDOW
from ...data.store.manifest import difference
from ..models.building import expect_sizes
from ..training.arguments import step_shape
from ..training.objective import expect_weight, mixed_terms
from .adapters import expect_peft

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ...data.schema import Capture
    from ...data.store.reader import StoreReader
    from ..config import LoraConfig, QuantizeConfig
    from ..training.chunked_loss import Term
    from .job import StudentJob


def mixed_stores(
    stores: Sequence[StoreReader], shares: Sequence[float], where: str
) -> tuple[list[StoreReader], list[float]]:
    """The first store and the other stores with a positive share, after all are compared.

    Raises
        ColdstillError: the stores do not hold the same sequences, or a cache is too small
    """
    first, *others = stores
    for other in others:
        expect_same_sequences(first, other, where)
    kept = [(store, share) for store, share in zip(stores, shares, strict=True) if share > 0]
    if not kept or kept[0][0] is not first:
        kept.insert(0, (first, 0.0))
    expect_cache_room([store for store, _ in kept])
    return [store for store, _ in kept], [share for _, share in kept]


def expect_same_sequences(first: StoreReader, other: StoreReader, where: str) -> None:
    """Compare tokenizer, corpus, packing and number of sequences of two manifests.

    The teachers, their isolation of documents, the captures, codecs, formats and shard sizes may
    differ.
    """
    ours, theirs = first.manifest, other.manifest
    packing = replace(theirs.packing, isolation=ours.packing.isolation)
    # a merged store has `parts` instead of one corpus and packing
    compared = ("tokenizer", "corpus", "parts", "sequences")
    same = replace(ours, packing=packing, **{name: getattr(theirs, name) for name in compared})
    if changed := difference(ours, same, (f"in {first.place}", f"in {other.place}")):
        raise ColdstillError(
            f"{where}: these stores hold different sequences: {changed}; capture both teachers "
            "over one corpus, with one tokenizer and packing"
        )


def expect_own_text(store: StoreReader, own: StoreReader, where: str) -> None:
    """Compare the store of a student's own text with the store that it was first trained from.

    Raises
        ColdstillError: another teacher, tokenizer, sequence length or capture
    """
    ours, theirs = store.manifest, own.manifest
    for what, first, now in (
        ("teacher.fingerprint", ours.teacher.fingerprint, theirs.teacher.fingerprint),
        ("tokenizer.fingerprint", ours.tokenizer.fingerprint, theirs.tokenizer.fingerprint),
        ("packing.sequence_length", ours.packing.sequence_length, theirs.packing.sequence_length),
        ("capture", ours.capture, theirs.capture),
    ):
        if first != now:
            raise ColdstillError(
                f"{where}: {own.place} has another {what} than {store.place}: {now!s:.60}, "
                f"expected {first!s:.60}; delete it and score the text again with the first teacher"
            )


def expect_cache_room(stores: Sequence[StoreReader]) -> None:
    """Refuse a cache in which the order of the first store would fetch shards repeatedly."""
    for store in stores:
        store.expect_room()
    distant = [store for store in stores if store.place.room is not None]
    if len(distant) < 2:
        return
    needed = 0
    for store in distant:
        count = WINDOW * _shards_beside(stores[0], store)
        needed += sum(heapq.nlargest(count, store.totals.shard_bytes))
    room = min(store.place.room or 0 for store in distant)
    if room < needed:
        names = " and ".join(str(store.place) for store in distant)
        raise ColdstillError(
            f"{names}: logits.cache: {room:,} bytes are too few for the shards of {len(distant)} "
            f"stores that a student mixes at a time; set it to at least {needed:,}, twice that to "
            "fetch ahead"
        )


def _shards_beside(first: StoreReader, other: StoreReader) -> int:
    """Number of shards of `other` that one shard of `first` can overlap."""
    ours, theirs = first.manifest.shard_sequences, other.manifest.shard_sequences
    if ours % theirs == 0 or theirs % ours == 0:
        return max(1, ours // theirs)
    return -(-ours // theirs) + 1


def names_of(terms: Sequence[Term]) -> set[str]:
    """Names of the losses."""
    return {term.loss.name for term in terms}


@dataclass(frozen=True, slots=True, kw_only=True)
class Lesson:
    """The stores and losses that a student is trained with."""

    stores: list[StoreReader]
    """The run's own store first, then those of further teachers with a share."""
    captures: list[Capture]
    """The capture of each store."""
    terms: list[Term]


def expect_packages(quantize: QuantizeConfig | None, lora: LoraConfig | None, where: str) -> None:
    """Refuse a student whose training needs a package that is not installed.

    where  the student's key in messages
    """
    if quantize is not None and find_spec("torchao") is None:
        raise ColdstillError(
            f"{where}.quantize: needs the package 'torchao', which is not installed; pip install "
            "'coldstill[torchao]'"
        )
    if lora is not None:
        expect_peft(f"{where}.lora")


def lesson(job: StudentJob, store: StoreReader) -> Lesson:
    """The stores and losses of one student.

    Raises
        ColdstillError: an objective that the stores cannot support or whose weights are always 0, a
            store without supervised positions, stores of different sequences, sizes that do not
            divide, or a package that is not installed
    """
    where = f"students.{job.name}"
    expect_packages(job.quantize, job.lora, where)
    stores, shares = mixed_stores((store, *job.others), job.shares, f"{where}.teachers")
    captures = [(each.manifest.capture, str(each.place)) for each in stores]
    terms = mixed_terms(job.objective, captures, shares, f"{where}.objective")
    for each in stores:
        imported = each.manifest.imported
        if imported and "label" in imported.estimated and "chunk_likelihood" in names_of(terms):
            raise ColdstillError(
                f"{where}.objective: chunk_likelihood: {each.place} was imported without the "
                "log-probabilities of its labels, which it compares"
            )
    expect_weight(terms, job.config.steps, f"{where}.objective")
    if store.positions == 0:
        raise ColdstillError(f"{store.place}: no supervised position, nothing to learn")
    for own in job.own:
        expect_own_text(store, own, f"{where}.rounds")
    if job.architecture is not None:
        expect_sizes(job.architecture, f"{where}.architecture")
    step_shape(job.config, store.manifest.packing.sequence_length, f"train-student {job.name}")
    return Lesson(stores=stores, captures=[capture for capture, _ in captures], terms=terms)
