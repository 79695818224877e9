"""Whether a model's confidence is what it deserves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

ECE_BINS = 21
"""Equal bins of top-1 confidence (as in Distillation Scaling Laws, arXiv 2502.08606)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationBin:
    """The positions whose top-1 confidence lies in one bin."""

    count: int
    confidence: float | None
    """Mean of it; None where there are no such positions."""
    accuracy: float | None
    """Share of them whose most probable token is the label; likewise."""


class Calibration:
    """Expected calibration error: mean over bins of |accuracy - confidence|, by share."""

    def __init__(self) -> None:
        """Start with empty bins."""
        self._count, self._confidence, self._correct = (np.zeros(ECE_BINS) for _ in range(3))

    def add(self, confidence: NDArray[Any], correct: NDArray[Any]) -> None:
        """Take top-1 probabilities `[M]` and whether each was right `[M]`."""
        bins = np.minimum((confidence * ECE_BINS).astype(np.int64), ECE_BINS - 1)
        self._count += np.bincount(bins, minlength=ECE_BINS)
        self._confidence += np.bincount(bins, weights=confidence, minlength=ECE_BINS)
        self._correct += np.bincount(bins, weights=correct, minlength=ECE_BINS)

    def bins(self) -> tuple[CalibrationBin, ...]:
        """Every bin so far, from the least confident on."""
        sums = zip(self._count, self._confidence, self._correct, strict=True)
        return tuple(
            CalibrationBin(
                count=int(count),
                confidence=float(confidence / count) if count else None,
                accuracy=float(correct / count) if count else None,
            )
            for count, confidence, correct in sums
        )

    def error(self) -> float:
        """The error so far, between 0 and 1."""
        total = self._count.sum()
        return float(np.abs(self._correct - self._confidence).sum() / total) if total else 0.0
