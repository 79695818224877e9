"""What a model says of a few random documents alone, and of the same ones in company.

The documents lie on both sides of every length at which the configuration says that something
changes, since a check with short documents cannot see what only a long one does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ...data.errors import ColdstillError
from ...data.packing import TokenizedDocument, build_sequences
from .borders import borders
from .isolation import model_inputs, packs

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from .isolation import Isolation

    Document = NDArray[np.int64]
    Rows = list[list[Document]]
    """The documents of each sequence of a batch."""
    States = list[list[torch.Tensor]]
    """`[T, D]` of each document, likewise."""

_FIRST, _SECOND, _SHORT = 9, 7, 5
"""Tokens of the documents that are short."""
_BEYOND = 8
"""Tokens by which a long document crosses a border."""
_LEAK = 1e-6
"""Between two batches of one shape, relative to a position's length: a leak through attention is
never below this, rounding never above it."""
_ROUNDING = 1e-4
"""Between batches of different shapes, which may go through other kernels."""
_HALF_ROUNDING = 5e-2
"""The same in half precision, relative to the largest number of a document. It is as coarse as the
precision; what a neighbour's length does to others is seen between batches of one shape."""
_NOISE = 4
"""By how much a leak must exceed the noise that is measured on a model whose arithmetic depends on
the company of a token, as that of mixtures of experts does."""


