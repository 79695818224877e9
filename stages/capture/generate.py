"""Answers of the teacher to prompts, so that students learn from the teacher's own text.

Transformers runs the model; this module draws the tokens. One random number per (seed, sequence id,
step) selects a token from the cumulative distribution. An answer therefore depends on its prompt
and these three only, and not on its batch.

Prompts of different lengths are padded on the left. A recurrent model reads the padding as text,
and some models change their positions with the longest text of a batch. So the model is tested: its
logits at every step in a batch are compared with its logits for one prompt alone.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ...data.order import uniform
from ...data.prepared import TokenizedDocument, build_sequences
from ..libraries import asking
from ..models.device import enough_memory
from ..models.ends import own_ends
from ..models.engines.engine import Asked
from ..models.isolation import length_thresholds
from ..models.rounding import agree
from ..report import Report, Reporter, silent

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from ...data.schema import Sequences
    from ..config import GenerateConfig
    from ..models.engines.engine import Answers
    from ..models.output_head import OutputHead

Answering = Literal["padded", "equal", "alone"]
"""Which prompts share a batch: all, those of equal length, or none."""

_STREAM = 0x616E73776572
"""Added to the seed. Answers and tail samples must use different random numbers, or the two would
be correlated."""
_REMEDY = "take a corpus with answers in place of generate, or another teacher"
_PROMPTS = (3, 11)
"""Lengths of the prompts that are always tested."""
_AROUND = (-2, 3)
"""Tested distances from a length at which the model changes its computation."""
_STEPS = 6
"""Tokens of a tested answer, the first half in one call and the rest in another."""


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
    """
    with asking("transformers", "generate answers", where=where, remedy=_REMEDY):
        trial = _AnswerTrial(head, sequence_length)
    found: Answering = "alone"
    try:
        with enough_memory(head.model, where):
            if trial.holds_if_equal():
                found = "equal"
                if trial.holds_if_padded():
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


class _AnswerTrial:
    """Logits of a model for random prompts with given answers."""

    def __init__(self, head: OutputHead, sequence_length: int) -> None:
        self._head = head
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
        self._alone = [self._compute_alone(row) for row in range(len(self._texts))]

    def holds_if_equal(self) -> bool:
        """Whether two prompts of equal length have the same logits in a batch as one alone."""
        return all(
            self._same(row, self._logits(self._texts[row], self._lengths[row : row + 1] * 2)[0])
            for row in range(len(self._texts))
        )

    def holds_if_padded(self) -> bool:
        """Whether prompts of all lengths have the same logits in a batch as each alone. They are
        answered in one call and again in two, as in a batch whose longest prompt runs out of
        room."""
        texts, first = [pair[0] for pair in self._texts], (self._steps + 1) // 2
        later = [length + first for length in self._lengths]
        ways = [self._logits(texts, self._lengths)]
        if first < self._steps:
            halves = ways[0][:, :first], self._logits(texts, later, steps=self._steps - first)
            ways.append(torch.cat(halves, dim=1))
        return all(self._same(row, found) for way in ways for row, found in enumerate(way))

    def _same(self, row: int, found_SV: torch.Tensor) -> bool:
        """Whether logits are those of a prompt alone, up to rounding and a constant shift."""
        alone_SV, again = self._alone[row], partial(self._compute_alone, row)
        if not (found_SV.isfinite().all() and alone_SV.isfinite().all()):
            return True  # the capture reports it
        return agree(found_SV, alone_SV, self._head.model, again, logits=True)

    def _compute_alone(self, row: int) -> torch.Tensor:
        return self._logits(self._texts[row][:1], self._lengths[row : row + 1])[0]

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


