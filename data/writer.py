"""Adds shards to a store, each whole or not at all."""

from __future__ import annotations

import fcntl
import os
from dataclasses import asdict
from typing import TYPE_CHECKING

import numpy as np

from .alignment import labels
from .columns import from_positions, from_sequences
from .commit import Commit, ShardStatistics
from .errors import ColdstillError
from .files import remove_scratch, whole_file, write_json
from .fingerprint import file_sha256
from .layout import StoreLayout
from .manifest import Manifest, difference, read_manifest

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path
    from types import TracebackType

    from .columns import Columns
    from .schema import Block


class StoreWriter:
    """A store that is being written; a context manager that holds its lock.

    Raises, on entering
        ColdstillError: another process is writing it, or it was made by another teacher,
            tokenizer, corpus, packing or capture (which field, the old and the new value)
    """

    def __init__(self, root: Path, manifest: Manifest) -> None:
        """Name the store; nothing is touched before the context is entered."""
        self.layout = StoreLayout(root)
        self.manifest = manifest
        self._codec = manifest.make_codec(root)
        self._store = manifest.make_store(root)
        self._lock: int | None = None

    def check(self) -> None:
        """Refuse to add to a store that was made differently. Writes nothing."""
        if not self.layout.manifest.exists():
            if self.layout.shards.exists() and any(self.layout.shards.iterdir()):
                raise ColdstillError(
                    f"{self.layout.root}: holds shards but no manifest.json; move it away"
                )
            return
        if changed := difference(read_manifest(self.layout.manifest), self.manifest):
            raise ColdstillError(
                f"{self.layout.root}: made differently: {changed}; keep the store by giving this "
                "run another name, or move the folder away to make it anew"
            )

    def __enter__(self) -> StoreWriter:
        """Take the lock, write the manifest if there is none, clear what a crash left behind."""
        self.check()
        self.layout.root.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.layout.lock, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._release()
            raise ColdstillError(
                f"{self.layout.root}: another process is writing this store; wait for it"
            ) from error
        try:
            self._prepare()
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Let go of the lock."""
        self._release()

    def missing(self) -> list[int]:
        """The shards without a commit record, in order."""
        return [i for i in range(self.manifest.shards) if not self.layout.commit(i).exists()]

    def write(self, shard: int, block: Block) -> Commit:
        """Write one whole shard and commit it."""
        expected = len(self.manifest.shard_rows(shard))
        if len(block) != expected:
            raise ValueError(f"shard {shard} holds {expected} sequences, got {len(block)}")
        path = self.layout.shard(shard, self._store.suffix)
        with whole_file(path) as scratch:
            with self._store.create(scratch) as add:
                for part in self._blocks(block):
                    add(self._columns(part))
            size, checksum = scratch.stat().st_size, file_sha256(scratch)
        commit = Commit(
            shard=shard,
            sequences=len(block),
            documents=len(block.sequences.document_ids.values),
            tokens=len(block.sequences.tokens.values),
            positions=len(block.targets),
            bytes=size,
            sha256=checksum,
            statistics=statistics(block, self.manifest.packing.separator),
        )
        write_json(self.layout.commit(shard), asdict(commit))
        return commit

    def _prepare(self) -> None:
        self.check()  # it may have been made while nobody held the lock
        remove_scratch(self.layout.root)
        if not self.layout.manifest.exists():
            write_json(self.layout.manifest, self.manifest.to_json())
        self.layout.shards.mkdir(exist_ok=True)
        remove_scratch(self.layout.shards)

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _blocks(self, block: Block) -> Sequence[Block]:
        step = self.manifest.block_sequences
        rows = np.arange(len(block))
        return [block.take(rows[start : start + step]) for start in range(0, len(rows), step)]

    def _columns(self, block: Block) -> Columns:
        targets = self._codec.encode(block.targets)
        return from_sequences(block.sequences) | from_positions(targets, block.sequences.positions)


def statistics(block: Block, separator: tuple[int, ...]) -> ShardStatistics:
    """Sum what `inspect` reports, in float64."""
    targets, labels_M = block.targets, labels(block.sequences)
    head_mass = np.exp(targets.head_logprobs.astype(np.float64)).sum()
    has_head = targets.head_ids.shape[1] > 0
    correct = int((targets.head_ids[:, 0] == labels_M).sum()) if has_head else 0
    at_separator = labels_M == separator[0] if separator else np.zeros(len(labels_M), np.bool_)
    return ShardStatistics(
        loss=float(-targets.label_logprob.astype(np.float64).sum()),
        entropy=float(targets.entropy.astype(np.float64).sum()),
        head_mass=float(head_mass),
        correct=correct,
        separator_mass=float(np.exp(targets.label_logprob[at_separator].astype(np.float64)).sum()),
        separators=int(at_separator.sum()),
    )
