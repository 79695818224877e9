"""Reads a store: a path is all it needs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .columns import check_hashes, to_positions, to_sequences
from .commit import Commit, ShardStatistics, read_commit, total
from .errors import ColdstillError
from .fingerprint import file_sha256
from .layout import StoreLayout
from .manifest import Manifest, read_manifest
from .order import epoch_order
from .schema import Block

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from .stores import Shard


class StoreReader:
    """A whole store: it has a length, reads any sequences, and yields batches."""

    def __init__(self, root: Path, manifest: Manifest, commits: dict[int, Commit]) -> None:
        """Use `open_store`, which checks what this takes for granted."""
        self.layout = StoreLayout(root)
        self.manifest = manifest
        self.commits = commits
        self._codec = manifest.make_codec(root)
        self._store = manifest.make_store(root)
        self._open: dict[int, Shard] = {}

    def __len__(self) -> int:
        """How many sequences the store holds."""
        return self.manifest.sequences

    @property
    def positions(self) -> int:
        """How many supervised positions the store holds."""
        return sum(commit.positions for commit in self.commits.values())

    @property
    def statistics(self) -> ShardStatistics:
        """The teacher's sums over all positions."""
        return total(self.commits.values())

    def read(self, rows: NDArray[np.int64]) -> Block:
        """The chosen sequences with their targets, in the order given.

        Raises
            IndexError: there is no such sequence
            ColdstillError: a shard is damaged (which, and how)
        """
        rows = np.asarray(rows, dtype=np.int64)
        if len(rows) == 0 or rows.min() < 0 or rows.max() >= len(self):
            raise IndexError(f"sequences {rows.tolist()} of {len(self)}")
        shard_N, place_N = np.divmod(rows, self.manifest.shard_sequences)
        block_N, within_N = np.divmod(place_N, self.manifest.block_sequences)
        parts, found = [], []
        for shard, number in sorted(set(zip(shard_N.tolist(), block_N.tolist(), strict=True))):
            chosen = np.flatnonzero((shard_N == shard) & (block_N == number))
            parts.append(self._block(shard, number, within_N[chosen]))
            found.append(chosen)
        joined = Block.concatenate(parts) if len(parts) > 1 else parts[0]
        return joined.take(np.argsort(np.concatenate(found), kind="stable"))

    def batches(self, size: int, *, seed: int | None = None, epoch: int = 0) -> Iterator[Block]:
        """Every sequence once, `size` at a time: in store order, or in a seeded one."""
        order = (
            np.arange(len(self))
            if seed is None
            else epoch_order(seed, epoch, len(self), self.manifest.shard_sequences)
        )
        for start in range(0, len(order), size):
            yield self.read(order[start : start + size])

    def _block(self, shard: int, number: int, rows: NDArray[np.int64]) -> Block:
        where = str(self.layout.shard(shard, self._store.suffix))
        columns = self._shard(shard).read(number)
        try:
            sequences = to_sequences(columns)
            expected = len(self.manifest.block_rows(shard, number))
            if len(sequences) != expected:
                raise ValueError(f"holds {len(sequences)} sequences, expected {expected}")
            arrays = to_positions(columns, sequences.positions)
            targets = self._codec.decode(arrays, self.manifest.capture)
            whole = Block(sequences=sequences, targets=targets, capture=self.manifest.capture)
            block = whole.take(rows)
            check_hashes(block.sequences)
        except (ValueError, KeyError, IndexError) as error:
            raise ColdstillError(f"{where}: block {number}: {error}") from error
        return block

    def _shard(self, index: int) -> Shard:
        if index not in self._open:
            path = self.layout.shard(index, self._store.suffix)
            # once per process: a shard is read many times, and only damage on disk can change it
            if file_sha256(path) != self.commits[index].sha256:
                raise ColdstillError(
                    f"{path}: damaged: its checksum is not the one it was written with; delete "
                    f"{self.layout.commit(index).name} beside it and run teacher-logits again"
                )
            opened = self._store.open(path)
            blocks = -(-self.commits[index].sequences // self.manifest.block_sequences)
            if opened.blocks != blocks:
                raise ColdstillError(f"{path}: has {opened.blocks} blocks, expected {blocks}")
            self._open[index] = opened
        return self._open[index]


def open_store(path: str | Path) -> StoreReader:
    """Open a whole store without reading its data.

    Raises
        ColdstillError: no store, an incomplete one, or one whose shards are not what was committed
    """
    root = Path(path)
    layout = StoreLayout(root)
    if not layout.manifest.exists():
        raise ColdstillError(f"{root}: no store here; make it with coldstill teacher-logits")
    manifest = read_manifest(layout.manifest)
    commits = read_commits(layout, manifest)
    if len(commits) < manifest.shards:
        raise ColdstillError(
            f"{root}: incomplete, {len(commits)} of {manifest.shards} shards; finish it with "
            "coldstill teacher-logits"
        )
    return StoreReader(root, manifest, commits)


def read_commits(layout: StoreLayout, manifest: Manifest) -> dict[int, Commit]:
    """The commit records that are there, each checked against the manifest and its shard's size."""
    suffix = manifest.make_store(layout.root).suffix
    commits = {}
    for index in layout.committed():  # not the shards promised: a damaged manifest promises any
        if index >= manifest.shards:
            continue
        record, shard = layout.commit(index), layout.shard(index, suffix)
        commit = read_commit(record)
        size = shard.stat().st_size if shard.exists() else None
        rows = len(manifest.shard_rows(index))
        if (commit.shard, commit.sequences, commit.bytes) != (index, rows, size):
            raise ColdstillError(
                f"{shard}: damaged: {'missing' if size is None else f'{size} bytes'}, its commit "
                f"record says shard {commit.shard} with {commit.sequences} sequences in "
                f"{commit.bytes} bytes; delete {record.name} and run teacher-logits again"
            )
        commits[index] = commit
    return commits
