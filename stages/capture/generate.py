"""The teacher answers prompts itself, so that students learn from its own text.

Transformers generates; what is drawn is decided here. One number per (seed, sequence id, step) is
read off the cumulative distribution, so an answer is a function of its prompt and those three, not
of the batch it stood in: which prompts are answered together is tried on the model (`answering`).
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import (
    LogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ...data.order import uniform
from ...data.packing import TokenizedDocument, build_sequences
from ..models.ends import own_ends
from .answering import answered_together, choose_answering, written

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ...data.schema import Sequences
    from ..config import GenerateConfig
    from ..models.output_head import OutputHead
    from .answering import Answering

_STREAM = 0x616E73776572
"""Added to the seed: the numbers that draw an answer are others than those that sample its tail at
the same place, or the two would go together."""


def end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """The ids that end an answer: what the checkpoint generates until, and the tokenizer's own."""
    end = tokenizer.eos_token_id
    return frozenset(own_ends(model)) | frozenset([] if end is None else [int(end)])


@torch.no_grad()
def answer(
    head: OutputHead,
    prompts: Sequences,
    config: GenerateConfig,
    *,
    seed: int,
    ends: frozenset[int],
    sequence_length: int,
    answering: Answering | None = None,
) -> Sequences:
    """The same sequences, each a prompt with its answer of at least one token, supervised where an
    answer's tokens are predicted.

    prompts          one document each, of fewer than `sequence_length` tokens
    ends             ids that end an answer, and belong to it
    sequence_length  most tokens of prompt and answer together
    answering        which prompts are answered together; tried now unless given

    Raises
        ValueError: a prompt leaves no room for an answer
    """
    lengths_N = prompts.tokens.lengths
    if len(prompts) and int(lengths_N.max()) >= sequence_length:
        row = int(lengths_N.argmax())
        raise ValueError(
            f"sequence {int(prompts.ids[row])}: a prompt of {int(lengths_N[row])} tokens leaves no "
            f"room in {sequence_length}"
        )
    if answering is None:
        answering = choose_answering(head, sequence_length)
    room_N = np.minimum(config.max_new_tokens, sequence_length - lengths_N)
    answers: list[list[int]] = [[] for _ in range(len(prompts))]
    for rows in answered_together(lengths_N, answering):
        _go_on(head, prompts, answers, rows, room_N, config, seed, ends)
    return _answered(prompts, answers)


def _go_on(
    head: OutputHead,
    prompts: Sequences,
    answers: list[list[int]],
    going_on: list[int],
    room_N: NDArray[np.int64],
    config: GenerateConfig,
    seed: int,
    ends: frozenset[int],
) -> None:
    """Write the answers of some prompts, all in one batch, to where they belong in `answers`."""
    while going_on:
        # No further than the fullest row can go, so that none is ever longer than a sequence: what
        # lies beyond a model's context may have no position. The others go on from there.
        done_N = np.array([len(answers[row]) for row in going_on])
        steps = int((room_N[going_on] - done_N).min())
        texts = [[*prompts.tokens[row].tolist(), *answers[row]] for row in going_on]
        draws_NS = _draws(seed, prompts.ids[going_on], done_N, steps)
        found_NS = _generate(head, texts, draws_NS, config, ends)
        for row, tokens in zip(going_on, found_NS.tolist(), strict=True):
            answers[row].extend(_until(tokens, ends))
        going_on = [
            row
            for row in going_on
            if len(answers[row]) < room_N[row] and answers[row][-1] not in ends
        ]


def _answered(prompts: Sequences, answers: list[list[int]]) -> Sequences:
    packed = []
    for row, answer_T in enumerate(answers):
        tokens_T = np.append(prompts.tokens[row], answer_T).astype(np.int32)
        learned_T = np.arange(len(tokens_T)) >= len(prompts.tokens[row])
        document = int(prompts.document_ids[row][0])
        packed.append([TokenizedDocument(document, tokens_T, learned_T)])
    return dataclasses.replace(build_sequences(0, packed), ids=prompts.ids)


