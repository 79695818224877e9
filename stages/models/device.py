"""The device that a stage runs on, dtypes, and measuring peak memory."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import platform
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...data.errors import ColdstillError
from ..ranks import local_rank

if TYPE_CHECKING:
    from collections.abc import Iterator

try:
    import resource
except ImportError:  # Windows: the peak memory of a process is not measured there
    resource = None  # type: ignore[assignment]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def best_device() -> torch.device:
    """The accelerator of this process, or the CPU if there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local_rank() % torch.cuda.device_count())


def short_dtype(name: str) -> str:
    """`fp32` for `float32` and so on; other names are returned unchanged."""
    return next((short for short, dtype in DTYPES.items() if str(dtype) == f"torch.{name}"), name)


def describe_machine() -> str:
    """One line about processor and torch; measurements with equal lines are comparable."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    threads = torch.get_num_threads()
    return (
        f"{_processor()}, {threads} {'thread' if threads == 1 else 'threads'}, "
        f"torch {torch.__version__}"
    )


@functools.cache
def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name" and value.strip():
                return value.strip()
    return platform.processor() or platform.machine() or "CPU"


@dataclass(slots=True)
class PeakMemory:
    """The result of `peak_memory`."""

    bytes: int = 0


@contextlib.contextmanager
def peak_memory(device: torch.device) -> Iterator[PeakMemory]:
    """Measure the peak memory of a block beyond the memory in use before it.

    On a GPU the allocator counts. On Linux the kernel's high-water mark of resident memory is reset
    first. Elsewhere only the mark since the start of the process exists, so small blocks give 0.
    """
    result = PeakMemory()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield result
        result.bytes = torch.cuda.max_memory_allocated(device) - before
        return
    give_back_freed_memory()
    # without this file the mark of the whole process stays, which is still an upper bound
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    yield result
    result.bytes = max(0, _resident("VmHWM") - before)


def give_back_freed_memory() -> None:
    """Return freed memory to the operating system, as far as the C library can.

    Memory that the C library keeps for later is resident already and would hide a block's use.
    """
    gc.collect()
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # not glibc
            ctypes.CDLL(None).malloc_trim(0)


def _resident(field: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1024
        return 0 if resource is None else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out; on the CPU torch has no class for it."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and (
        "out of memory" in text or "can't allocate memory" in text
    )


@contextlib.contextmanager
def enough_memory(model: Any, where: str) -> Iterator[None]:
    """While a model is tested: a lack of memory is not a property of the model.

    Raises
        ColdstillError: memory ran out
    """
    try:
        yield
    except Exception as error:  # models raise any exception
        if not is_out_of_memory(error):
            raise
        raise ColdstillError(
            f"{where}: not enough memory on {model.device} to test how the model reads several "
            "texts; lower corpus.sequence_length, or choose a smaller dtype or model"
        ) from error
