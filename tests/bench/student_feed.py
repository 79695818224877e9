"""The cost of reading: `train-student` from its store against the same loop fed from memory.

The other side has the rows of every micro-batch ready. Files, zstd, decoding and checks therefore
all count against the store. A store is in a folder, or behind a server of the S3 protocol on this
machine with an empty local cache, so that every byte is downloaded while the student trains.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from coldstill.data.formats import STORES
from coldstill.data.places.cache import CacheSettings
from coldstill.data.schema import Capture
from coldstill.data.store.reader import open_store
from coldstill.stages.training.feed import StepBatches, StepShape, StoreDataset
from coldstill.stages.training.loop import train
from distance import ENVIRONMENT, connect
from measure import Figure, compare_times, write
from synthetic_store import make_block, make_model, make_store, training_job

if TYPE_CHECKING:
    from collections.abc import Iterator

    from coldstill.data.store.reader import StoreReader
    from coldstill.stages.training.batch import Rows

CAPTURES = (Capture(), Capture(head=16, tail=16))


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A student and its number of steps."""

    name: str
    vocabulary: int
    width: int
    layers: int
    length: int
    batch: int
    steps: int


SHAPES = (
    # reading costs relatively more for a small student
    Shape(name="2 layers of 128, V = 4,096", vocabulary=4096, width=128, layers=2, length=256,
          batch=8, steps=40),
    Shape(name="6 layers of 384, V = 32,000", vocabulary=32_000, width=384, layers=6, length=512,
          batch=4, steps=4),
)  # fmt: skip


class Ready(StoreDataset):
    """Micro-batches that were read before, in the order of the store."""

    def __init__(self, store: StoreReader, batches: dict[tuple[int, ...], Rows]) -> None:
        super().__init__(store)
        self._batches = batches

    def __getitems__(self, indices: list[int]) -> Rows:
        """A micro-batch that was read before."""
        return self._batches[tuple(indices)]


def main() -> None:
    """Measure both shapes with both captures in both formats."""
    torch.set_num_threads(2)
    figures = []
    for shape in SHAPES:
        for capture, store in itertools.product(CAPTURES, STORES):
            with tempfile.TemporaryDirectory() as folder:
                figures.append(_figure(shape, capture, store, Path(folder)))
    with s3_server():
        for shape, store in itertools.product(SHAPES, STORES):
            with tempfile.TemporaryDirectory() as folder:
                figures.append(_figure(shape, Capture(), store, Path(folder), far=True))
    write("student_feed", figures)


@contextlib.contextmanager
def s3_server() -> Iterator[None]:
    """A server of the S3 protocol in a process of its own, which this process then uses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", port]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as server:
        try:
            while True:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                    break
                time.sleep(0.1)
            os.environ |= {**ENVIRONMENT, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}
            yield
        finally:
            server.terminate()


def _figure(
    shape: Shape, capture: Capture, format_: str, folder: Path, *, far: bool = False
) -> Figure:
    count = 256 * 256 // shape.length
    block = make_block(shape.vocabulary, shape.length, count, capture)
    store = make_store(folder / "store", block, shape.vocabulary, count // 4, store=format_)
    ready = Ready(store, _read_before(store, shape))
    model = make_model(shape.vocabulary, shape.width, shape.layers, shape.length)
    address = str(folder / "store")
    if far:
        address = f"s3://bench{folder.name.lower().replace('_', '-')}/store"
        connect().mkdir(address.removesuffix("/store"))
        connect().put(str(folder / "store"), address, recursive=True)

    def run(from_memory: bool) -> None:
        for used in ("run", "cache"):
            shutil.rmtree(folder / used, ignore_errors=True)
        cache = CacheSettings(folder=folder / "cache") if far else None
        fresh = open_store(address, cache=cache)  # keeps no decoded block from the last run
        job = training_job(
            fresh, model, folder / "run", steps=shape.steps,
            batch_tokens=shape.batch * shape.length,
        )  # fmt: skip
        train(dataclasses.replace(job, dataset=ready) if from_memory else job)

    where = f"{format_} from S3" if far else format_
    name = f"train-student against memory, {shape.name}, ({capture.head}, {capture.tail}), {where}"
    return compare_times(name, lambda: run(False), lambda: run(True), repeats=3)


def _read_before(store: StoreReader, shape: Shape) -> dict[tuple[int, ...], Rows]:
    dataset = StoreDataset(store)
    step = StepShape(processes=1, passes=1, micro=shape.batch)
    order = StepBatches(dataset, 0, step, steps=shape.steps)
    return {tuple(rows): dataset.__getitems__(rows) for rows in order}


if __name__ == "__main__":
    main()
