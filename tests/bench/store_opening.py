"""Time to open a store of 10,000 shards and read a batch; memory to read all of it."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np
from coldstill.data.store.layout import SHARDS
from coldstill.data.store.reader import open_store
from measure import compare_memory, figure, write
from oracles import manifest_for, random_block, write_missing
from synthetic_store import repeat_shard

LARGE, SMALL = 10_000, 500
"""Numbers of shards."""
BATCH = 8


def main() -> None:
    """Measure with the default codec and format."""
    sizes = f"{LARGE:,} shards against {SMALL:,}"
    with tempfile.TemporaryDirectory() as folder:
        large, small = Path(folder) / "large", Path(folder) / "small"
        for root, shards in ((large, LARGE), (small, SMALL)):
            _make(root, shards)
        seconds = [_first_batch(root) for root in (large, small)]
        opening = figure(f"open and read a batch, {sizes}", seconds[0], seconds[1], "s")
        memory = compare_memory(
            f"read every batch, {sizes}",
            lambda: _read_all(large),
            lambda: _read_all(small),
        )
        write("store_opening", [opening, memory])


def _make(root: Path, shards: int) -> None:
    block = random_block(0, BATCH)
    manifest = manifest_for(block, shard_sequences=BATCH, block_sequences=BATCH, codec="compact")
    write_missing(root, manifest, block)
    repeat_shard(root, shards)
    assert len(list((root / SHARDS).iterdir())) == 2 * shards


def _first_batch(root: Path) -> float:
    started = time.perf_counter()
    store = open_store(root)
    next(store.batches(BATCH, seed=1))
    return time.perf_counter() - started


def _read_all(root: Path) -> None:
    store = open_store(root)
    for start in range(0, len(store), BATCH):
        store.read(np.arange(start, start + BATCH))


if __name__ == "__main__":
    main()
