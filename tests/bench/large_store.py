"""Training from a store that is far larger than the memory of the process.

The kernel limits the process to `ALLOWED` bytes of its own memory beside what the libraries took
when they were imported; the store is eight times as large. The memory in use is read in the middle
of an epoch and at its end. Pages of mapped files do not count: the system can drop them at any
time.
"""

from __future__ import annotations

import multiprocessing
import resource
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from coldstill.data.schema import Capture
from coldstill.data.store.reader import open_store
from coldstill.stages.training.loop import train
from measure import figure, write
from synthetic_store import make_block, make_model, make_store, repeat_shard, training_job

if TYPE_CHECKING:
    from coldstill.stages.report import Report

VOCABULARY, LENGTH, BATCH = 1024, 256, 16
CAPTURE = Capture(head=256, tail=0)
SHARD_SEQUENCES, SHARDS = 128, 64
ALLOWED = 1 << 29


def main() -> None:
    """Train over the whole store once, in a process with a memory limit."""
    with tempfile.TemporaryDirectory(dir=".") as folder:
        root = Path(folder)
        block = make_block(VOCABULARY, LENGTH, SHARD_SEQUENCES, CAPTURE)
        make_store(root / "store", block, VOCABULARY, SHARD_SEQUENCES, codec="plain")
        repeat_shard(root / "store", SHARDS)
        size = sum(commit.bytes for commit in open_store(root / "store").commits())
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe(duplex=False)
        child = context.Process(target=_train, args=(root, theirs))
        child.start()
        theirs.close()
        early, late = ours.recv()
        child.join()
    allowed = f"{ALLOWED / 1e6:,.0f} MB allowed"
    figures = [
        figure("memory at the end of an epoch against its middle", late, early, "B"),
        figure(f"memory at the end of an epoch against the store, {allowed}", late, size, "B"),
    ]
    write("large_store", figures)


def _train(root: Path, sink: Any) -> None:
    torch.set_num_threads(2)
    if sys.platform == "linux":
        limit = _own_memory("VmData") + ALLOWED
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        _expect_a_limit()
    store = open_store(root / "store")
    steps = len(store) // BATCH
    seen: list[int] = []

    def look(report: Report) -> None:
        if report.done * 2 >= report.total * (len(seen) + 1):
            seen.append(_own_memory("RssAnon"))

    model = make_model(VOCABULARY, 64, 1, LENGTH)
    train(training_job(store, model, root / "run", steps=steps, batch_tokens=BATCH * LENGTH), look)
    sink.send(tuple(seen))


def _expect_a_limit() -> None:
    try:
        np.ones(5 * ALLOWED // 4, np.uint8)
    except MemoryError:
        return
    raise SystemExit("large_store: this system does not limit the memory of a process")


def _own_memory(field: str) -> int:
    """Bytes of this process: `VmData` is reserved, `RssAnon` is in use."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


if __name__ == "__main__":
    main()
