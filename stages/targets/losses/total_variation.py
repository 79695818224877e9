"""Total variation: `1/2 sum_i |p_i - q_i|`, between 0 and 1.

It is the probability that speculative decoding rejects a token that the student proposes, so its
minimum is the best draft model (arXiv 2211.17192; as an objective: DistillSpec, arXiv 2310.08461).
Computed on cells, see `partition.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from .partition import PartitionLoss


@dataclass(frozen=True, slots=True)
class TotalVariation(PartitionLoss):
    """Half the L1 distance, on cells."""

    name: ClassVar[str] = "total_variation"
    title: ClassVar[str] = "total variation"

    def divergence(self, log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
        """`|p - q| / 2`."""
        return 0.5 * (log_p.exp() - log_q.exp()).abs()

    def slope(self, log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
        """`g = sign(q - p) / 2`; 0 where both are equal."""
        return 0.5 * log_q.exp() * torch.sign(log_q - log_p)
