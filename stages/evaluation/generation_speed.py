"""How fast a model writes: the prompt first (prefill), then token after token (decoding).

As it would be served: with the key-value cache, logits of the last position alone. Teachers,
students and exports are measured by this code, on the same held-out tokens: what is written does
not matter to a clock, so the text's own next token is fed instead of the model's.
"""

from __future__ import annotations

import inspect
import itertools
import math
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from ..models.device import peak_memory

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from numpy.typing import NDArray

    from ...data.schema import Sequences
    from ..models.device import PeakMemory

BATCHES = (1, 8)
PROMPT_TOKENS, NEW_TOKENS = 128, 32
_REPEATS = 5
_FEWEST = 3
"""Calls of the shortest run that says anything: the prompt and two tokens."""
_SLOW = 95
"""The percentile that is told beside the median."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationSpeed:
    """One batch size: medians of several runs after a warm-up, of fewer and shorter ones where time
    was limited. Seconds are of the whole batch."""

    batch: int
    prompt_tokens: int
    """Of each prompt;"""
    new_tokens: int
    """how many were written after it."""
    first_token_seconds: float
    """From the prompt to the first token."""
    prefill_tokens_per_second: float
    """Prompt tokens, over that time."""
    token_seconds: float
    """Of every further token."""
    token_seconds_p95: float
    """The same of the slowest twentieth."""
    decode_tokens_per_second: float
    """Further tokens of all rows, by their median."""
    memory_bytes: int | None = None
    """Of the weights, and the most that reading and writing took beside them."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Passage:
    """What is read and written."""

    text_BT: NDArray[np.int64]
    prompt: int
    """So many of its tokens are read at once, the others one by one but the last."""


class Step(Protocol):
    """A model, one step further."""

    def __call__(self, tokens_BT: NDArray[np.int64], cache: Any, /) -> Any:
        """Choose the next tokens, and give the cache for those after; None if there is none.

        cache  what the step before gave; None begins a text
        """
        ...


def passage(sequences: Sequences, batch: int, longest: int) -> Passage | None:
    """Text of held-out sequences, the longest of them first if need be; None if there is none.

    longest  tokens that a model may be asked about at once
    """
    room = min(PROMPT_TOKENS + NEW_TOKENS, longest)
    new = max(2, min(NEW_TOKENS, room // 2))
    lengths = sequences.tokens.lengths
    prompt = min(room - new, int(lengths.max()))
    if prompt < 1:
        return None
    long = np.flatnonzero(lengths >= prompt)
    rows = [sequences.tokens[int(long[i % len(long)])] for i in range(batch)]
    # where one is too short to go on, it begins again
    text_BT = np.stack([np.resize(row, prompt + new) for row in rows]).astype(np.int64)
    return Passage(text_BT=text_BT, prompt=prompt)


def generation_speeds(
    model: Any,
    sequences: Sequences,
    longest: int,
    seconds: float = math.inf,
    measured: Callable[[int], None] = lambda batches: None,
) -> list[GenerationSpeed]:
    """Time a model of transformers at every batch size of `BATCHES`; nothing if it keeps no cache.

    sequences  the first of the held-out ones
    longest    tokens it may be asked about at once
    seconds    that it may take: what does not fit is left out, the larger batches first
    measured   hears of how many batch sizes are done
    """
    found: list[GenerationSpeed] = []
    until = time.perf_counter() + seconds
    for batch in BATCHES:
        if found and time.perf_counter() >= until:
            break
        measured(len(found))
        read = passage(sequences, batch, longest)
        if read is None:
            return []
        speed = generation_speed(
            torch_step(model),
            read,
            lambda: peak_memory(model.device),
            weights_bytes(model),
            # an equal part of what is left for each of the others
            time.perf_counter() + (until - time.perf_counter()) / (len(BATCHES) - len(found)),
        )
        if speed is None:
            return []
        found.append(speed)
    measured(len(found))
    return found


@torch.no_grad()
def generation_speed(
    step: Step,
    read: Passage,
    peak: Callable[[], AbstractContextManager[PeakMemory]],
    loaded: int,
    until: float = math.inf,
) -> GenerationSpeed | None:
    """Time one batch, after a warm-up; None where there is no cache to go on with.

    peak    measures the memory that a block takes beside what is in use,
    loaded  bytes which that is
    until   when it ends, by `time.perf_counter`, or soon after: one short run there is always
    """
    if _written(step, read, until) is None:
        return None
    runs: list[list[float] | None] = []
    with peak() as memory:
        while len(runs) < _REPEATS and not (runs and time.perf_counter() >= until):
            runs.append(_written(step, read, until))
    return _speed(read, [run for run in runs if run is not None], loaded + memory.bytes)


def _written(step: Step, read: Passage, until: float = math.inf) -> list[float] | None:
    """Seconds to each token; None from a model that gives no cache to go on with."""
    cache, seconds = None, []
    borders = [0, *range(read.prompt, read.text_BT.shape[1])]
    for start, end in itertools.pairwise(borders):
        started = time.perf_counter()
        cache = step(read.text_BT[:, start:end], cache)
        seconds.append(time.perf_counter() - started)
        if cache is None:
            return None
        if len(seconds) >= _FEWEST and time.perf_counter() >= until:
            break
    return seconds


def torch_step(model: Any) -> Step:
    """A model of transformers, wherever it is."""
    settings, cached = call_settings(model)

    def step(tokens_BT: NDArray[np.int64], cache: Any, /) -> Any:
        tokens = torch.from_numpy(tokens_BT).to(model.device)
        output = model(input_ids=tokens, use_cache=True, **settings, **{cached: cache})
        output.logits[:, -1].argmax(-1).cpu()  # waits for the device, as whoever reads it does
        return getattr(output, "past_key_values", None)

    return step


def call_settings(model: Any) -> tuple[dict[str, Any], str]:
    """What asks a model for the logits of the last position alone, if it can be asked, and the name
    under which it takes its cache back."""
    named = inspect.signature(model.forward).parameters
    settings: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in named else {}
    # what transformers calls it from 5.24 on, and what it was called before
    return settings, "cache" if "cache" in named else "past_key_values"


def weights_bytes(model: Any) -> int:
    """Memory of parameters and buffers, each once; of quantised ones what they are made of."""
    waiting = [*model.parameters(), *model.buffers()]
    found: dict[int, int] = {}
    while waiting:
        tensor = waiting.pop()
        if hasattr(tensor, "__tensor_flatten__"):
            waiting += [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
            continue
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def _speed(read: Passage, runs: list[list[float]], memory: int) -> GenerationSpeed:
    batch, prompt = len(read.text_BT), read.prompt
    first = statistics.median(run[0] for run in runs)
    further = np.concatenate([run[1:] for run in runs])
    usual = float(np.median(further))
    return GenerationSpeed(
        batch=batch,
        prompt_tokens=prompt,
        new_tokens=min(map(len, runs)),
        first_token_seconds=round(first, 6),
        prefill_tokens_per_second=round(batch * prompt / first, 1),
        token_seconds=round(usual, 6),
        token_seconds_p95=round(float(np.percentile(further, _SLOW)), 6),
        decode_tokens_per_second=round(batch / usual, 1),
        memory_bytes=memory,
    )
