"""What grows with the number of shards and sequences: opening, planning, reading, and the order.

`make bench` takes stores of 5,000 shards, `--shards` any other number. The shards are names of
one, so that a store has as many files and commit records as a large one in little space. All
files are in the page cache.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from coldstill.data.order import epoch_windows
from coldstill.data.places.place import place_at
from coldstill.data.store.layout import SHARDS
from coldstill.data.store.manifest import read_manifest
from coldstill.data.store.reader import open_store
from coldstill.data.store.writer import ShardWriter
from measure import Figure, compare_memory, figure, write
from oracles import manifest_for, random_block, write_missing
from synthetic_store import repeat_shard

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LARGE, SMALL = 5_000, 500
"""Numbers of shards."""
MOST_READ = 10_000
"""Most shards that are all read, which takes milliseconds each."""
BATCH = 8
EPOCH, PART_OF_IT = 10**9, 10**8
"""Sequences of an epoch whose order is made, in shards of 10,000 and blocks of 16."""


def main(large: int = LARGE) -> None:
    """Measure with the default codec, in both formats."""
    figures: list[Figure] = []
    for store in ("arrow", "zarr"):
        with tempfile.TemporaryDirectory() as folder:
            roots = Path(folder) / "large", Path(folder) / "small"
            for root, shards in zip(roots, (large, SMALL), strict=True):
                _make(root, shards, store)
            figures += _figures(*roots, f"{store}, {large:,} shards against {SMALL:,}")
    orders = f"{EPOCH:,} sequences against {PART_OF_IT:,}"
    figures += _both(f"the order of an epoch, {orders}", _pass_over, EPOCH, PART_OF_IT)
    write("store_opening", figures)


def _figures(large: Path, small: Path, sizes: str) -> Iterator[Figure]:
    files, few = (len(place_at(root).sizes(SHARDS)) for root in (large, small))
    yield figure(f"files, {sizes}", files, few, "")
    calls: dict[str, Callable[[Path], object]] = {
        "open": open_store,
        "open and read a batch": _first_batch,
        "list the missing shards": _missing,
        "compare all sizes, read all records": _compare_sizes,
    }
    for name, call in calls.items():
        yield from _both(f"{name}, {sizes}", call, large, small)
    if "arrow" in sizes and len(open_store(large).done) <= MOST_READ:
        name = f"read every batch, {sizes}"
        yield compare_memory(name, lambda: _read_all(large), lambda: _read_all(small))


def _both(
    name: str, call: Callable[[Any], object], large: Path | int, small: Path | int
) -> list[Figure]:
    """Time and memory of one call each, after a warm-up."""
    seconds: list[float] = []

    def timed(size: Path | int) -> None:
        started = time.perf_counter()
        call(size)
        seconds.append(time.perf_counter() - started)

    call(small)
    memory = compare_memory(name, lambda: timed(large), lambda: timed(small))
    ours, baseline = seconds
    return [figure(f"{name}, time", ours, baseline, "s"), memory]


def _make(root: Path, shards: int, store: str) -> None:
    block = random_block(0, BATCH)
    manifest = manifest_for(
        block, shard_sequences=BATCH, block_sequences=BATCH, codec="compact", store=store
    )
    write_missing(root, manifest, block)
    repeat_shard(root, shards, linked=True)
    assert len(list((root / SHARDS).iterdir())) == 2 * shards


def _first_batch(root: Path) -> None:
    next(open_store(root).batches(BATCH, seed=1))


def _missing(root: Path) -> None:
    """What each process of stage one does before it claims a shard."""
    assert not ShardWriter(root, read_manifest(place_at(root))).missing()


def _compare_sizes(root: Path) -> None:
    """What each training does before its first step."""
    store = open_store(root)
    store.expect_sizes()
    assert store.positions


def _read_all(root: Path) -> None:
    store = open_store(root)
    for start in range(0, len(store), BATCH):
        store.read(np.arange(start, start + BATCH))


def _pass_over(sequences: int) -> None:
    """What a training does that resumes at the end of an epoch."""
    assert sum(map(len, epoch_windows(0, 0, sequences, 10_000, 16))) == sequences


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=int, default=LARGE)
    main(parser.parse_args().shards)
