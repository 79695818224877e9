"""Reverse KL from student to teacher: `sum_i q_i (log q_i - log p_i)`.

It seeks one mode of the teacher, whereas forward KL covers all modes (MiniLLM, arXiv 2306.08543).
It weights tokens by the student, so it needs the teacher's probability wherever the student has
mass. Computed on cells, see `partition.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from .partition import PartitionLoss

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class ReverseKL(PartitionLoss):
    """Reverse KL, `KL(q || p)`, on cells."""

    name: ClassVar[str] = "reverse_kl"
    title: ClassVar[str] = "reverse KL"

    def divergence(self, log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
        """`q (log q - log p)`."""
        return log_q.exp() * (log_q - log_p)

    def slope(self, log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
        """`g = log q - log p`; the constant 1 is left out."""
        return self.divergence(log_p, log_q)
