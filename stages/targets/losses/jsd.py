"""Generalised Jensen-Shannon divergence between teacher p and student q (GKD, arXiv 2306.13649):

    beta KL(p || m) + (1 - beta) KL(q || m),    m = beta p + (1 - beta) q

At 1/2 it is the symmetric one. It shrinks with beta towards 0 as `beta KL(p || q)` and towards 1 as
`(1 - beta) KL(q || p)`, and would be nothing at the ends. There it is defined, as in the field, by
the directions of these limits: forward KL at 0, reverse KL at 1. So its scale jumps at the ends;
compare weights between them and the middle with care. On cells: see `partition.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from .partition import PartitionLoss, log_mixture

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class JensenShannon(PartitionLoss):
    """Bounded, by `log 2` at 1/2; on cells."""

    name: ClassVar[str] = "jsd"
    title: ClassVar[str] = "the Jensen-Shannon divergence"
    beta: float = 0.5
    """How much the teacher has of the mixture."""

    def divergence(self, log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
        """`beta p log(p / m) + (1 - beta) q log(q / m)`; at 0 and 1 the forward and reverse KL."""
        if self.beta == 0.0:
            return log_p.exp() * (log_p - log_q)
        if self.beta == 1.0:
            return log_q.exp() * (log_q - log_p)
        log_m = log_mixture(log_p, log_q, self.beta)
        forward = self.beta * log_p.exp() * (log_p - log_m)
        return forward + (1.0 - self.beta) * log_q.exp() * (log_q - log_m)

    def slope(self, log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
        """`g = (1 - beta) log(q / m)`; at the ends `-p / q` and `log(q / p)`."""
        if self.beta == 0.0:
            return -log_p.exp()
        if self.beta == 1.0:
            return log_q.exp() * (log_q - log_p)
        log_m = log_mixture(log_p, log_q, self.beta)
        return (1.0 - self.beta) * log_q.exp() * (log_q - log_m)
