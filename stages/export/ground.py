"""What all exports of a student are held against: itself, on held-out documents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ...data.token_bytes import token_bytes_of
from ..models import load_model, load_tokenizer
from .contract import Source, titled
from .documents import sampled_documents
from .measure import writing_speed
from .model_card import model_card
from .torch_runtime import TorchRuntime

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ...data.reader import StoreReader
    from ..evaluation.generation_speed import GenerationSpeed
    from .documents import Document
    from .job import ExportJob

_TEXTS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Ground:
    """What all exports of a student are held against."""

    source: Source
    identity: dict[str, Any]
    """Which weights these are."""
    heldout: str
    documents: list[Document]
    label_bytes: int | None
    """Of the text that their labels stand for; None where that is not known."""
    text_T: NDArray[np.int64]
    """What its speed is measured on, a whole sequence."""
    student: TorchRuntime
    """The student itself,"""
    generation: GenerationSpeed
    """and how fast it writes here."""


def ground_of(job: ExportJob, store: StoreReader, identity: dict[str, Any]) -> Ground:
    """Load a student, and the documents that it is asked about.

    Raises
        ColdstillError: it cannot be loaded, or nothing is supervised in the store
    """
    where = f"students.{job.name}"
    documents = sampled_documents(store)
    tokenizer = load_tokenizer(str(job.model), where)
    model = load_model(str(job.model), where, precision="fp32")
    texts = [
        tokenizer.decode(document.tokens_T, skip_special_tokens=True)
        for document in documents[:_TEXTS]
    ]
    length = store.manifest.packing.sequence_length
    source = Source(
        name=job.name,
        folder=job.model,
        model=model,
        tokenizer=tokenizer,
        vocabulary=store.manifest.tokenizer.size,
        length=length,
        texts=tuple(texts),
        card=model_card(job.name, identity["family"], model.num_parameters(), job.facts),
    )
    text_T = np.concatenate([document.tokens_T for document in documents])[:length]
    student = TorchRuntime(model, titled("torch"))
    return Ground(
        source=source,
        identity=identity,
        heldout=job.heldout,
        documents=documents,
        label_bytes=_label_bytes(store, documents),
        text_T=text_T,
        student=student,
        generation=writing_speed(student, text_T),
    )


def _label_bytes(store: StoreReader, documents: list[Document]) -> int | None:
    table = token_bytes_of(store)
    if table is None:
        return None
    lengths = table.lengths(store.manifest.tokenizer.size)
    return sum(int(lengths[document.target.labels.numpy()].sum()) for document in documents)
