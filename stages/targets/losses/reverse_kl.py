"""Reverse KL from student to teacher: `sum_i q_i (log q_i - log p_i)`.

It looks for a mode of the teacher's and leaves the others alone, where forward KL covers all of
them (MiniLLM, arXiv 2306.08543). Weighed by the student, so it needs to know the teacher wherever
the student has mass: see `partition.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from .partition import PartitionLoss

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class ReverseKL(PartitionLoss):
    """`KL(q || p)`, on cells."""

    name: ClassVar[str] = "reverse_kl"
    title: ClassVar[str] = "reverse KL"

    def divergence(self, log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
        """`q (log q - log p)`."""
        return log_q.exp() * (log_q - log_p)

    def slope(self, log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
        """`g = log q - log p`, and 1, which all cells share."""
        return self.divergence(log_p, log_q)
