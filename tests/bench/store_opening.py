"""Opening a store of 10,000 shards and reading its first batch; memory while reading all of one."""

from __future__ import annotations

import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from coldstill.data.files import json_bytes
from coldstill.data.store.commit import commit_json, parse_commit
from coldstill.data.store.layout import MANIFEST, SHARDS, commit_name, shard_name
from coldstill.data.store.reader import open_store
from coldstill.stages.models.device import describe_machine
from measure import Figure, compare_memory, write
from oracles import manifest_for, random_block, write_missing

SHARDS_OF_ONE, SHARDS_OF_THE_OTHER = 10_000, 500
BATCH = 8


def main() -> None:
    """Measure with the default codec and store."""
    with tempfile.TemporaryDirectory() as folder:
        large, small = Path(folder) / "large", Path(folder) / "small"
        for root, shards in ((large, SHARDS_OF_ONE), (small, SHARDS_OF_THE_OTHER)):
            _make(root, shards)
        seconds = [_first_batch(root) for root in (large, small)]
        opening = Figure(
            name=f"open and read a batch, {SHARDS_OF_ONE:,} shards against {SHARDS_OF_THE_OTHER:,}",
            ours=seconds[0],
            baseline=seconds[1],
            ratio=seconds[0] / seconds[1],
            unit="s",
            machine=describe_machine(),
        )
        memory = compare_memory(
            f"read every batch, {SHARDS_OF_ONE:,} shards against {SHARDS_OF_THE_OTHER:,}",
            lambda: _read_all(large),
            lambda: _read_all(small),
        )
        write("store_opening", [opening, memory])


def _make(root: Path, shards: int) -> None:
    """One real shard, and as many copies of it as are wanted, each with a record of its own."""
    block = random_block(0, BATCH)
    manifest = manifest_for(block, shard_sequences=BATCH, block_sequences=BATCH, codec="compact")
    write_missing(root, manifest, block)
    whole = replace(manifest, sequences=BATCH * shards)
    (root / MANIFEST).write_bytes(json_bytes(whole.to_json()))
    commit = parse_commit((root / commit_name(0)).read_bytes(), "commit")
    for index in range(1, shards):
        shutil.copyfile(root / shard_name(0, ".arrow"), root / shard_name(index, ".arrow"))
        (root / commit_name(index)).write_bytes(commit_json(replace(commit, shard=index)))
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
