"""How every benchmark measures: two sides interleaved in one process, medians, and a JSON file.

Absolute times belong to one machine on one day; the ratio of two things that ran in turn, minute by
minute, belongs to the code.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from coldstill.stages.models.device import best_device, describe_machine, peak_memory

if TYPE_CHECKING:
    from collections.abc import Callable

OUTPUT = Path("runs/bench")

# what benchmarks share with the tests lies there; processes of their own inherit the path
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


def compare_times(
    name: str,
    ours: Callable[[], Any],
    baseline: Callable[[], Any],
    *,
    repeats: int = 7,
) -> Figure:
    """Seconds per call: A B A B ..., after one warm-up each; the median of the pairs' ratios."""
    ours()
    baseline()
    pairs = [(_seconds(ours), _seconds(baseline)) for _ in range(repeats)]
    return Figure(
        name=f"{name}, time",
        ours=statistics.median(a for a, _ in pairs),
        baseline=statistics.median(b for _, b in pairs),
        ratio=statistics.median(a / b for a, b in pairs),
        unit="s",
        machine=describe_machine(),
    )


def compare_memory(name: str, ours: Callable[[], Any], baseline: Callable[[], Any]) -> Figure:
    """Peak bytes above what was in use before, each side alone, after both have warmed up."""
    sides = [_peak(ours), _peak(baseline)]
    return Figure(
        name=f"{name}, memory",
        ours=sides[0],
        baseline=sides[1],
        ratio=sides[0] / max(1, sides[1]),
        unit="B",
        machine=describe_machine(),
    )


def write(name: str, figures: list[Figure]) -> None:
    """Print the figures and keep them as `runs/bench/NAME.json`."""
    OUTPUT.mkdir(parents=True, exist_ok=True)
    path = OUTPUT / f"{name}.json"
    path.write_text(json.dumps([asdict(figure) for figure in figures], indent=2) + "\n")
    for figure in figures:
        scale, unit = (1e6, "MB") if figure.unit == "B" else (1.0, figure.unit)
        print(
            f"{figure.name:<58} {figure.ours / scale:>10,.3f} {figure.baseline / scale:>10,.3f} "
            f"{unit:<3} ratio {figure.ratio:.3f}"
        )


def alone(task: Callable[[], None]) -> None:
    """Run a benchmark in a process of its own, so that no other's memory is measured with it."""
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
