"""How fast a runtime is where one text is written at a time, and what memory it takes."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..evaluation.generation_speed import NEW_TOKENS, PROMPT_TOKENS, GenerationSpeed

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .contract import Runtime

_REPEATS = 5
_SLOW = 95


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes of resident memory; 0 where the system does not tell."""

    loaded: int
    """By how much the runtime's process has grown from before the files were opened until a prompt
    was read: weights and all."""
    peak: int
    """The most that reading a prompt took on top of what was in use before it."""


def writing_speed(runtime: Runtime, text_T: NDArray[Any]) -> GenerationSpeed:
    """Time a prompt and single tokens after it, as `generation_speed` does for models of torch.

    text_T  at least two tokens; what is written does not matter
    """
    text_T = text_T[: PROMPT_TOKENS + NEW_TOKENS]
    new = max(1, min(NEW_TOKENS, len(text_T) // 2))
    prompt = len(text_T) - new
    runs = [_written(runtime, text_T, prompt) for _ in range(_REPEATS + 1)][1:]
    first = statistics.median(run[0] for run in runs)
    further = np.array([run[1:] for run in runs])
    usual = float(np.median(further))
    return GenerationSpeed(
        batch=1,
        prompt_tokens=prompt,
        new_tokens=new + 1,
        first_token_seconds=round(first, 6),
        prefill_tokens_per_second=round(prompt / first, 1),
        token_seconds=round(usual, 6),
        token_seconds_p95=round(float(np.percentile(further, _SLOW)), 6),
        decode_tokens_per_second=round(1 / usual, 1),
    )


def _written(runtime: Runtime, text_T: NDArray[Any], prompt: int) -> list[float]:
    """Seconds to the first token, and to each after it."""
    cache, seconds = None, []
    for part_T in (text_T[:prompt], *(text_T[i : i + 1] for i in range(prompt, len(text_T)))):
        started = time.perf_counter()
        _, cache = runtime.step(part_T, cache)
        seconds.append(time.perf_counter() - started)
    return seconds


def reading_speed(runtime: Runtime, text_T: NDArray[Any]) -> float:
    """Tokens/s of a whole sequence at once, logits of all its places: the median of several."""
    seconds = []
    for _ in range(_REPEATS + 1):
        started = time.perf_counter()
        runtime.step(text_T)
        seconds.append(time.perf_counter() - started)
    return round(len(text_T) / statistics.median(seconds[1:]), 1)


def resident() -> int:
    """Bytes of memory this process has, when what it has freed is given back."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # a C library without it
        ctypes.CDLL(None).malloc_trim(0)
    return _status(os.getpid(), "VmRSS")


def memory(runtime: Runtime, before: int, text_T: NDArray[Any]) -> Memory:
    """What it takes.

    before  `resident` before it was loaded; of no account if it runs in another process
    """
    process, before = runtime.elsewhere or (os.getpid(), before)
    start = _status(process, "VmRSS")
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # a kernel without this file: the peak since it began
            Path(f"/proc/{process}/clear_refs").write_text("5")
    runtime.step(text_T)
    peak, now = (_status(process, field) for field in ("VmHWM", "VmRSS"))
    return Memory(loaded=max(0, now - before), peak=max(0, peak - start))


def _status(process: int, field: str) -> int:
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
    except (OSError, StopIteration):
        return 0
