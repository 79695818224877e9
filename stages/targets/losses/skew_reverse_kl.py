"""Skewed reverse KL: `KL(q || (1 - s) p + s q)` (DistiLLM, arXiv 2402.03898).

Reverse KL with a bounded gradient where the student has mass and the teacher has none: the mixture
has at least s q there, so a token costs at most `log(1 / s)`. s = 0 is reverse KL. Computed on
cells, see `partition.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from .partition import PartitionLoss, log_mixture

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class SkewReverseKL(PartitionLoss):
    """Skewed reverse KL, `KL(q || m)`, on cells."""

    name: ClassVar[str] = "skew_reverse_kl"
    title: ClassVar[str] = "skewed reverse KL"
    skew: float = 0.1
    """s, the weight of the student in the mixture."""

    def divergence(self, log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
        """`q log(q / m)`."""
        return log_q.exp() * (log_q - log_mixture(log_p, log_q, 1.0 - self.skew))

    def slope(self, log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
        """`g = log(q / m) + s (1 - q / m)`; the constant `1 - s` is left out."""
        log_ratio = log_q - log_mixture(log_p, log_q, 1.0 - self.skew)
        return log_q.exp() * (log_ratio + self.skew * (1.0 - log_ratio.exp()))
