"""The shape shared by gradients of losses that are linear in the student's log-probabilities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..tensors import TargetTensors


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
    top_logprob: torch.Tensor
    """[M] of its most probable token: a token is the one whose log-probability equals this."""
    entropy: torch.Tensor
    """[M] of it, in nats."""

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


class GradientSum:
    """Weighted sparse gradients that share a softmax, added up and written over it.

    Losses may read the records of several teachers, whose heads differ. Where one of them gives the
    whole gradient at its head, its `softmax_weight` holds only off that head, while those of all
    others hold there too.
    """

    def __init__(
        self, students: Mapping[int, StudentSoftmax], heads: Mapping[int, torch.Tensor]
    ) -> None:
        """Start with nothing.

        students  by source; their `probs_MV` are one and the same
        heads     [M, K] token ids of each source's head
        """
        self._students, self._heads = students, heads
        first = next(iter(students.values()))
        self._probs = first.probs_MV
        self._weight = torch.zeros_like(first.label_logprob)
        self._linear = torch.zeros_like(self._weight)  # of what has no gradient of its own at heads
        self._own: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._entries: list[tuple[torch.Tensor, torch.Tensor]] = []

    def add(self, source: int, factor: float, sparse: SparseGradient) -> None:
        """Take one loss, against the record of one source."""
        weight = factor * sparse.softmax_weight
        self._weight += weight
        if sparse.head_gradient is None:
            self._linear += weight
        else:
            gradient = factor * sparse.head_gradient
            if source in self._own:
                old_gradient, old_weight = self._own[source]
                gradient, weight = old_gradient + gradient, old_weight + weight
            self._own[source] = gradient, weight
        self._entries.append((sparse.ids, factor * sparse.entries))

    def write(self) -> torch.Tensor:
        """[M, V] the sum, in the memory of the probabilities."""
        shared = {source: self._of_others(source) for source in self._own}
        total = self._probs.mul_(self._weight[:, None])
        first, others = next(iter(shared), None), list(shared)[1:]
        # a token in several heads has the same share of others in each; what a head has of its own
        # is added to that
        for source in others:
            total.scatter_(1, self._heads[source], shared[source])
        if first is not None:
            total.scatter_(1, self._heads[first], shared[first].add_(self._own[first][0]))
        for source in others:
            total.scatter_add_(1, self._heads[source], self._own[source][0])
        for ids, added in self._entries:
            total.scatter_add_(1, ids, added)
        return total

    def _of_others(self, source: int) -> torch.Tensor:
        """[M, K] the gradient at one source's head from all that is not its own there."""
        weight = self._linear[:, None]
        for other, (_, other_weight) in self._own.items():
            if other != source:
                inside = self._inside(self._heads[source], self._heads[other])
                # added up and not taken off the sum, which is of any size where heads are sure
                weight = weight + other_weight[:, None].masked_fill(inside, 0.0)
        return weight * self._students[source].head_logprobs.exp()

    def _inside(self, ids: torch.Tensor, head_ids: torch.Tensor) -> torch.Tensor:
        """[M, K] which ids are in another head: marked in the probabilities, which are restored."""
        kept = self._probs.gather(1, head_ids)
        self._probs.scatter_(1, head_ids, -1.0)
        inside = self._probs.gather(1, ids) < 0
        self._probs.scatter_(1, head_ids, kept)
        return inside
