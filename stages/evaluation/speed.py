"""Speed of a forward pass and of text generation, measured alike for teacher and students.

Text generation has two parts: the prompt (prefill), then token after token (decoding). It uses the
key-value cache and computes the logits of the last position only. Teachers, students and exports
are measured on the same held-out tokens. The next token of the text is the input instead of a
generated one, which takes the same time.
"""

from __future__ import annotations

import inspect
import itertools
import math
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..models.device import describe_machine, peak_memory
from ..models.inputs import inputs_on

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from numpy.typing import NDArray

    from ...data.schema import Sequences
    from ..models.device import PeakMemory
    from ..models.inputs import Isolation
    from ..models.output_head import OutputHead

    Step = Callable[[NDArray[np.int64], Any], Any]
    """A forward pass that chooses the next tokens: from [B, T] tokens and the last cache (None
    begins a text) to the new cache; None without one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardSpeed:
    """Speed of a forward pass with logits: the median of several passes after a warm-up.

    A slow model runs fewer passes, down to one without a warm-up.
    """

    tokens_per_second: float
    peak_memory_bytes: int
    """Peak memory beyond what was in use before; the weights do not count."""
    batch_tokens: int
    machine: str


@torch.no_grad()
def forward_speed(
    head: OutputHead, sequences: Sequences, isolation: Isolation, limit: float = math.inf
) -> ForwardSpeed:
    """Time the model on the given sequences. Padding counts as tokens, because it is computed too.

    limit  seconds after which no further pass starts
    """
    device = head.model.device
    inputs = inputs_on(device, head.inputs(sequences, isolation))
    count = inputs["input_ids"].numel()
    seconds: list[float] = []
    with peak_memory(device) as memory:
        while len(seconds) <= _REPEATS and sum(seconds) < limit:
            started = time.perf_counter()
            _forward(head, inputs)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - started)
    return ForwardSpeed(
        tokens_per_second=round(count / statistics.median(seconds[1:] or seconds), 1),
        peak_memory_bytes=memory.bytes,
        batch_tokens=count,
        machine=describe_machine(),
    )


def _forward(head: OutputHead, inputs: dict[str, torch.Tensor]) -> None:
    hidden_MD = head.hidden(inputs).flatten(0, 1)
    buffer = head.buffer(len(hidden_MD), hidden_MD.device)
    for start in range(0, len(hidden_MD), len(buffer)):
        head.logits(hidden_MD[start : start + len(buffer)], buffer)


BATCHES = (1, 8)
PROMPT_TOKENS, NEW_TOKENS = 128, 32
_REPEATS = 5
_FEWEST = 3
"""Calls in the shortest run that is measured: the prompt and two tokens."""
_SLOW = 95
"""Percentile that is reported beside the median."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationSpeed:
    """Speed at one batch size: medians of several runs after a warm-up.

    There are fewer and shorter runs if time was limited. Seconds are those of the whole batch.
    """

    batch: int
    prompt_tokens: int
    new_tokens: int
    """Tokens that were generated after each prompt."""
    first_token_seconds: float
    """Time from the prompt to the first token."""
    prefill_tokens_per_second: float
    """All prompt tokens divided by `first_token_seconds`."""
    token_seconds: float
    """Median time of every further token."""
    token_seconds_p95: float
    decode_tokens_per_second: float
    """Batch size divided by `token_seconds`."""
    memory_bytes: int | None = None
    """Memory of the weights plus the peak of what generation needs."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Passage:
    """A batch of texts to read and generate."""

    text_BT: NDArray[np.int64]
    prompt: int
    """Number of tokens in the prompt. The others but the last are read one by one."""


def passage(sequences: Sequences, batch: int, longest: int) -> Passage | None:
    """A batch of held-out text; None if there is no text.

    Prompts come from sequences that are long enough, and are repeated if there are too few.

    longest  longest input in tokens
    """
    room = min(PROMPT_TOKENS + NEW_TOKENS, longest)
    new = max(2, min(NEW_TOKENS, room // 2))
    lengths = sequences.tokens.lengths
    prompt = min(room - new, int(lengths.max()))
    if prompt < 1:
        return None
    long = np.flatnonzero(lengths >= prompt)
    rows = [sequences.tokens[int(long[i % len(long)])] for i in range(batch)]
    # a short text is repeated
    text_BT = np.stack([np.resize(row, prompt + new) for row in rows]).astype(np.int64)
    return Passage(text_BT=text_BT, prompt=prompt)


def generation_speeds(
    model: Any,
    sequences: Sequences,
    longest: int,
    seconds: float = math.inf,
    measured: Callable[[int], None] = lambda batches: None,
) -> list[GenerationSpeed]:
    """Time a model at every batch size of `BATCHES`; empty for a model without a cache.

    sequences  the first held-out sequences
    longest    longest input in tokens
    seconds    time limit; larger batches are left out if it is exceeded
    measured   is called with the number of measured batch sizes
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
            # the remaining time in equal parts
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
    """Time one batch after a warm-up; None for a model without a cache.

    peak    measures the additional memory that a block uses
    loaded  bytes in use before
    until   deadline by `time.perf_counter`; one short run is always made
    """
    if _written(step, read, until) is None:
        return None
    runs: list[list[float] | None] = []
    with peak() as memory:
        while len(runs) < _REPEATS and not (runs and time.perf_counter() >= until):
            runs.append(_written(step, read, until))
    timed = [run for run in runs if run is not None]
    size, prompt = len(read.text_BT), read.prompt
    first = statistics.median(run[0] for run in timed)
    further = np.concatenate([run[1:] for run in timed])
    usual = float(np.median(further))
    return GenerationSpeed(
        batch=size,
        prompt_tokens=prompt,
        new_tokens=min(map(len, timed)),
        first_token_seconds=round(first, 6),
        prefill_tokens_per_second=round(size * prompt / first, 1),
        token_seconds=round(usual, 6),
        token_seconds_p95=round(float(np.percentile(further, _SLOW)), 6),
        decode_tokens_per_second=round(size / usual, 1),
        memory_bytes=loaded + memory.bytes,
    )


def _written(step: Step, read: Passage, until: float = math.inf) -> list[float] | None:
    """Seconds for each token; None for a model without a cache."""
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
    """Forward passes of a transformers model, on its device."""
    settings, name = call_settings(model)

    def step(tokens_BT: NDArray[np.int64], cache: Any, /) -> Any:
        tokens = torch.from_numpy(tokens_BT).to(model.device)
        output = model(input_ids=tokens, use_cache=True, **settings, **{name: cache})
        output.logits[:, -1].argmax(-1).cpu()  # waits for the device
        return getattr(output, name, None)

    return step


def call_settings(model: Any) -> tuple[dict[str, Any], str]:
    """Arguments of a call that needs only the last position's logits, and the cache's name."""
    named = inspect.signature(model.forward).parameters
    settings: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in named else {}
    return settings, cache_name(model) or "past_key_values"


def cache_name(model: Any) -> str | None:
    """Name of the key-value cache among the inputs and outputs of a model; None without one.

    It is `cache` from transformers 5.24 on, and `past_key_values` before.
    """
    named = inspect.signature(model.forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in named), None)


def weights_bytes(model: Any) -> int:
    """Bytes of parameters and buffers, shared ones once; of quantised ones their components."""
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
