"""How fast a runtime is where one text is written at a time, and what memory it takes."""

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


def resident() -> int:
    """Bytes of memory this process has, when what it has freed is given back."""
    give_back_freed_memory()
    return _status(os.getpid(), "VmRSS")


def writing_speed(runtime: Runtime, read: Passage, before: int) -> GenerationSpeed | None:
    """Time a runtime as `generation_speed` times students; None if it keeps no cache.

    Memory is by how much its process grew from before the files were opened to the most that it had
    while it wrote: weights and all. Of a model of torch it is known what its weights take.

    before  `resident` before it was loaded; of no account if it runs in another process
    """
    process, before = runtime.elsewhere or (os.getpid(), before)
    loaded = None
    if isinstance(runtime, TorchRuntime):
        loaded = weights_bytes(runtime.model)

    def step(tokens_BT: NDArray[Any], cache: Any, /) -> Any:
        logits_TV, cache = runtime.step(tokens_BT[0], cache, last=True)
        logits_TV[-1].argmax()
        return cache

    def peak() -> contextlib.AbstractContextManager[PeakMemory]:
        give_back_freed_memory()  # of this process, if it is this one
        return _growth(process, before if loaded is None else _status(process, "VmRSS"))

    return generation_speed(step, read, peak, loaded or 0)


@contextlib.contextmanager
def _growth(process: int, before: int) -> Iterator[PeakMemory]:
    """The most memory a process has in a block, less what it had."""
    result = PeakMemory()
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # a kernel without this file: the peak since it began
            Path(f"/proc/{process}/clear_refs").write_text("5")
    yield result
    result.bytes = max(0, _status(process, "VmHWM") - before)


def _status(process: int, field: str) -> int:
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
    except (OSError, StopIteration):
        return 0
