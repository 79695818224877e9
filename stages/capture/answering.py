"""Tests which prompts a model can answer in one batch without changing any answer.

Prompts of different lengths are padded on the left. A recurrent model reads the padding as text,
and some models change their positions with the longest text of a batch. The model is therefore
tested: its logits at every step in a batch are compared with its logits for one prompt alone.
"""

from __future__ import annotations

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
from ..models.isolation import length_thresholds
from ..report import Report, Reporter, silent

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from ..models.output_head import OutputHead

Answering = Literal["padded", "equal", "alone"]
"""Which prompts share a batch: all, those of equal length, or none."""

_REMEDY = "take a corpus with answers in place of generate, or another teacher"
_PROMPTS = (3, 11)
"""Lengths of the prompts that are always tested."""
_AROUND = (-2, 3)
"""Tested distances from a length at which the model changes its computation."""
_STEPS = 6
"""Tokens of a tested answer, the first half in one call and the rest in another."""
_ROUNDING = 1e-4
"""Largest accepted difference between batch and single prompt, relative to the logits (fp32)."""
_HALF_ROUNDING = 5e-2
"""Largest accepted relative difference in half precision."""


def answered_together(lengths_N: NDArray[np.int64], answering: Answering) -> Iterator[list[int]]:
    """Row numbers of the prompts of each batch; every row comes once."""
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
    """The largest batches in which the model gives every prompt the same answer as alone.

    sequence_length  most tokens of prompt and answer together
    where            the recipe's key of the model, for messages

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
        pass  # the model cannot run such a batch
    if found != "padded":
        kind = head.model.config.model_type
        how = "prompts of equal length in a batch" if found == "equal" else "one prompt at a time"
        note = (
            f"a {kind!r} model gives other answers in a batch of different lengths; answering "
            f"{how}, which is slower"
        )
        report(Report(stage=where, note=note))
    return found


class _Trial:
    """Logits of a model for random prompts with given answers."""

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
            self._logits(pair[:1], [length])[0]
            for pair, length in zip(self._texts, self._lengths, strict=True)
        ]

    def difference_of_equal(self) -> float:
        """Largest difference between two prompts of equal length in a batch and one alone."""
        return max(
            _difference(self._logits(pair, [length] * 2)[0], alone)
            for pair, length, alone in zip(self._texts, self._lengths, self._alone, strict=True)
        )

    def difference_of_padded(self) -> float:
        """Largest difference between prompts of all lengths in a batch and each alone. They are
        answered in one call and again in two, as in a batch whose longest prompt runs out of
        room."""
        texts, first = [pair[0] for pair in self._texts], (self._steps + 1) // 2
        later = [length + first for length in self._lengths]
        ways = [self._logits(texts, self._lengths)]
        if first < self._steps:
            halves = ways[0][:, :first], self._logits(texts, later, steps=self._steps - first)
            ways.append(torch.cat(halves, dim=1))
        pairs = [pair for way in ways for pair in zip(way, self._alone, strict=True)]
        return max(_difference(found, alone) for found, alone in pairs)

    def _logits(
        self, texts: Sequence[list[int]], lengths: Sequence[int], steps: int | None = None
    ) -> torch.Tensor:
        """[N, S, V] logits at each step while the model is made to generate the given texts."""
        steps = steps or self._steps
        prompts = [text[:length] for text, length in zip(texts, lengths, strict=True)]
        next_NS = torch.tensor(
            [text[length : length + steps] for text, length in zip(texts, lengths, strict=True)]
        )
        forced = _ForcedTokens(next_NS.to(self._head.model.device), self._head.vocabulary)
        generate_greedily(self._head.model, prompts, steps, [forced], StoppingCriteriaList())
        return torch.stack(forced.logits, dim=1)


def _difference(found_SV: torch.Tensor, wanted_SV: torch.Tensor) -> float:
    """Relative difference at the step that differs most. A constant shift of all logits counts as
    no difference."""
    found_SV, wanted_SV = (each - each.mean(1, keepdim=True) for each in (found_SV, wanted_SV))
    lengths_S = wanted_SV.norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
    difference = float(((found_SV - wanted_SV).norm(dim=1) / lengths_S).max())
    return difference if np.isfinite(difference) else 0.0  # the capture reports it


class _ForcedTokens(LogitsProcessor):  # type: ignore[misc]  # transformers is untyped
    """Records the logits and leaves only the given token."""

    def __init__(self, next_NS: torch.Tensor, vocabulary: int) -> None:
        self._next_NS, self._vocabulary = next_NS, vocabulary
        self.logits: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        step = len(self.logits)
        self.logits.append(scores[:, : self._vocabulary].float().clone())
        chosen = self._next_NS[:, step : step + 1]
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)


@torch.no_grad()
def generate_greedily(
    model: Any,
    texts: Sequence[list[int]],
    steps: int,
    processors: Sequence[LogitsProcessor],
    stopping: StoppingCriteriaList,
) -> torch.Tensor:
    """[N, <= steps] tokens that a model generates after some texts: at each step the token with the
    largest score after the processors."""
    width = max(len(text) for text in texts)
    input_ids = torch.zeros(len(texts), width, dtype=torch.int64)
    mask = torch.zeros_like(input_ids)
    # padded on the left, so that all rows continue at the same index
    for row, text in enumerate(texts):
        input_ids[row, width - len(text) :] = torch.tensor(text)
        mask[row, width - len(text) :] = 1
    settings = GenerationConfig(  # the padding token is masked
        max_new_tokens=steps, do_sample=False, use_cache=True, pad_token_id=0, disable_compile=True
    )
    # the checkpoint's own settings would fill in those that are not given (penalties, suppressed
    # tokens), and the answers would come from another distribution
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        found: torch.Tensor = model.generate(
            input_ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=settings,
            logits_processor=LogitsProcessorList(processors),
            stopping_criteria=stopping,
        )
    finally:
        model.generation_config = own
    return found[:, width:]