def _draws(
    seed: int, ids_N: NDArray[np.int64], done_N: NDArray[np.int64], steps: int
) -> NDArray[np.float64]:
    """[N, S] a number in [0, 1) for each of the next steps of each sequence."""
    steps_NS = (done_N[:, None] + np.arange(steps)).astype(np.int32)
    ids_NS = np.repeat(ids_N, steps)
    return uniform(seed + _STREAM, ids_NS, steps_NS.ravel()).reshape(-1, steps)


def _until(tokens: list[int], ends: frozenset[int]) -> list[int]:
    """Up to and with the first end."""
    first = next((i for i, token in enumerate(tokens, 1) if token in ends), len(tokens))
    return tokens[:first]


def _generate(
    head: OutputHead,
    texts: list[list[int]],
    draws_NS: NDArray[np.float64],
    config: GenerateConfig,
    ends: frozenset[int],
) -> NDArray[np.int64]:
    """[N, <= S] what comes next, whatever follows an end included."""
    model = head.model
    width = max(len(text) for text in texts)
    processors: list[LogitsProcessor] = [_RealVocabulary(head.vocabulary)]
    if config.temperature > 0:
        processors.extend(_warpers(config))
        draws = torch.from_numpy(draws_NS).to(model.device)
        processors.append(_Draw(draws, width, head.vocabulary))
    stopping = StoppingCriteriaList()
    if ends:
        stopping.append(_AtEnd(torch.tensor(sorted(ends), device=model.device)))
    found = written(model, texts, draws_NS.shape[1], processors, stopping)
    return found.cpu().numpy()


def _warpers(config: GenerateConfig) -> list[LogitsProcessor]:
    """In the usual order: temperature, then the most probable tokens by number, then by mass."""
    warpers: list[LogitsProcessor] = []
    if config.temperature != 1.0:
        warpers.append(_Temperature(config.temperature))
    if config.top_k:
        warpers.append(TopKLogitsWarper(config.top_k))
    if config.top_p < 1.0:
        warpers.append(TopPLogitsWarper(config.top_p))
    return warpers


class _RealVocabulary(LogitsProcessor):  # type: ignore[misc]  # transformers is untyped
    """Nothing past the tokenizer's last token is ever said."""

    def __init__(self, vocabulary: int) -> None:
        self._vocabulary = vocabulary

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, self._vocabulary :] = -torch.inf
        return scores


class _Temperature(LogitsProcessor):  # type: ignore[misc]  # likewise
    """Divides distances from the largest score, which a temperature near 0 cannot overflow."""

    def __init__(self, temperature: float) -> None:
        self._temperature = temperature

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return (scores - scores.amax(1, keepdim=True)) / self._temperature


class _Draw(LogitsProcessor):  # type: ignore[misc]  # likewise
    """Leaves one token: where a number of ours falls in the cumulative distribution, in float64."""

    def __init__(self, draws_NS: torch.Tensor, start: int, vocabulary: int) -> None:
        self._draws_NS, self._start, self._vocabulary = draws_NS, start, vocabulary

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        step = input_ids.shape[1] - self._start
        probs = scores.double().softmax(1)
        ends = probs.cumsum(1)
        points = self._draws_NS[:, step : step + 1] * ends[:, -1:]
        chosen = torch.searchsorted(ends, points, right=True)
        # rounding can put a point at the very end: it belongs to the last token that can be said
        last = probs.shape[1] - 1 - (probs > 0).flip(1).to(torch.uint8).argmax(1, keepdim=True)
        # logits that are no numbers choose nothing: whoever captures the answer will say so
        chosen = torch.minimum(chosen, last).clamp_(max=self._vocabulary - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)


class _AtEnd(StoppingCriteria):  # type: ignore[misc]  # likewise
    """[N] whether each has just said an end."""

    def __init__(self, ends: torch.Tensor) -> None:
        self._ends = ends

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.isin(input_ids[:, -1], self._ends)
