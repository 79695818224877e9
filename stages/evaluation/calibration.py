"""Expected calibration error: how well a model's confidence matches its accuracy."""

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
    """Positions whose top-1 confidence is in one bin."""

    count: int
    confidence: float | None
    """Mean confidence; None for an empty bin."""
    accuracy: float | None
    """Share of positions whose most probable token is the label; None for an empty bin."""


class Calibration:
    """Expected calibration error: mean over bins of |accuracy - confidence|, by position count."""

    def __init__(self) -> None:
        """Start with empty bins."""
        self._count, self._confidence, self._correct = (np.zeros(ECE_BINS) for _ in range(3))

    def add(self, confidence: NDArray[Any], correct: NDArray[Any]) -> None:
        """Add [M] top-1 probabilities, and whether each top-1 token is correct, [M]."""
        bins = np.minimum((confidence * ECE_BINS).astype(np.int64), ECE_BINS - 1)
        self._count += np.bincount(bins, minlength=ECE_BINS)
        self._confidence += np.bincount(bins, weights=confidence, minlength=ECE_BINS)
        self._correct += np.bincount(bins, weights=correct, minlength=ECE_BINS)

    def bins(self) -> tuple[CalibrationBin, ...]:
        """All bins in the order of confidence."""
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
        """Expected calibration error, between 0 and 1."""
        total = self._count.sum()
        return float(np.abs(self._correct - self._confidence).sum() / total) if total else 0.0
