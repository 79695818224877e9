"""What all exports of a student are held against: itself, on held-out documents."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ...data.errors import ColdstillError
from ..evaluation.generation_speed import passage
from ..evaluation.usage import SEQUENCES, longest_asked
from ..models.ends import stop_at, store_ends, with_end
from ..models.generation import repair_generation
from ..models.loading import load_model, load_tokenizer
from ..models.vocabulary import without_padding
from .contract import Source, titled
from .documents import sampled_documents
from .torch_runtime import TorchRuntime

if TYPE_CHECKING:
    from ...data.store.reader import StoreReader
    from ..evaluation.generation_speed import Passage
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
    read: Passage | None
    """What its speed is measured on, as everybody's."""
    student: TorchRuntime
    """The student itself."""

    def within(self, length: int | None) -> Ground:
        """The same for what takes no longer text than this.

        Raises
            ColdstillError: nothing is supervised within it
        """
        if length is None:
            return self
        documents = [document.within(length) for document in self.documents]
        if not any(len(document.positions_M) for document in documents):
            raise ColdstillError(
                f"students.{self.source.name}: no held-out position is supervised within the "
                f"{length:,} tokens that such a file takes, so there is nothing to compare on"
            )
        return replace(self, documents=documents)


def ground_of(job: ExportJob, store: StoreReader, identity: dict[str, Any]) -> Ground:
    """Load a student, and the documents that it is asked about.

    Raises
        ColdstillError: it cannot be loaded, or nothing is supervised in the store
    """
    where = f"students.{job.name}"
    documents = sampled_documents(store)
    tokenizer = load_tokenizer(str(job.model), where)
    vocabulary = store.manifest.tokenizer.size
    model = load_model(str(job.model), where, precision="fp32", own_code=job.own_code)
    model = without_padding(model, vocabulary)
    # of a student that an older version has trained, too
    repair_generation(model)
    ends = store_ends(store, tokenizer)
    stop_at(model, ends.tokens)
    texts = [
        tokenizer.decode(document.tokens_T, skip_special_tokens=True)
        for document in documents[:_TEXTS]
    ]
    length = store.manifest.packing.sequence_length
    source = Source(
        name=job.name,
        folder=job.model,
        model=model,
        tokenizer=with_end(tokenizer, ends.tokens),
        vocabulary=vocabulary,
        length=length,
        texts=tuple(texts),
        own_code=job.own_code,
        ends=ends,
    )
    sequences = store.read(np.arange(min(SEQUENCES, len(store)))).sequences
    return Ground(
        source=source,
        identity=identity,
        heldout=job.heldout,
        documents=documents,
        read=passage(sequences, 1, longest_asked(model, length)),
        student=TorchRuntime(model, titled("torch")),
    )
