"""Which inputs keep the documents of a sequence or a batch from influencing each other in a model.

The record of a document must be what the teacher computes for that document alone. Position ids
that restart at each document, without an attention mask, make transformers isolate packed documents
by itself, but only with `use_cache=False`: with the cache on, the same call leaks silently. Some
models follow only an explicit 4-d mask, recurrent models follow neither, and in a few models a long
document changes all documents of its batch. So each model is tested: the hidden states of documents
in a batch must equal those of each document alone, also for documents that cross a length at which
the model changes (a sliding window, a scaled rotary embedding).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from ...data.errors import ColdstillError
from ...data.prepared import TokenizedDocument, build_sequences
from ..report import Report, Reporter, silent
from .device import enough_memory
from .inputs import attention_windows, inputs_on, model_inputs
from .rotary import scale_by_document
from .rounding import HALF_ROUNDING, NOISE, ROUNDING, agree, relative_distance

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from ...data.store.reader import StoreReader
    from .inputs import Isolation

    Document = NDArray[np.int64]
    Rows = list[list[Document]]
    """The documents of each sequence of a batch."""
    States = list[list[torch.Tensor]]
    """`[T, D]` hidden states of each document of each sequence."""


def packs(isolation: Isolation) -> bool:
    """Whether several documents may share a sequence."""
    return isolation in ("positions", "mask", "documents")


def recorded(isolation: Isolation) -> Literal["positions", "mask", "single", "documents"]:
    """The isolation that a manifest stores: how batches were formed is not part of the record."""
    return "single" if isolation == "alone" else isolation


_THRESHOLDS = frozenset(
    {
        "original_max_position_embeddings",  # rotary scaling: longrope, yarn, llama3
        "max_position_embeddings",  # where dynamic scaling begins
        "sliding_window", "sliding_window_size", "window_size", "attention_window",
        "attention_window_size", "local_attention", "local_window_size", "window_length",
        "attention_chunk_size",  # attention within chunks
        "floor_scale",  # queries that are scaled by their position
        "block_size", "chunk_size", "chunk_length",
    }
)  # fmt: skip
"""Settings whose value is a length from which on the model computes differently."""
_FIRST, _SECOND, _SHORT = 9, 7, 5
"""Lengths of the short documents, in tokens."""
_BEYOND = 8
"""Tokens by which a long document exceeds a threshold."""
_LEAK = 1e-6
"""Largest difference between two batches of one shape, relative to the norm of a position. A leak
through attention always exceeds it, rounding never does."""


def length_thresholds(config: Any, sequence_length: int) -> list[int]:
    """Increasing lengths below `sequence_length` at which the model changes its computation."""
    found = {
        value
        for name, value in _settings(config.get_text_config().to_dict())
        if name in _THRESHOLDS and isinstance(value, int) and 1 < value < sequence_length
    }
    return sorted(found)


def choose_isolation(
    model: Any,
    vocabulary: int,
    sequence_length: int,
    *,
    together: bool = True,
    where: str = "model",
    report: Reporter = silent,
) -> Isolation:
    """The first way in which the model gives every document the states that it has alone.

    Rotary positions that depend on the batch are first made to depend on each document
    (`scale_by_document`), and stay so.

    together  whether documents share sequences; if not, only `single` and `alone` are tested

    Raises
        ColdstillError: the model sees the tokens that it is to predict, its output depends on
            earlier calls, or memory runs out
    """
    kind = model.config.model_type
    for scaling, threshold in scale_by_document(model).items():
        if threshold < sequence_length:
            note = (
                f"a {kind!r} model scales its positions by the longest text of a batch ({scaling}, "
                f"above {threshold:,} tokens): each document's are computed from its own length"
            )
            report(Report(stage=where, note=note))
    trial = _Trial(model, vocabulary, sequence_length, where)
    if not trial.runs():
        return "single"  # the first real forward pass reports the error
    trial.expect_causal()
    ways: tuple[Isolation, ...] = ("positions", "mask", "single") if together else ("single",)
    for way in ways:
        if trial.holds(way):
            return way
    note = (
        f"the output of a {kind!r} model for a document depends on the other documents of its "
        "batch: one document per forward pass from here on, which is slower"
    )
    report(Report(stage=where, note=note, warning=True))
    return "alone"


def follows_masks(model: Any, vocabulary: int, sequence_length: int, where: str) -> bool:
    """Whether explicit masks keep the documents of a sequence apart."""
    trial = _Trial(model, vocabulary, sequence_length, where)
    return trial.runs() and trial.holds("mask")


def student_isolation(
    model: Any, store: StoreReader, where: str, report: Reporter = silent
) -> Isolation:
    """How a student keeps the documents of a store apart; refuses a student that cannot."""
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


class _Trial:
    """Runs one model on a few documents; the states of a document alone are computed once."""

    def __init__(self, model: Any, vocabulary: int, sequence_length: int, where: str) -> None:
        self._model, self._where = model, where
        self._random = np.random.Generator(np.random.PCG64(0))
        self._vocabulary = vocabulary
        self._length = max(2, sequence_length)
        self._exact = model.dtype == torch.float32
        first = min(_FIRST, self._length - 1)
        sizes = (first, min(_SECOND, self._length - first), min(_SHORT, self._length))
        self._first, self._second, self._short = (self._document(size) for size in sizes)
        self._long = [
            self._document(min(threshold + _BEYOND, self._length))
            for threshold in length_thresholds(model.config, sequence_length)
        ]
        self._alone: dict[bytes, torch.Tensor] = {}

    def runs(self) -> bool:
        try:
            self._alone_states(self._first)
        except ColdstillError:
            raise
        except Exception:  # unsupported models raise any class
            return False
        return True

    def expect_causal(self) -> None:
        """Refuse a model whose states of a token depend on later tokens or on earlier calls."""
        kind = self._model.config.model_type
        end = len(self._first)
        longer, changed = (
            np.append(self._first, rest)
            for rest in (self._second, self._document(len(self._second)))
        )
        whole, other = self._compute_alone(longer)[:end], self._compute_alone(changed)[:end]
        if not self._same(longer, whole, other):
            raise ColdstillError(
                f"{self._where}: a {kind!r} model sees the tokens that it is to predict, so its "
                "distributions are not predictions of the next token; choose a causal language "
                "model"
            )
        for long in self._long:
            self._alone_states(long)
        before = self._alone_states(self._first)
        if self._long and not self._same(self._first, before, self._compute_alone(self._first)):
            raise ColdstillError(
                f"{self._where}: the output of a {kind!r} model depends on the texts of earlier "
                "calls, so its record could not be reproduced; choose another model"
            )

    def holds(self, way: Isolation) -> bool:
        """Whether documents that are batched and packed in this way equal the documents alone."""
        try:
            return self._holds_when_short(way) and all(
                self._holds_across(way, long) for long in self._long
            )
        except ColdstillError:
            raise
        except Exception:  # unsupported models raise any class
            return False  # a model that rejects these arguments does not isolate with them

    def _holds_when_short(self, way: Isolation) -> bool:
        other = self._document(len(self._first))
        if not packs(way):
            rows = [[self._first], [self._short]]
            return self._equal_alone(rows, self._states(rows, way))
        rows = [[self._first, self._second], [self._short]]
        states = self._states(rows, way)
        changed = self._states([[other, self._second], [self._short]], way)
        leak, noise = relative_distance(changed[0][1], states[0][1]), 0.0
        if leak > _LEAK:  # nothing can leak into a document from a later one
            later = [[self._first, self._document(len(self._second))], [self._short]]
            noise = relative_distance(self._states(later, way)[0][0], states[0][0])
        return leak <= self._tolerance(noise) and self._equal_alone(rows, states)

    def _holds_across(self, way: Isolation, long: Document) -> bool:
        """Whether a document that crosses a threshold and the short ones beside it stay equal."""
        before, after, quiet = list[Any](), list[Any](), [self._first]
        if packs(way):
            room = self._length - len(long)
            beside = [self._short[:room], self._second[: max(0, room - len(self._short))]]
            before, after = ([part] if len(part) else [] for part in beside)
            quiet = [self._first, self._second]
        rows = [quiet, [*before, long, *after]]
        states = self._states(rows, way)
        if not self._equal_alone(rows, states):
            return False
        # the same batch with short documents in place of the long one, then with other tokens
        cut = self._states([quiet, [*before, *_pieces(long), *after]], way)
        again = self._states([quiet, [*before, *_pieces(self._document(len(long))), *after]], way)
        leak = max(
            self._largest_distance(cut[0], states[0]),
            self._largest_distance(cut[1][: len(before)], states[1][: len(before)]),
            self._largest_distance(cut[1][-1:], states[1][-1:]) if after else 0.0,
        )
        return leak <= self._tolerance(self._largest_distance(cut[0], again[0]))

    def _equal_alone(self, rows: Rows, states: States) -> bool:
        return all(
            self._same(document, self._alone_states(document), found)
            for row, found_row in zip(rows, states, strict=True)
            for document, found in zip(row, found_row, strict=True)
        )

    def _same(self, document: Document, alone: torch.Tensor, found: torch.Tensor) -> bool:
        """Whether the states of a document, or of its begin, are equal up to rounding. NaN at the
        same places is a fault that other checks report."""
        if torch.equal(alone.isfinite(), found.isfinite()) and not alone.isfinite().all():
            return True
        again = self._compute_alone
        return agree(found, alone, self._model, lambda: again(document)[: len(alone)])

    def _tolerance(self, noise: float) -> float:
        """The largest difference between batches of one shape that does not count as a leak."""
        return min(max(_LEAK, NOISE * noise), ROUNDING if self._exact else HALF_ROUNDING)

    def _largest_distance(self, found: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
        pairs = zip(found, wanted, strict=True)
        return max((relative_distance(*pair) for pair in pairs), default=0.0)

    def _document(self, size: int) -> Document:
        return self._random.integers(0, self._vocabulary, size)

    def _alone_states(self, document: Document) -> torch.Tensor:
        key = document.tobytes()
        if key not in self._alone:
            self._alone[key] = self._compute_alone(document)
        return self._alone[key]

    def _compute_alone(self, document: Document) -> torch.Tensor:
        return self._run({"input_ids": torch.from_numpy(document)[None]})[0]

    def _states(self, rows: Rows, way: Isolation) -> States:
        packed = [
            [TokenizedDocument(0, tokens.astype(np.int32), tokens >= 0) for tokens in row]
            for row in rows
        ]
        windows = attention_windows(self._model.config)
        sequences = build_sequences(0, packed)
        states_BTD = self._run(model_inputs(sequences, way, self._model.dtype, windows))
        return [
            list(states_TD[: sum(map(len, row))].split([len(tokens) for tokens in row]))
            for states_TD, row in zip(states_BTD, rows, strict=True)
        ]

    @torch.no_grad()
    def _run(self, inputs: dict[str, Any]) -> torch.Tensor:
        """[B, T, D] inputs of the output head; [B, T, V] logits if the model has no base model."""
        with enough_memory(self._model, self._where):
            return self._states_of(inputs)

    def _states_of(self, inputs: dict[str, Any]) -> torch.Tensor:
        model = self._model
        inputs = inputs_on(model.device, inputs)
        base = getattr(model, "base_model", model)
        if base is not model:
            states = getattr(base(**inputs, use_cache=False), "last_hidden_state", None)
            if states is not None:
                return states.float()  # type: ignore[no-any-return]
        output = model(**inputs, use_cache=False, output_hidden_states=True)
        logits = getattr(output, "logits", None)
        found: torch.Tensor = output.hidden_states[-1] if logits is None else logits
        return found.float()


def _pieces(document: Document) -> Iterator[Document]:
    """The document cut into pieces of at most `_SHORT` tokens."""
    for start in range(0, len(document), _SHORT):
        yield document[start : start + _SHORT]


def _settings(table: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """All settings, including those of nested tables and lists."""
    for name, value in table.items():
        if isinstance(value, dict):
            yield from _settings(value)
        elif isinstance(value, list):
            yield from ((name, each) for each in value)
        else:
            yield name, value
