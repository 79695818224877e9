"""How a benchmark measures: two sides in turn in one process, medians, and a JSON file.

An absolute time depends on the machine and the day. The ratio of two sides that run in turn depends
mostly on the code.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import statistics
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from coldstill.stages.models.device import best_device, describe_machine, peak_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

OUTPUT = Path("runs/bench")

# the folder of what benchmarks share with the tests; child processes inherit the path
sys.path.append(str(Path(__file__).parents[1]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One comparison."""

    name: str
    ours: float
    baseline: float
    ratio: float
    unit: str
    machine: str


def figure(name: str, ours: float, baseline: float, unit: str) -> Figure:
    """Two values of this machine with their ratio."""
    return Figure(
        name=name, ours=ours, baseline=baseline, ratio=ours / baseline, unit=unit,
        machine=describe_machine(),
    )  # fmt: skip


def compare_times(
    name: str,
    ours: Callable[[], Any],
    baseline: Callable[[], Any],
    *,
    repeats: int = 7,
) -> Figure:
    """Seconds per call, in the order A B A B ... after warm-ups; the ratio is the median."""
    ours()
    baseline()
    pairs = [(_seconds(ours), _seconds(baseline)) for _ in range(repeats)]
    ours_s, baseline_s = (statistics.median(side) for side in zip(*pairs, strict=True))
    ratio = statistics.median(a / b for a, b in pairs)
    return replace(figure(f"{name}, time", ours_s, baseline_s, "s"), ratio=ratio)


def compare_memory(name: str, ours: Callable[[], Any], baseline: Callable[[], Any]) -> Figure:
    """Peak bytes above what was in use before; call `compare_times` first, as a warm-up."""
    return figure(f"{name}, memory", _peak(ours), max(1, _peak(baseline)), "B")


def write(name: str, figures: list[Figure]) -> None:
    """Print the figures and write them to `runs/bench/NAME.json`."""
    write_rows(name, figures)
    for one in figures:
        scale, unit = (1e6, "MB") if one.unit == "B" else (1.0, one.unit)
        print(
            f"{one.name:<58} {one.ours / scale:>10,.3f} {one.baseline / scale:>10,.3f} "
            f"{unit:<3} ratio {one.ratio:.3f}"
        )


def write_rows(name: str, rows: Sequence[Any]) -> None:
    """Write dataclasses to `runs/bench/NAME.json`."""
    OUTPUT.mkdir(parents=True, exist_ok=True)
    text = json.dumps([asdict(row) for row in rows], indent=2)
    (OUTPUT / f"{name}.json").write_text(text + "\n")


def alone(task: Callable[[], None]) -> None:
    """Run a benchmark in its own process, so that it does not measure another's memory."""
    process = multiprocessing.get_context("spawn").Process(target=task)
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{task.__module__}.{task.__name__} failed")


def _seconds(call: Callable[[], Any]) -> float:
    gc.collect()
    started = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _peak(call: Callable[[], Any]) -> int:
    with peak_memory(best_device()) as memory:
        call()
    return memory.bytes
