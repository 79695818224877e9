"""Generalised Jensen-Shannon divergence between teacher p and student q (GKD, arXiv 2306.13649):

    beta KL(p || m) + (1 - beta) KL(q || m),    m = beta p + (1 - beta) q

It is symmetric at beta = 1/2. It approaches `beta KL(p || q)` for beta towards 0 and
`(1 - beta) KL(q || p)` for beta towards 1, so that it vanishes at both ends. As usual, it is
defined there as forward KL (beta = 0) and reverse KL (beta = 1). Its scale therefore jumps at the
ends: weights are not comparable with those of other betas. Computed on cells, see `partition.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from .partition import PartitionLoss, log_mixture

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class JensenShannon(PartitionLoss):
    """Jensen-Shannon divergence on cells; at beta = 1/2 it is at most `log 2`."""

    name: ClassVar[str] = "jsd"
    title: ClassVar[str] = "the Jensen-Shannon divergence"
    beta: float = 0.5
    """Weight of the teacher in the mixture, 0 to 1."""

    def divergence(self, log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
        """`beta p log(p / m) + (1 - beta) q log(q / m)`; forward KL at 0, reverse KL at 1."""
        if self.beta == 0.0:
            return log_p.exp() * (log_p - log_q)
        if self.beta == 1.0:
            return log_q.exp() * (log_q - log_p)
        log_m = log_mixture(log_p, log_q, self.beta)
        forward = self.beta * log_p.exp() * (log_p - log_m)
        return forward + (1.0 - self.beta) * log_q.exp() * (log_q - log_m)

    def slope(self, log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
        """`g = (1 - beta) log(q / m)`; `-p / q` at beta = 0 and `log(q / p)` at beta = 1."""
        if self.beta == 0.0:
            return -log_p.exp()
        if self.beta == 1.0:
            return log_q.exp() * (log_q - log_p)
        log_m = log_mixture(log_p, log_q, self.beta)
        return (1.0 - self.beta) * log_q.exp() * (log_q - log_m)
