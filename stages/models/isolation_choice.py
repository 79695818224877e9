"""Choosing how a model at hand keeps documents apart: by trying it, never by its name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...data.errors import ColdstillError
from ..report import Report, Reporter, silent
from .isolation import Isolation, packs
from .isolation_trial import Trial
from .rotary import scale_by_document

if TYPE_CHECKING:
    from ...data.store.reader import StoreReader


def choose_isolation(
    model: Any,
    vocabulary: int,
    sequence_length: int,
    *,
    together: bool = True,
    where: str = "model",
    report: Reporter = silent,
) -> Isolation:
    """The first way in which this very model says of every document what it says of it alone.

    Rotary positions that depend on the batch are made to depend on each document first
    (`scale_by_document`), and stay so.

    together  whether documents share sequences: without it only `single` and `alone` are tried
    where     whose model it is, for messages and for the report of what is unusual about it

    Raises
        ColdstillError: the model sees the tokens that it is to predict, or what it says of a
            document depends on what it was asked before
    """
    kind = model.config.model_type
    for scaling, border in scale_by_document(model).items():
        if border < sequence_length:
            note = (
                f"a {kind!r} model scales its positions by the longest text of a batch ({scaling}, "
                f"above {border:,} tokens): each document's are computed from its own length"
            )
            report(Report(stage=where, note=note))
    trial = Trial(model, vocabulary, sequence_length, where)
    if not trial.answers():
        return "single"  # whoever asks it next is told what is wrong with it
    trial.expect_causal()
    ways: tuple[Isolation, ...] = ("positions", "mask", "single") if together else ("single",)
    for way in ways:
        if trial.holds(way):
            return way
    note = (
        f"what a {kind!r} model says of a document depends on the others in its batch: one "
        "document a forward pass from here on, which is slower"
    )
    report(Report(stage=where, note=note, warning=True))
    return "alone"


def student_isolation(
    model: Any, store: StoreReader, where: str, report: Reporter = silent
) -> Isolation:
    """How this student keeps the store's documents apart, as the teacher did.

    Raises
        ColdstillError: it cannot, and the store holds packed documents
    """
    packing = store.manifest.packing
    isolation = choose_isolation(
        model,
        store.manifest.tokenizer.size,
        packing.sequence_length,
        together=packing.together,
        where=where,
        report=report,
    )
    if packing.together and not packs(isolation):
        raise ColdstillError(
            f"{where}: a {model.config.model_type!r} model cannot keep packed documents apart, as "
            "the teacher did; capture again with corpus.pack = false"
        )
    return isolation
