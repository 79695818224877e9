"""The processor a stage runs on, and how much memory it took there."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import platform
import resource
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..ranks import local_rank

if TYPE_CHECKING:
    from collections.abc import Iterator

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def best_device() -> torch.device:
    """This process's accelerator if there is one, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local_rank() % torch.cuda.device_count())


def short_dtype(name: str) -> str:
    """`fp32` of `float32` and so on; what has no such name keeps its own."""
    return {str(dtype).removeprefix("torch."): short for short, dtype in DTYPES.items()}.get(
        name, name
    )


def describe_machine() -> str:
    """One line for whoever reads a measurement later: measurements with equal lines compare."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    threads = torch.get_num_threads()
    return (
        f"{_processor()}, {threads} {'thread' if threads == 1 else 'threads'}, "
        f"torch {torch.__version__}"
    )


@functools.cache
def _processor() -> str:
    """What the CPU calls itself."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name" and value.strip():
                return value.strip()
    return platform.processor() or platform.machine() or "CPU"


@dataclass(slots=True)
class PeakMemory:
    """Filled when the block ends."""

    bytes: int = 0


@contextlib.contextmanager
def peak_memory(device: torch.device) -> Iterator[PeakMemory]:
    """Measure the most memory that the block took on top of what was in use before it.

    On a GPU the allocator counts; on Linux the kernel's high-water mark of resident memory is reset
    first; elsewhere the mark since the process began is all there is, so small blocks read as 0.
    """
    result = PeakMemory()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield result
        result.bytes = torch.cuda.max_memory_allocated(device) - before
        return
    give_back_freed_memory()
    _reset_high_water_mark()
    before = _resident("VmRSS")
    yield result
    result.bytes = max(0, _resident("VmHWM") - before)


def give_back_freed_memory() -> None:
    """Let what is resident be what is in use, as far as the C library can."""
    # what the C library keeps for later is resident already, and would hide what the block takes
    gc.collect()
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # a C library without it
            ctypes.CDLL(None).malloc_trim(0)


def _reset_high_water_mark() -> None:
    # a kernel without this file leaves the mark of the whole process, which is still an upper bound
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _resident(field: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
