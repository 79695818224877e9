"""Which prompts a model can answer together without one answer changing another.

Prompts of different lengths are padded on the left. A recurrent model reads that padding as text,
and some models change their positions with the longest text of a batch, so the model at hand is
tried: what it says step by step in a batch, against what it says when it answers one prompt alone.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteriaList,
)

from ..libraries import asking
from ..models.isolation_choice import length_thresholds
from ..report import Report, Reporter, silent

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from ..models.output_head import OutputHead

Answering = Literal["padded", "equal", "alone"]
"""All prompts together, those of equal length, or one by one."""

_REMEDY = "take a corpus with answers in place of generate, or another teacher"
_PROMPTS = (3, 11)
"""Tokens of the prompts that are always tried;"""
_AROUND = (-2, 3)
"""by how much others are shorter and longer than a length at which the model changes."""
_STEPS = 6
"""Tokens of a tried answer, the first half in one call and the rest in another."""
_ROUNDING = 1e-4
"""Largest difference of logits between a batch and a prompt alone, relative to the logits."""
_HALF_ROUNDING = 5e-2
"""The same in half precision."""


def answered_together(lengths_N: NDArray[np.int64], answering: Answering) -> Iterator[list[int]]:
    """Places of the prompts of each batch; every place comes once."""
    if answering == "padded":
        yield list(range(len(lengths_N)))
    elif answering == "equal":
        for length in np.unique(lengths_N):
            yield np.flatnonzero(lengths_N == length).tolist()
    else:
        yield from ([row] for row in range(len(lengths_N)))


def choose_answering(
    head: OutputHead, sequence_length: int, where: str = "model", report: Reporter = silent
) -> Answering:
    """The largest batches in which this model answers every prompt as it answers it alone.

    sequence_length  most tokens of prompt and answer together
    where            whose model it is, for messages

    Raises
        ColdstillError: the model cannot generate
    """
    with asking("transformers", "generate answers", where=where, remedy=_REMEDY):
        trial = _Trial(head, sequence_length)
    found: Answering = "alone"
    try:
        if trial.difference_of_equal() <= trial.tolerance:
            found = "equal"
            if trial.difference_of_padded() <= trial.tolerance:
                found = "padded"
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError):
        pass  # a model that takes no batch of this kind answers in none
    if found != "padded":
        kind = head.model.config.model_type
        how = "prompts of equal length in a batch" if found == "equal" else "one prompt at a time"
        note = (
            f"a {kind!r} model answers otherwise beside prompts of other lengths: {how} from "
            "here on, which is slower"
        )
        report(Report(stage=where, note=note))
    return found


class _Trial:
    """Random prompts whose answers are given, so that only what the model thinks of them counts."""

    def __init__(self, head: OutputHead, sequence_length: int) -> None:
        self._head = head
        self.tolerance = _ROUNDING if head.model.dtype == torch.float32 else _HALF_ROUNDING
        self._steps = max(1, min(_STEPS, sequence_length - 1))
        room = sequence_length - self._steps
        thresholds = length_thresholds(head.model.config, sequence_length)
        around = [threshold + by for threshold in thresholds for by in _AROUND]
        self._lengths = sorted({max(1, min(length, room)) for length in (*_PROMPTS, *around)})
        random = np.random.Generator(np.random.PCG64(0))
        self._texts = [
            random.integers(0, head.vocabulary, (2, length + self._steps)).tolist()
            for length in self._lengths
        ]
        self._alone = [
            self._said(pair[:1], [length])[0]
            for pair, length in zip(self._texts, self._lengths, strict=True)
        ]

    def difference_of_equal(self) -> float:
        """Between two prompts of one length together and one of them alone, the largest."""
        return max(
            _difference(self._said(pair, [length] * 2)[0], alone)
            for pair, length, alone in zip(self._texts, self._lengths, self._alone, strict=True)
        )

    def difference_of_padded(self) -> float:
        """Between prompts of all lengths together and each alone, the largest. They are answered in
        one go, and again with a stop half-way, as in a batch whose longest prompt has no more
        room."""
        texts, first = [pair[0] for pair in self._texts], (self._steps + 1) // 2
        later = [length + first for length in self._lengths]
        ways = [self._said(texts, self._lengths)]
        if first < self._steps:
            halves = ways[0][:, :first], self._said(texts, later, steps=self._steps - first)
            ways.append(torch.cat(halves, dim=1))
        pairs = [pair for way in ways for pair in zip(way, self._alone, strict=True)]
        return max(_difference(found, alone) for found, alone in pairs)

    def _said(
        self, texts: Sequence[list[int]], lengths: Sequence[int], steps: int | None = None
    ) -> torch.Tensor:
        """[N, S, V] logits at each step, when the given texts are what it writes."""
        steps = steps or self._steps
        prompts = [text[:length] for text, length in zip(texts, lengths, strict=True)]
        next_NS = torch.tensor(
            [text[length : length + steps] for text, length in zip(texts, lengths, strict=True)]
        )
        dictation = _Dictation(next_NS.to(self._head.model.device), self._head.vocabulary)
        written(self._head.model, prompts, steps, [dictation], StoppingCriteriaList())
        return torch.stack(dictation.heard, dim=1)


def _difference(found_SV: torch.Tensor, wanted_SV: torch.Tensor) -> float:
    """Of the step that differs most. Logits that are all shifted alike are the same."""
    found_SV, wanted_SV = (each - each.mean(1, keepdim=True) for each in (found_SV, wanted_SV))
    lengths_S = wanted_SV.norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
    difference = float(((found_SV - wanted_SV).norm(dim=1) / lengths_S).max())
    return difference if np.isfinite(difference) else 0.0  # told where answers are captured


class _Dictation(LogitsProcessor):  # type: ignore[misc]  # transformers is untyped
    """Listens to the logits, and leaves the token that is dictated."""

    def __init__(self, next_NS: torch.Tensor, vocabulary: int) -> None:
        self._next_NS, self._vocabulary = next_NS, vocabulary
        self.heard: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        step = len(self.heard)
        self.heard.append(scores[:, : self._vocabulary].float().clone())
        chosen = self._next_NS[:, step : step + 1]
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)


@torch.no_grad()
def written(
    model: Any,
    texts: Sequence[list[int]],
    steps: int,
    processors: Sequence[LogitsProcessor],
    stopping: StoppingCriteriaList,
) -> torch.Tensor:
    """[N, <= steps] the tokens that a model writes after some texts, always the one of the largest
    score that the processors leave."""
    width = max(len(text) for text in texts)
    input_ids = torch.zeros(len(texts), width, dtype=torch.int64)
    mask = torch.zeros_like(input_ids)
    for row, text in enumerate(texts):  # on the left, so that all go on at the same place
        input_ids[row, width - len(text) :] = torch.tensor(text)
        mask[row, width - len(text) :] = 1
    settings = GenerationConfig(
        max_new_tokens=steps,
        do_sample=False,
        use_cache=True,
        pad_token_id=0,  # never seen: the mask hides it
        disable_compile=True,
    )
    with _without_habits(model):
        found: torch.Tensor = model.generate(
            input_ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=settings,
            logits_processor=LogitsProcessorList(processors),
            stopping_criteria=stopping,
        )
    return found[:, width:]


@contextmanager
def _without_habits(model: Any) -> Iterator[None]:
    """Without what the checkpoint says about generating: it fills in whatever is not asked for
    (penalties, suppressed tokens), and the targets would be of another distribution."""
    habits = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = habits