class Trial:
    """One model, asked again and again; what it says of a document alone is kept."""

    def __init__(self, model: Any, vocabulary: int, sequence_length: int, where: str) -> None:
        """Prepare the documents, and ask nothing yet; `where` is for messages."""
        self._model, self._where = model, where
        self._random = np.random.Generator(np.random.PCG64(0))
        self._vocabulary = vocabulary
        self._length = max(2, sequence_length)
        self._exact = model.dtype == torch.float32
        self._borders = borders(model.config, sequence_length)
        first = min(_FIRST, self._length - 1)
        sizes = (first, min(_SECOND, self._length - first), min(_SHORT, self._length))
        self._first, self._second, self._short = (self._document(size) for size in sizes)
        self._long = [self._document(min(b + _BEYOND, self._length)) for b in self._borders]
        self._alone: dict[bytes, torch.Tensor] = {}

    def answers(self) -> bool:
        """Whether the model can be asked about a text at all."""
        try:
            self._alone_states(self._first)
        except Exception:  # models of other kinds raise anything
            return False
        return True

    def expect_causal(self) -> None:
        """Refuse a model that sees the future or remembers the past.

        Raises
            ColdstillError: what it says of a token depends on the tokens after it, or on the texts
                that it was asked about before
        """
        kind = self._model.config.model_type
        end = len(self._first)
        whole, other = (
            self._ask_alone(np.append(self._first, rest))[:end]
            for rest in (self._second, self._document(len(self._second)))
        )
        if not self._same(whole, other):
            raise ColdstillError(
                f"{self._where}: a {kind!r} model sees the tokens that it is to predict, so its "
                "distributions say nothing of the next token; choose a causal language model"
            )
        for long in self._long:
            self._alone_states(long)
        before = self._alone_states(self._first)
        if self._long and not self._same(before, self._ask_alone(self._first)):
            raise ColdstillError(
                f"{self._where}: what a {kind!r} model says of a text depends on the texts that it "
                "was asked about before, so no record of it could be made again; choose another "
                "model"
            )

    def holds(self, way: Isolation) -> bool:
        """Whether documents that are batched, and packed, in this way are as they are alone."""
        if way == "mask" and self._borders_of_attention():
            return False  # an explicit mask would replace the model's own window or chunks
        try:
            return self._holds_when_short(way) and all(
                self._holds_across(way, long) for long in self._long
            )
        except Exception:  # models of other kinds raise anything
            return False  # a model that does not take these arguments does not isolate with them

    def _borders_of_attention(self) -> bool:
        text = self._model.config.get_text_config()
        names = ("sliding_window", "attention_chunk_size")
        return any((getattr(text, name, None) or self._length) < self._length for name in names)

    def _holds_when_short(self, way: Isolation) -> bool:
        other = self._document(len(self._first))
        if not packs(way):
            return self._as_alone([[self._first], [self._short]], way)
        rows = [[self._first, self._second], [self._short]]
        states = self._states(rows, way)
        changed = self._states([[other, self._second], [self._short]], way)
        leak, noise = self._distance(changed[0][1], states[0][1]), 0.0
        if leak > _LEAK:  # nothing can leak into a document from one that comes after it
            later = [[self._first, self._document(len(self._second))], [self._short]]
            noise = self._distance(self._states(later, way)[0][0], states[0][0])
        return leak <= self._most(noise) and self._are_alone(rows, states)

    def _holds_across(self, way: Isolation, long: Document) -> bool:
        """Whether a document that crosses a border leaves the short ones beside it alone, and is
        left alone by them."""
        if packs(way):
            room = self._length - len(long)
            beside = [self._short[:room], self._second[: max(0, room - len(self._short))]]
            before, after = ([part] if len(part) else [] for part in beside)
            quiet = [self._first, self._second]
        else:
            before, after, quiet = [], [], [self._first]
        rows = [quiet, [*before, long, *after]]
        states = self._states(rows, way)
        if not self._are_alone(rows, states):
            return False
        # the same batch with short documents in place of the long one, then with other tokens
        cut = self._states([quiet, [*before, *_pieces(long), *after]], way)
        again = self._states([quiet, [*before, *_pieces(self._document(len(long))), *after]], way)
        most = self._most(self._distances(cut[0], again[0]))
        leak = max(
            self._distances(cut[0], states[0]),
            self._distances(cut[1][: len(before)], states[1][: len(before)]),
            self._distances(cut[1][-1:], states[1][-1:]) if after else 0.0,
        )
        return leak <= most

    def _as_alone(self, rows: Rows, way: Isolation) -> bool:
        return self._are_alone(rows, self._states(rows, way))

    def _are_alone(self, rows: Rows, states: States) -> bool:
        return all(
            self._same(self._alone_states(document), found)
            for row, found_row in zip(rows, states, strict=True)
            for document, found in zip(row, found_row, strict=True)
        )

    def _same(self, alone: torch.Tensor, found: torch.Tensor) -> bool:
        """Equal but for rounding. What is no number on both sides is another fault, told where it
        is met."""
        if torch.equal(alone.isfinite(), found.isfinite()) and not alone.isfinite().all():
            return True
        if self._exact:
            return self._distance(found, alone) <= _ROUNDING
        return float((found - alone).abs().max()) <= _HALF_ROUNDING * float(alone.abs().max())

    def _most(self, noise: float) -> float:
        """The largest difference between batches of one shape that is none."""
        return min(max(_LEAK, _NOISE * noise), _ROUNDING if self._exact else _HALF_ROUNDING)

    def _distances(self, found: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
        pairs = zip(found, wanted, strict=True)
        return max((self._distance(*pair) for pair in pairs), default=0.0)

    def _distance(self, found_TD: torch.Tensor, wanted_TD: torch.Tensor) -> float:
        """Of the position that differs most, relative to its length."""
        if torch.equal(found_TD, wanted_TD):
            return 0.0
        tiny = torch.finfo(torch.float32).tiny
        lengths_T = wanted_TD.norm(dim=1).clamp(min=tiny)
        return float(((found_TD - wanted_TD).norm(dim=1) / lengths_T).max())

    def _document(self, size: int) -> Document:
        return self._random.integers(0, self._vocabulary, size)

    def _alone_states(self, document: Document) -> torch.Tensor:
        key = document.tobytes()
        if key not in self._alone:
            self._alone[key] = self._ask_alone(document)
        return self._alone[key]

    def _ask_alone(self, document: Document) -> torch.Tensor:
        tokens = torch.from_numpy(document)[None].to(self._model.device)
        return self._ask({"input_ids": tokens})[0]

    def _states(self, rows: Rows, way: Isolation) -> States:
        packed = [
            [TokenizedDocument(0, tokens.astype(np.int32), tokens >= 0) for tokens in row]
            for row in rows
        ]
        inputs = model_inputs(build_sequences(0, packed), way, self._model.dtype)
        states_BTD = self._ask({k: v.to(self._model.device) for k, v in inputs.items()})
        return [
            list(states_TD[: sum(map(len, row))].split([len(tokens) for tokens in row]))
            for states_TD, row in zip(states_BTD, rows, strict=True)
        ]

    @torch.no_grad()
    def _ask(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """[B, T, D] what the head is applied to; of a model that is not split at its head its
        logits, which have no other axes whatever is inside."""
        model = self._model
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
    """Of at most `_SHORT` tokens each."""
    for start in range(0, len(document), _SHORT):
        yield document[start : start + _SHORT]
