"""Whether the sequences of a store come in the order of their ids."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..store.manifest import Manifest


class SequenceOrder:
    """Follows the ids through a store, from shard to shard; a gap in between does no harm.

    They increase, and so none comes twice. In a merged store they do so within each of its parts:
    in another corpus the same id is another sequence.
    """

    def __init__(self, manifest: Manifest) -> None:
        """Begin before the first sequence."""
        self._ends = np.cumsum([part.sequences for part in manifest.parts], dtype=np.int64)
        self._last: tuple[int, int] | None = None

    def first_break(self, start: int, ids_N: NDArray[np.int64]) -> int | None:
        """Which of these ids, of the sequences from `start` on, is the first not above the last."""
        if len(ids_N) == 0:
            return None
        before = [] if self._last is None else [self._last]
        rows = np.concatenate([[row for row, _ in before], np.arange(start, start + len(ids_N))])
        ids = np.concatenate([np.array([i for _, i in before], np.int64), ids_N])
        part = np.searchsorted(self._ends, rows, side="right")
        back = (ids[1:] <= ids[:-1]) & (np.diff(part) == 0)
        self._last = start + len(ids_N) - 1, int(ids_N[-1])
        return int(back.argmax()) + 1 - len(before) if back.any() else None
