"""A store far larger than the memory that a process may have, trained from in that process.

The kernel refuses the process more than `ALLOWED` bytes of memory of its own beside what the
libraries took when they were imported; the store has eight times as much. What it takes is looked
at in the middle of an epoch and at its end. Pages of mapped files are not its own: the
system takes them back whenever it wants to.
"""

from __future__ import annotations

import multiprocessing
import resource
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from coldstill.data.files import json_bytes
from coldstill.data.schema import Capture
from coldstill.data.store.commit import commit_json, parse_commit
from coldstill.data.store.layout import MANIFEST, commit_name, shard_name
from coldstill.data.store.reader import open_store
from coldstill.stages.models.device import describe_machine
from coldstill.stages.training.loop import train
from measure import Figure, write
from synthetic_store import make_block, make_model, make_store, training_job

if TYPE_CHECKING:
    from coldstill.stages.report import Report

VOCABULARY, LENGTH, BATCH = 1024, 256, 16
CAPTURE = Capture(head=256, tail=0)
SHARD_SEQUENCES, SHARDS = 128, 64
ALLOWED = 1 << 29


def main() -> None:
    """Train over the whole store once, in a process that is held to its limit."""
    with tempfile.TemporaryDirectory(dir=".") as folder:
        root = Path(folder)
        block = make_block(VOCABULARY, LENGTH, SHARD_SEQUENCES, CAPTURE)
        make_store(root / "store", block, VOCABULARY, SHARD_SEQUENCES, codec="plain")
        _multiply(root / "store")
        size = sum(commit.bytes for commit in open_store(root / "store").commits())
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe(duplex=False)
        child = context.Process(target=_train, args=(root, theirs))
        child.start()
        theirs.close()
        early, late = ours.recv()
        child.join()
    figures = [
        Figure(
            name="memory at the end of an epoch against its middle",
            ours=late,
            baseline=early,
            ratio=late / early,
            unit="B",
            machine=describe_machine(),
        ),
        Figure(
            name=f"the same against the store, {ALLOWED / 1e6:,.0f} MB allowed",
            ours=late,
            baseline=size,
            ratio=late / size,
            unit="B",
            machine=describe_machine(),
        ),
    ]
    write("large_store", figures)


def _multiply(root: Path) -> None:
    """One real shard, and as many copies of it as are wanted, each with a record of its own."""
    store = open_store(root)
    whole = replace(store.manifest, sequences=SHARD_SEQUENCES * SHARDS)
    (root / MANIFEST).write_bytes(json_bytes(whole.to_json()))
    commit = parse_commit((root / commit_name(0)).read_bytes(), "commit")
    for index in range(1, SHARDS):
        shutil.copyfile(root / shard_name(0, ".arrow"), root / shard_name(index, ".arrow"))
        (root / commit_name(index)).write_bytes(commit_json(replace(commit, shard=index)))


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
    raise SystemExit("this system does not hold a process to its limit")


def _own_memory(field: str) -> int:
    """What the kernel says of this process: `VmData` may be used, `RssAnon` is."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


if __name__ == "__main__":
    main()
