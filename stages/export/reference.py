"""The student and the held-out documents that all its exports are compared with."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ...data.errors import ColdstillError
from ..evaluation.speed import cache_name, call_settings, passage
from ..evaluation.usage import SEQUENCES, longest_asked
from ..models.ends import repair_generation, stop_at, store_ends, with_end
from ..models.loading import load_model, load_tokenizer
from ..models.vocabulary import without_padding
from ..targets.tensors import TargetTensors
from .contract import LoadedStudent, Runtime, titled

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from ...data.schema import Block
    from ...data.store.reader import StoreReader
    from ..evaluation.speed import Passage
    from ..models.ends import Ends


@dataclass(frozen=True, eq=False)
class TorchRuntime(Runtime):
    """A causal language model of transformers, on the CPU."""

    model: Any
    title: str
    is_own: bool = True

    @torch.no_grad()
    def step(
        self, tokens_T: NDArray[Any], cache: Any = None, *, last: bool = False
    ) -> tuple[NDArray[Any], Any]:
        """[T, V] fp32 logits, or [1, V] with `last` if the model supports it, and the cache.

        The cache is None for a model without one. Recurrent models return their state.
        """
        ids = torch.from_numpy(tokens_T.astype("int64"))[None]
        name = cache_name(self.model)
        cached = {} if name is None else {"use_cache": True, name: cache}
        settings = call_settings(self.model)[0] if last else {}
        output = self.model(input_ids=ids, **cached, **settings)
        logits: NDArray[Any] = output.logits[0].float().numpy()
        return logits, None if name is None else getattr(output, name, None)


SAMPLE_TOKENS = 4096
"""Number of held-out tokens that are compared, about; all of a smaller store."""
_SEED = 0
_TEXTS = 32
"""Number of documents on which tokenizers are compared."""


@dataclass(frozen=True, slots=True, eq=False)
class HeldoutDocument:
    """A document, or the part of a document in one sequence."""

    tokens_T: NDArray[np.int64]
    positions_M: NDArray[np.int64]
    """Positions with a target."""
    target: TargetTensors
    """The teacher's distribution at these positions."""

    def within(self, length: int) -> HeldoutDocument:
        """The first tokens of the document, at most `length`."""
        tokens_T = self.tokens_T[:length]
        # the label of a position is the next token
        kept = int(np.searchsorted(self.positions_M, len(tokens_T) - 1))
        return HeldoutDocument(
            tokens_T=tokens_T,
            positions_M=self.positions_M[:kept],
            target=self.target.rows(0, kept),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """What all exports of a student are compared with."""

    student: LoadedStudent
    runtime: TorchRuntime
    """Runs the student itself."""
    documents: list[HeldoutDocument]
    prompt: Passage | None
    """Text on which speed is measured, the same for teacher, students and exports."""

    def within(self, length: int | None) -> Reference:
        """The same with documents cut to `length` tokens; None for no cut.

        Raises
            ColdstillError: no position within the length has a target
        """
        if length is None:
            return self
        documents = [document.within(length) for document in self.documents]
        if not any(len(document.positions_M) for document in documents):
            raise ColdstillError(
                f"students.{self.student.name}: no held-out position has a target within the "
                f"{length:,} tokens of such a file's context, so there is nothing to compare"
            )
        return replace(self, documents=documents)


def load_reference(
    name: str, folder: Path, store: StoreReader, *, own_code: bool = False
) -> Reference:
    """Load a student, and the held-out documents to compare it on.

    folder  folder of the student's model
    store   the held-out store

    Raises
        ColdstillError: the student cannot be loaded, or no position of the store has a target
    """
    where = f"students.{name}"
    documents = sampled_documents(store)
    tokenizer = load_tokenizer(str(folder), where)
    vocabulary = store.manifest.tokenizer.size
    ends = store_ends(store, tokenizer)
    model = load_model(str(folder), where, precision="fp32", own_code=own_code)
    length = store.manifest.packing.sequence_length
    student = LoadedStudent(
        name=name,
        folder=folder,
        model=ready_to_export(model, vocabulary, ends),
        tokenizer=with_end(tokenizer, ends.tokens),
        vocabulary=vocabulary,
        length=length,
        texts=tuple(
            tokenizer.decode(document.tokens_T, skip_special_tokens=True)
            for document in documents[:_TEXTS]
        ),
        own_code=own_code,
        ends=ends,
    )
    sequences = store.read(np.arange(min(SEQUENCES, len(store)))).sequences
    return Reference(
        student=student,
        runtime=TorchRuntime(model, titled("torch")),
        documents=documents,
        prompt=passage(sequences, 1, longest_asked(model, length)),
    )


def ready_to_export(model: Any, vocabulary: int, ends: Ends) -> Any:
    """The model itself, without padding rows, and with generation settings that end its texts."""
    model = without_padding(model, vocabulary)
    repair_generation(model)  # for students that an older version trained
    stop_at(model, ends.tokens)
    return model


def sampled_documents(store: StoreReader, tokens: int = SAMPLE_TOKENS) -> list[HeldoutDocument]:
    """Documents from random sequences of the store, the same ones each time, with enough tokens.

    Packed documents do not attend to one another, so each one is the same alone.

    Raises
        ColdstillError: no position of the store has a target
    """
    found: list[HeldoutDocument] = []
    left, positions = tokens, 0
    for row in np.random.default_rng(_SEED).permutation(len(store)).tolist():
        for document in _documents(store.read(np.array([row]))):
            found.append(document)
            left -= len(document.tokens_T)
            positions += len(document.positions_M)
        if left <= 0 and positions:
            return found
    if not positions:
        raise ColdstillError(
            f"{store.place}: no position has a target, so there is nothing to compare; raise "
            "corpus.holdout"
        )
    return found


def _documents(block: Block) -> Iterator[HeldoutDocument]:
    """Documents of one sequence that have at least two tokens."""
    sequences = block.sequences
    tokens_T, positions_M = sequences.tokens[0], sequences.positions[0]
    borders = [*sequences.document_starts[0].tolist(), len(tokens_T)]
    whole = TargetTensors.from_block(block)
    for start, end in itertools.pairwise(borders):
        if end - start < 2:
            continue
        first, last = np.searchsorted(positions_M, (start, end)).tolist()
        yield HeldoutDocument(
            tokens_T=tokens_T[start:end].astype(np.int64),
            positions_M=positions_M[first:last].astype(np.int64) - start,
            target=whole.rows(first, last),
        )