def end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Ids that end an answer: the end tokens of the checkpoint and of the tokenizer."""
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
    stop: Callable[[], bool] = lambda: False,
) -> Sequences:
    """Each prompt with its answer of at least one token; only the answer's tokens are supervised.

    prompts          one document each, shorter than `sequence_length` tokens
    ends             ids that end an answer; the answer includes the first of them
    sequence_length  most tokens of prompt and answer together
    answering        which prompts are answered together; tested now if not given
    stop             asked at every step; once it returns True, the answers stay incomplete
    """
    lengths_N, room_N = prompts.tokens.lengths, _room(prompts, config, sequence_length)
    if answering is None:
        answering = choose_answering(head, sequence_length)
    answers: list[list[int]] = [[] for _ in range(len(prompts))]
    for rows in answered_together(lengths_N, answering):
        _extend(head, prompts, answers, rows, room_N, config, seed, ends, stop)
    return _with_answers(prompts, answers)


def answer_by_engine(
    engine: Answers,
    prompts: Sequences,
    config: GenerateConfig,
    *,
    seed: int,
    ends: frozenset[int],
    sequence_length: int,
    stop: Callable[[], bool] = lambda: False,
) -> Sequences:
    """The same as `answer`, with the random numbers of the engine."""
    room_N = _room(prompts, config, sequence_length)
    draws_N = _draws(seed, prompts.ids, np.zeros(len(prompts), np.int64), 1)[:, 0]
    seeds = tuple((draws_N * (1 << 31)).astype(np.int64).tolist())
    asked = Asked(config=config, seeds=seeds, ends=ends, stop=stop)
    texts = [prompts.tokens[row].tolist() for row in range(len(prompts))]
    return _with_answers(prompts, engine.answers(texts, room_N.tolist(), asked))


def _room(prompts: Sequences, config: GenerateConfig, sequence_length: int) -> NDArray[np.int64]:
    """[N] the most tokens of each answer. Raises ValueError for a prompt that leaves no room."""
    lengths_N = prompts.tokens.lengths
    for row in np.flatnonzero(lengths_N >= sequence_length):
        raise ValueError(
            f"sequence {int(prompts.ids[row])}: a prompt of {int(lengths_N[row])} tokens leaves no "
            f"room in {sequence_length}"
        )
    return np.minimum(config.max_new_tokens, sequence_length - lengths_N)


def _extend(
    head: OutputHead,
    prompts: Sequences,
    answers: list[list[int]],
    unfinished: list[int],
    room_N: NDArray[np.int64],
    config: GenerateConfig,
    seed: int,
    ends: frozenset[int],
    stop: Callable[[], bool],
) -> None:
    """Generate the answers of some prompts in one batch, into `answers`."""
    while unfinished and not stop():
        # Stop where the fullest row ends, so that no row becomes longer than a sequence: a position
        # beyond the model's context may not exist. The other rows continue in the next round.
        done_N = np.array([len(answers[row]) for row in unfinished])
        steps = int((room_N[unfinished] - done_N).min())
        texts = [[*prompts.tokens[row].tolist(), *answers[row]] for row in unfinished]
        draws_NS = _draws(seed, prompts.ids[unfinished], done_N, steps)
        found_NS = _generate(head, texts, draws_NS, config, ends, stop)
        for row, tokens in zip(unfinished, found_NS.tolist(), strict=True):
            end = next((i for i, token in enumerate(tokens, 1) if token in ends), len(tokens))
            answers[row].extend(tokens[:end])
        unfinished = [
            row
            for row in unfinished
            if len(answers[row]) < room_N[row] and answers[row][-1] not in ends
        ]


def _with_answers(prompts: Sequences, answers: list[list[int]]) -> Sequences:
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
    """[N, S] random numbers in [0, 1) for the next steps of each sequence."""
    steps_NS = (done_N[:, None] + np.arange(steps)).astype(np.int32)
    ids_NS = np.repeat(ids_N, steps)
    return uniform(seed + _STREAM, ids_NS, steps_NS.ravel()).reshape(-1, steps)


def _generate(
    head: OutputHead,
    texts: list[list[int]],
    draws_NS: NDArray[np.float64],
    config: GenerateConfig,
    ends: frozenset[int],
    stop: Callable[[], bool],
) -> NDArray[np.int64]:
    """[N, <= S] generated tokens, including any after an end token."""
    model = head.model
    width = max(len(text) for text in texts)
    draws = torch.from_numpy(draws_NS).to(model.device)
    sampler = _Sampler(config, draws, width, head.vocabulary)
    stopping = StoppingCriteriaList([_Stopped(stop)])
    if ends:
        stopping.append(_AtEnd(torch.tensor(sorted(ends), device=model.device)))
    found = generate_greedily(model, texts, draws_NS.shape[1], [sampler], stopping)
    return found.cpu().numpy()


class _Sampler(LogitsProcessor):  # type: ignore[misc]  # transformers is untyped
    """Applies temperature, top-k and top-p, and leaves one token: the one that a random number
    selects in the cumulative distribution. At temperature 0 it only excludes padding rows."""

    def __init__(
        self, config: GenerateConfig, draws_NS: torch.Tensor, start: int, vocabulary: int
    ) -> None:
        self._draws_NS, self._start, self._vocabulary = draws_NS, start, vocabulary
        self._temperature = config.temperature
        self._warpers = LogitsProcessorList()
        if config.top_k:
            self._warpers.append(TopKLogitsWarper(config.top_k))
        if config.top_p < 1.0:
            self._warpers.append(TopPLogitsWarper(config.top_p))

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, self._vocabulary :] = -torch.inf
        if self._temperature == 0:
            return scores
        if self._temperature != 1.0:
            # from the largest score, so that a temperature near 0 cannot overflow
            scores = (scores - scores.amax(1, keepdim=True)) / self._temperature
        scores = self._warpers(input_ids, scores)
        step = input_ids.shape[1] - self._start
        probs = scores.double().softmax(1)  # fp32 sums over a large vocabulary are biased
        ends = probs.cumsum(1)
        points = self._draws_NS[:, step : step + 1] * ends[:, -1:]
        chosen = torch.searchsorted(ends, points, right=True)
        # rounding can put a point at the very end: it belongs to the last token with probability
        last = probs.shape[1] - 1 - (probs > 0).flip(1).to(torch.uint8).argmax(1, keepdim=True)
        # NaN logits select no token; the capture of the answer reports them
        chosen = torch.minimum(chosen, last).clamp_(max=self._vocabulary - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)


class _Stopped(StoppingCriteria):  # type: ignore[misc]  # likewise
    def __init__(self, stop: Callable[[], bool]) -> None:
        self._stop = stop

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self._stop(), device=input_ids.device)


class _AtEnd(StoppingCriteria):  # type: ignore[misc]  # likewise
    def __init__(self, ends: torch.Tensor) -> None:
        self._ends = ends

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.isin(input_ids[:, -1], self._ends)
