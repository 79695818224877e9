"""Stage one in two processes of one thread each, against one process of one thread."""

from __future__ import annotations

import multiprocessing
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from coldstill.data.schema import Capture
from measure import figure, write
from teacher_forward import Shape, Side

SHAPE = Shape(
    "6 layers of 384", "gpt2", {"n_embd": 384, "n_layer": 6, "n_head": 6}, torch.float32, 4, 16
)
VOCABULARY, REPEATS = 32_000, 3
CAPTURE = Capture(head=16, tail=16)


def work(folder: Path, rank: int, world: int, ready: Any, ended: Any) -> None:
    """Capture a store several times in one process, together with the other processes."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": "0"}
    torch.set_num_threads(1)
    own = folder / f"rank{rank}"
    own.mkdir(parents=True)
    side = Side(SHAPE, VOCABULARY, own, store=folder / "logits", shards=16)
    side.bare()
    for _ in range(REPEATS + 1):
        if rank == 0:
            side.clear(CAPTURE)
        ready.wait()
        side.fill(CAPTURE)
        ended.wait()


def seconds(world: int) -> float:
    """Seconds to capture a whole store: the median of several runs after a warm-up."""
    context = multiprocessing.get_context("spawn")
    ready, ended = context.Barrier(world + 1), context.Barrier(world + 1)
    with tempfile.TemporaryDirectory() as folder:
        children = [
            context.Process(target=work, args=(Path(folder), rank, world, ready, ended))
            for rank in range(world)
        ]
        for child in children:
            child.start()
        times = []
        for _ in range(REPEATS + 1):
            ready.wait()
            started = time.perf_counter()
            ended.wait()
            times.append(time.perf_counter() - started)
        for child in children:
            child.join()
    return statistics.median(times[1:])


def main() -> None:
    """Measure one process and two in turn, twice."""
    one, two = zip(*((seconds(1), seconds(2)) for _ in range(2)), strict=True)
    sides = statistics.median(two), statistics.median(one)
    name = "stage one, two processes of one thread against one, time"
    write("teacher_processes", [figure(name, *sides, "s")])


if __name__ == "__main__":
    main()
