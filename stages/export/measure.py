"""Speed and memory of a runtime that generates one text at a time."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..evaluation.generation_speed import generation_speed, weights_bytes
from ..models.device import PeakMemory, give_back_freed_memory
from .torch_runtime import TorchRuntime

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from ..evaluation.generation_speed import GenerationSpeed, Passage
    from .contract import Runtime


def resident_memory() -> int:
    """Resident memory of this process in bytes, after freed memory went back to the system."""
    give_back_freed_memory()
    return _status(os.getpid(), "VmRSS")


def writing_speed(runtime: Runtime, prompt: Passage, before: int) -> GenerationSpeed | None:
    """Time a runtime as `generation_speed` times students; None for one without a cache.

    Memory is the growth of its process from before loading to the peak while generating. For a
    torch model the weights' memory is computed instead of measured.

    before  `resident_memory()` before loading; unused for a runtime in another process
    """
    process, before = runtime.other_process or (os.getpid(), before)
    weights = weights_bytes(runtime.model) if isinstance(runtime, TorchRuntime) else None

    def step(tokens_BT: NDArray[Any], cache: Any, /) -> Any:
        logits_TV, cache = runtime.step(tokens_BT[0], cache, last=True)
        logits_TV[-1].argmax()
        return cache

    def peak() -> contextlib.AbstractContextManager[PeakMemory]:
        give_back_freed_memory()
        return _growth(process, before if weights is None else _status(process, "VmRSS"))

    return generation_speed(step, prompt, peak, weights or 0)


@contextlib.contextmanager
def _growth(process: int, before: int) -> Iterator[PeakMemory]:
    """Peak memory of a process during a block, minus `before`."""
    result = PeakMemory()
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # kernels without this file: the peak since its start
            Path(f"/proc/{process}/clear_refs").write_text("5")
    yield result
    result.bytes = max(0, _status(process, "VmHWM") - before)


def _status(process: int, field: str) -> int:
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
    except (OSError, StopIteration):
        return 0
