"""A store that is written only to be weighed."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

import numpy as np

from ...data.schema import Block
from ...data.store.layout import shard_name
from ...data.store.writer import ShardWriter

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

    from ...data.store.manifest import Manifest


class PilotStore:
    """Takes blocks in any portions, writes real shards and deletes each once it is counted."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        """Nothing is written before the context is entered."""
        self.manifest = manifest
        self._writer = ShardWriter(folder, manifest)
        self._suffix = manifest.make_store(folder).suffix
        self._held = ExitStack()
        self._waiting: list[Block] = []
        self._shard = 0
        self.bytes = 0
        """Of all shards so far, with `positions` in them."""
        self.positions = 0
        self.distortion = 0.0
        """Sum of KL(captured || stored), in nats."""
        self.seconds = 0.0
        """Spent on encoding and writing."""

    def __enter__(self) -> PilotStore:
        self._held.enter_context(self._writer)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._held.close()

    def add(self, block: Block) -> None:
        """Take some sequences; write the shards that they fill."""
        self._waiting.append(block)
        while sum(map(len, self._waiting)) >= self.manifest.shard_sequences:
            self._write(self.manifest.shard_sequences)

    def finish(self) -> None:
        """Write what is left."""
        if self._waiting:
            self._write(sum(map(len, self._waiting)))

    def _write(self, count: int) -> None:
        started = time.perf_counter()
        joined = Block.concatenate(self._waiting) if len(self._waiting) > 1 else self._waiting[0]
        commit = self._writer.write(self._shard, joined.take(np.arange(count)))
        rest = joined.take(np.arange(count, len(joined)))
        self._waiting = [rest] if len(rest) else []
        self.seconds += time.perf_counter() - started
        self._writer.place.remove(shard_name(self._shard, self._suffix))
        self._shard += 1
        self.bytes += commit.bytes
        self.positions += commit.positions
        self.distortion += commit.statistics.distortion
