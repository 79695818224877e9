"""The shape shared by gradients of losses that are linear in the student's log-probabilities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from ..targets import TargetTensors


@dataclass(slots=True, eq=False)
class StudentSoftmax:
    """The student's distribution over one chunk of positions, and its logarithm where asked."""

    probs_MV: torch.Tensor
    head_logprobs: torch.Tensor
    """[M, K] at the target's head."""
    tail_logprobs: torch.Tensor
    """[M, R] at its tail samples."""
    label_logprob: torch.Tensor
    """[M] at the label."""

    def rest(self, target: TargetTensors) -> torch.Tensor:
        """[M] mass outside the head: a sum over the complement, never `1 - sum` (which is noise
        exactly where the student has learned the head well). Kept above 1e-30, so that a student
        who left nothing there gets a large gradient and not an infinite one."""
        head = self.probs_MV.gather(1, target.head_ids)
        self.probs_MV.scatter_(1, target.head_ids, 0.0)
        rest = self.probs_MV.sum(1)
        self.probs_MV.scatter_(1, target.head_ids, head)
        return rest.clamp_(min=1e-30)


@dataclass(frozen=True, slots=True, eq=False)
class SparseGradient:
    """A loss and its gradient by the logits: `softmax_weight * softmax + entries`."""

    value: torch.Tensor
    """[M] nats."""
    softmax_weight: torch.Tensor
    """[M]."""
    ids: torch.Tensor
    """[M, J] where entries are added; an id may come twice."""
    entries: torch.Tensor
    """[M, J] what is added there."""
    head_gradient: torch.Tensor | None = None
    """[M, K] the whole gradient at the target's head, for a loss whose `softmax_weight` holds only
    off it: the difference of the two can be of any size, so it must not be left to subtraction."""
