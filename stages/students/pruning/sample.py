"""What importance is measured on: some sequences of a store, as its teacher read them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from ....data.schema import Sequences
    from ....data.store.reader import StoreReader
    from ...models.isolation import Isolation

_BATCH_TOKENS = 8192
"""Of a forward pass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Sequences, and how the model at hand keeps their documents apart."""

    store: StoreReader
    rows: NDArray[np.int64]
    """These sequences of the store, increasing."""
    isolation: Isolation

    def __len__(self) -> int:
        return len(self.rows)

    def batches(self) -> Iterator[Sequences]:
        """All of them in order, some at a time."""
        count = max(1, _BATCH_TOKENS // self.store.manifest.packing.sequence_length)
        for start in range(0, len(self.rows), count):
            yield self.store.read(self.rows[start : start + count]).sequences


def sample_of(store: StoreReader, count: int, seed: int, isolation: Isolation) -> Sample:
    """A seeded sample of a store's sequences, or all where it has no more than `count`."""
    # the beginning of a student's order: of a few shards, so that a distant store need not be
    # fetched whole for a sequence of each
    rows = np.sort(store.order(seed, 0)[:count])
    store.will_read(rows)
    return Sample(store=store, rows=rows, isolation=isolation)
