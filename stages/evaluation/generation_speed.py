"""How fast a model writes: the prompt first (prefill), then token after token (decoding).

As it would be served: greedy, with the key-value cache, logits of the last position alone.
"""

from __future__ import annotations

import inspect
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from ...data.schema import Sequences

BATCHES = (1, 8)
PROMPT_TOKENS, NEW_TOKENS = 128, 32
_REPEATS = 5
_SLOW = 95
"""The percentile that is told beside the median."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationSpeed:
    """One batch size: medians of several runs after a warm-up. Seconds are of the whole batch."""

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


@torch.no_grad()
def generation_speed(
    model: Any, sequences: Sequences, longest: int | None
) -> tuple[GenerationSpeed, ...]:
    """Time the model at every batch size of `BATCHES`; nothing if it keeps no cache.

    sequences  of the held-out documents, from which the prompts are
    longest    the model's context, if it has an end
    """
    room = min(PROMPT_TOKENS + NEW_TOKENS, longest or PROMPT_TOKENS + NEW_TOKENS)
    new = max(2, min(NEW_TOKENS, room // 2))
    prompt = min(room - new, int(sequences.tokens.lengths.max()))
    if prompt < 1:
        return ()
    found = []
    for batch in BATCHES:
        prompts_BT = _prompts(sequences, batch, prompt).to(model.device)
        runs = [_written(model, prompts_BT, new) for _ in range(_REPEATS + 1)][1:]
        times = [run for run in runs if run is not None]
        if not times:
            return ()
        found.append(_speed(prompts_BT.shape, times))
    return tuple(found)


def _prompts(sequences: Sequences, batch: int, length: int) -> torch.Tensor:
    """[B, T] the beginnings of sequences that are long enough, again from the first if need be."""
    long = np.flatnonzero(sequences.tokens.lengths >= length)
    rows = [sequences.tokens[int(long[i % len(long)])][:length] for i in range(batch)]
    return torch.from_numpy(np.stack(rows).astype(np.int64))


def _written(model: Any, prompts_BT: torch.Tensor, new: int) -> list[float] | None:
    """Seconds to each token; None from a model that gives no cache to go on with."""
    settings, cached = call_settings(model)
    token, cache, seconds = prompts_BT, None, []
    for _ in range(new):
        started = time.perf_counter()
        output = model(input_ids=token, use_cache=True, **settings, **{cached: cache})
        token = output.logits[:, -1:].argmax(-1)
        if token.device.type == "cuda":
            torch.cuda.synchronize(token.device)
        seconds.append(time.perf_counter() - started)
        cache = getattr(output, "past_key_values", None)
        if cache is None:
            return None
    return seconds


def call_settings(model: Any) -> tuple[dict[str, Any], str]:
    """What asks a model for the logits of the last position alone, if it can be asked, and the name
    under which it takes its cache back."""
    named = inspect.signature(model.forward).parameters
    settings: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in named else {}
    # what transformers calls it from 5.24 on, and what it was called before
    return settings, "cache" if "cache" in named else "past_key_values"


def _speed(shape: torch.Size, runs: list[list[float]]) -> GenerationSpeed:
    batch, prompt = shape
    first = statistics.median(run[0] for run in runs)
    further = np.array([run[1:] for run in runs])
    usual = float(np.median(further))
    return GenerationSpeed(
        batch=batch,
        prompt_tokens=prompt,
        new_tokens=len(runs[0]),
        first_token_seconds=round(first, 6),
        prefill_tokens_per_second=round(batch * prompt / first, 1),
        token_seconds=round(usual, 6),
        token_seconds_p95=round(float(np.percentile(further, _SLOW)), 6),
        decode_tokens_per_second=round(batch / usual, 1),
    )
