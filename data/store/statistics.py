"""Sums over the positions of a shard, kept in its commit record."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np
from pydantic import Field

from ..alignment import labels

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from ..schema import Block

ENTROPY_BINS = 24
"""Bins of half a nat; the last bin has no upper limit."""
ENTROPY_BIN_WIDTH = 0.5
MASS_BINS = 20
"""Bins of 5 % of the probability."""

_Count = Annotated[int, Field(ge=0, le=2**62)]
_Sum = Annotated[float, Field(allow_inf_nan=False)]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardStatistics:
    """Sums over supervised positions of the captured targets, before a codec rounds them."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}
    loss: _Sum = 0.0
    """Sum of the teacher's -log p(label), in nats."""
    entropy: _Sum = 0.0
    """Sum of the teacher's entropy, in nats."""
    head_mass: _Sum = 0.0
    """Sum of the probability inside the head."""
    correct: _Count = 0
    """Positions whose most probable token is the label; 0 without a head."""
    separator_mass: _Sum = 0.0
    """Sum of the teacher's probability of the separator over positions whose label it is."""
    separators: _Count = 0
    """Number of positions whose label is the separator."""
    distortion: _Sum = 0.0
    """Sum of KL(captured || stored), in nats: the error of the codec."""
    entropy_bins: Annotated[tuple[_Count, ...], Field(max_length=ENTROPY_BINS)] = ()
    """Positions with an entropy of [0, 0.5), [0.5, 1), ... nats."""
    mass_bins: Annotated[tuple[_Count, ...], Field(max_length=MASS_BINS)] = ()
    """Positions whose head holds [0, 5), [5, 10), ... percent of the probability."""

    def plus(self, other: ShardStatistics) -> ShardStatistics:
        """The sums over both."""
        return ShardStatistics(
            **{f.name: _sum(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)}
        )


def total(statistics: Iterable[ShardStatistics]) -> ShardStatistics:
    """The sums over all of them."""
    sums = ShardStatistics()
    for one in statistics:
        sums = sums.plus(one)
    return sums


def block_statistics(
    block: Block, separator: tuple[int, ...], distortion_M: NDArray[np.float64]
) -> ShardStatistics:
    """Sum over a block, in float64.

    separator     ids between documents; the first one is counted
    distortion_M  KL(captured || stored) at each position (`data.fidelity`)
    """
    targets, labels_M = block.targets, labels(block.sequences)
    mass_M = np.exp(targets.head_logprobs.astype(np.float64)).sum(1)
    has_head = targets.head_ids.shape[1] > 0
    correct = int((targets.head_ids[:, 0] == labels_M).sum()) if has_head else 0
    at_separator = labels_M == separator[0] if separator else np.zeros(len(labels_M), np.bool_)
    return ShardStatistics(
        loss=float(-targets.label_logprob.astype(np.float64).sum()),
        entropy=float(targets.entropy.astype(np.float64).sum()),
        head_mass=float(mass_M.sum()),
        correct=correct,
        separator_mass=float(np.exp(targets.label_logprob[at_separator].astype(np.float64)).sum()),
        separators=int(at_separator.sum()),
        distortion=float(distortion_M.sum()),
        entropy_bins=_histogram(targets.entropy, ENTROPY_BIN_WIDTH, ENTROPY_BINS),
        mass_bins=_histogram(mass_M, 1 / MASS_BINS, MASS_BINS),
    )


def _histogram(values_M: NDArray[Any], width: float, bins: int) -> tuple[int, ...]:
    place_M = np.clip((values_M / width).astype(np.int64), 0, bins - 1)
    return tuple(np.bincount(place_M, minlength=bins).tolist())


def _sum(ours: Any, theirs: Any) -> Any:
    if not isinstance(ours, tuple):
        return ours + theirs
    longest = max(len(ours), len(theirs))
    pairs = zip(*(side + (0,) * (longest - len(side)) for side in (ours, theirs)), strict=True)
    return tuple(a + b for a, b in pairs)
