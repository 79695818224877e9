"""Compares the counts and sums in a commit record with those of the shard's blocks."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import numpy as np

from ..store.statistics import (
    ENTROPY_BIN_WIDTH,
    ENTROPY_BINS,
    MASS_BINS,
    ShardStatistics,
    block_statistics,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from ..schema import Block
    from ..store.commit import Commit
    from .checks import Rules

_FLOAT = 1e-6
_ANGLE = 1e-3
"""How much rounding the tail's mass may change the head's mass."""
_EDGES = {
    "entropy_bins": np.arange(1, ENTROPY_BINS) * ENTROPY_BIN_WIDTH,
    "mass_bins": np.arange(1, MASS_BINS) / MASS_BINS,
}


class Account:
    """The counts and sums of a shard's blocks."""

    def __init__(self, separator: tuple[int, ...], rules: Rules) -> None:
        """Begin without blocks."""
        self._separator = separator
        self._rules = rules
        self._counts = {"documents": 0, "tokens": 0, "positions": 0}
        self._sums = ShardStatistics()
        # at least and at most how many values lie below each border between two bins
        self._below = {name: np.zeros((2, len(edges)), int) for name, edges in _EDGES.items()}

    def add(self, block: Block) -> None:
        """Add a block that has passed `check_block`."""
        self._counts["documents"] += len(block.sequences.document_ids.values)
        self._counts["tokens"] += len(block.sequences.tokens.values)
        self._counts["positions"] += len(block.targets)
        none = np.zeros(len(block.targets))
        self._sums = self._sums.plus(block_statistics(block, self._separator, none))
        mass_M = np.exp(block.targets.head_logprobs.astype(np.float64)).sum(1)
        self._count_below("entropy_bins", block.targets.entropy, self._rules.rounding)
        # |p - q| is |sqrt p - sqrt q| times their sum, and K roots sum to sqrt K at most
        slack = 2.0 * self._rules.maximum * math.sqrt(self._rules.capture.head)
        self._count_below("mass_bins", mass_M, min(1.0, slack))

    def complaints(self, commit: Commit) -> Iterator[str]:
        """The differences from a commit record, one line each."""
        for name, count in self._counts.items():
            recorded = getattr(commit, name)
            if recorded != count:
                yield f"its commit record says {recorded:,} {name}, it holds {count:,}"
        for field in fields(ShardStatistics):
            recorded, summed = (getattr(s, field.name) for s in (commit.statistics, self._sums))
            if not self._agree(field.name, recorded, summed):
                yield f"its commit record says a {field.name} of {recorded}, it sums to {summed}"

    def _agree(self, name: str, recorded: Any, summed: Any) -> bool:
        if name in _EDGES:
            return self._agree_on_bins(name, recorded)
        if isinstance(recorded, int) and isinstance(summed, int):
            return recorded == summed
        if name == "distortion":  # the captured targets are not known here
            return bool(recorded >= 0.0)
        slack = self._counts["positions"] * self._rules.rounding
        if name == "head_mass":
            slack = self._counts["positions"] * min(_ANGLE, self._rules.maximum)
        return bool(abs(recorded - summed) <= slack + 1e-9 * abs(summed) + 1e-9)

    def _agree_on_bins(self, name: str, recorded: tuple[int, ...]) -> bool:
        """Rounded values may be in a neighbouring bin if they are near its border; none may be
        lost."""
        if sum(recorded) != self._counts["positions"]:
            return False
        least, most = self._below[name]
        bins = np.zeros(len(_EDGES[name]) + 1, np.int64)
        bins[: len(recorded)] = recorded
        below = bins.cumsum()[:-1]
        return bool(((least <= below) & (below <= most)).all())

    def _count_below(self, name: str, values_M: NDArray[Any], slack: float) -> None:
        ordered, edges = np.sort(values_M.astype(np.float64)), _EDGES[name]
        slack += _FLOAT
        self._below[name][0] += np.searchsorted(ordered, edges - slack)
        self._below[name][1] += np.searchsorted(ordered, edges + slack, side="right")
