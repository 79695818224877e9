"""What a shard's commit record says, against what its blocks add up to."""

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
"""What rounding a tail's mass may do to the head's."""
_EDGES = {
    "entropy_bins": np.arange(1, ENTROPY_BINS) * ENTROPY_BIN_WIDTH,
    "mass_bins": np.arange(1, MASS_BINS) / MASS_BINS,
}


class Account:
    """Adds up blocks, then compares."""

    def __init__(self, separator: tuple[int, ...], rules: Rules) -> None:
        """Begin with nothing."""
        self._separator = separator
        self._rules = rules
        self._counts = {"documents": 0, "tokens": 0, "positions": 0}
        self._sums = ShardStatistics()
        # how many values lie surely below, and at most below, each border between two bins
        self._below = {name: np.zeros((2, len(edges)), int) for name, edges in _EDGES.items()}

    def add(self, block: Block) -> None:
        """Count a block in which every number is one."""
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
        """Each thing that the record says otherwise."""
        for name, count in self._counts.items():
            said = getattr(commit, name)
            if said != count:
                yield f"its commit record says {said:,} {name}, it holds {count:,}"
        for field in fields(ShardStatistics):
            said, summed = (getattr(s, field.name) for s in (commit.statistics, self._sums))
            if not self._agree(field.name, said, summed):
                yield f"its commit record says a {field.name} of {said}, it sums to {summed}"

    def _agree(self, name: str, said: Any, summed: Any) -> bool:
        if name in _EDGES:
            return self._agree_on_bins(name, said)
        if isinstance(said, int) and isinstance(summed, int):
            return said == summed
        if name == "distortion":  # what was captured is not here to compare with
            return bool(said >= 0.0)
        slack = self._counts["positions"] * self._rules.rounding
        if name == "head_mass":
            slack = self._counts["positions"] * min(_ANGLE, self._rules.maximum)
        return bool(abs(said - summed) <= slack + 1e-9 * abs(summed) + 1e-9)

    def _agree_on_bins(self, name: str, said: tuple[int, ...]) -> bool:
        """A rounded value may have crossed a border that it is near; none may be lost."""
        if sum(said) != self._counts["positions"]:
            return False
        least, most = self._below[name]
        bins = np.zeros(len(_EDGES[name]) + 1, np.int64)
        bins[: len(said)] = said
        below = bins.cumsum()[:-1]
        return bool(((least <= below) & (below <= most)).all())

    def _count_below(self, name: str, values_M: NDArray[Any], slack: float) -> None:
        ordered, edges = np.sort(values_M.astype(np.float64)), _EDGES[name]
        slack += _FLOAT
        self._below[name][0] += np.searchsorted(ordered, edges - slack)
        self._below[name][1] += np.searchsorted(ordered, edges + slack, side="right")
