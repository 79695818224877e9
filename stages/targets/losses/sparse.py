"""Gradients of the form `weight * softmax + a few entries`, and their sum over losses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..tensors import TargetTensors


@dataclass(slots=True, eq=False)
class StudentSoftmax:
    """The student's softmax at one chunk of positions, with log-probabilities at some tokens."""

    probs_MV: torch.Tensor
    """[M, V] probabilities, in the memory of the logits."""
    head_logprobs: torch.Tensor
    """[M, K] log-probabilities of the target's head."""
    tail_logprobs: torch.Tensor
    """[M, R] log-probabilities of the target's tail samples."""
    label_logprob: torch.Tensor
    """[M] log-probability of the label."""
    top_logprob: torch.Tensor
    """[M] log-probability of the student's most probable token; equal to a token's log-probability
    exactly if that token is the most probable one."""
    entropy: torch.Tensor
    """[M] entropy of the student, in nats."""

    def rest(self, target: TargetTensors) -> torch.Tensor:
        """[M] mass outside the head, at least 1e-30 so that gradients stay finite.

        It is a sum over the complement: `1 - sum` would be rounding noise where the student has
        learned the head well.
        """
        head = self.probs_MV.gather(1, target.head_ids)
        self.probs_MV.scatter_(1, target.head_ids, 0.0)
        rest = self.probs_MV.sum(1)
        self.probs_MV.scatter_(1, target.head_ids, head)
        return rest.clamp_(min=1e-30)


@dataclass(frozen=True, slots=True, eq=False)
class SparseGradient:
    """A loss and its gradient with respect to the logits: `softmax_weight * softmax + entries`."""

    value: torch.Tensor
    """[M] the loss in nats."""
    softmax_weight: torch.Tensor
    """[M] factor of the softmax."""
    ids: torch.Tensor
    """[M, J] tokens at which entries are added; a token may occur twice."""
    entries: torch.Tensor
    """[M, J] the values to add at `ids`."""
    head_gradient: torch.Tensor | None = None
    """[M, K] the whole gradient at the target's head, for a loss whose `softmax_weight` is valid
    only outside the head. It is given directly, since a subtraction could lose all digits."""


class GradientSum:
    """The weighted sum of sparse gradients that share a softmax, written over that softmax.

    Losses may read the targets of several teachers, whose heads differ. If a loss gives the whole
    gradient at its head, its `softmax_weight` is valid only outside that head. The weights of all
    other losses are valid there too.
    """

    def __init__(
        self, students: Mapping[int, StudentSoftmax], heads: Mapping[int, torch.Tensor]
    ) -> None:
        """Start with a sum of zero.

        students  the softmax against each source; all share one `probs_MV`
        heads     [M, K] head ids of each source
        """
        self._students, self._heads = students, heads
        first = next(iter(students.values()))
        self._probs = first.probs_MV
        self._weight = torch.zeros_like(first.label_logprob)
        self._linear = torch.zeros_like(self._weight)  # of losses without a head gradient
        self._own: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._entries: list[tuple[torch.Tensor, torch.Tensor]] = []

    def add(self, source: int, factor: float, sparse: SparseGradient) -> None:
        """Add one loss against the targets of one source."""
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
        # a token in several heads gets the same shared part from each, then each own part once
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
        """[M, K] the gradient at the head of a source, without its own head gradient."""
        weight = self._linear[:, None]
        for other, (_, other_weight) in self._own.items():
            if other != source:
                inside = self._inside(self._heads[source], self._heads[other])
                # summed, since a subtraction from the total could lose all digits
                weight = weight + other_weight[:, None].masked_fill(inside, 0.0)
        return weight * self._students[source].head_logprobs.exp()

    def _inside(self, ids: torch.Tensor, head_ids: torch.Tensor) -> torch.Tensor:
        """[M, K] which ids are in another head, which is briefly marked in the probabilities."""
        kept = self._probs.gather(1, head_ids)
        self._probs.scatter_(1, head_ids, -1.0)
        inside = self._probs.gather(1, ids) < 0
        self._probs.scatter_(1, head_ids, kept)
        return inside
