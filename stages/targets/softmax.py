"""The student's softmax, computed in the memory of the logits, and gradients written over it.

A gradient has the form `weight * softmax + a few entries`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .tensors import TargetTensors


@dataclass(slots=True, eq=False)
class StudentSoftmax:
    """The student's softmax at one chunk of positions, with log-probabilities at some tokens."""

    probs_MV: torch.Tensor
    """[M, V] probabilities, in the memory of the logits."""
    head_logprobs: torch.Tensor
    """[M, K] log-probabilities of the target's head."""
    tail_logprobs: torch.Tensor
    """[J] log-probabilities of the target's tail samples."""
    tail_places: torch.Tensor
    """[J] their places in the flattened `probs_MV`."""
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
    """[M, E] tokens at which entries are added; a token may occur twice."""
    entries: torch.Tensor
    """[M, E] the values to add at `ids`."""
    tail: torch.Tensor | None = None
    """[J] the values to add at the target's tail samples; None for a loss that uses no sample."""
    head_gradient: torch.Tensor | None = None
    """[M, K] the whole gradient at the target's head, for a loss whose `softmax_weight` is valid
    only outside the head. It is given directly, since a subtraction could lose all digits."""

    def at(self, known_M: torch.Tensor, target: TargetTensors) -> SparseGradient:
        """The same at the chosen positions, and 0 at the others."""
        tail, head = self.tail, self.head_gradient
        return SparseGradient(
            self.value * known_M,
            self.softmax_weight * known_M,
            self.ids,
            self.entries * known_M[:, None],
            tail=None if tail is None else tail * known_M[target.tail.rows()],
            head_gradient=None if head is None else head * known_M[:, None],
        )


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
        self._linear = torch.zeros_like(self._weight)  # losses without a head gradient
        self._own: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._entries: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._tails: list[tuple[torch.Tensor, torch.Tensor]] = []

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
        if sparse.tail is not None:
            self._tails.append((self._students[source].tail_places, factor * sparse.tail))

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
        for places, added in self._tails:
            total.view(-1).scatter_add_(0, places, added)
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


_CACHE_ELEMENTS = 1 << 19
"""Logits that a CPU processes at a time: 2 MB, and as much scratch memory, stay in its cache. Four
passes over a chunk of 96 MB took 12 ms instead of 48 ms."""
_DEVICE_ELEMENTS = 1 << 26
"""Logits that an accelerator processes at a time: 256 MB of scratch memory keep it busy."""


def softmax_in_place(logits_MV: torch.Tensor, target: TargetTensors) -> StudentSoftmax:
    """Turn logits into the student's softmax against one target, overwriting them."""
    return softmaxes_in_place(logits_MV, {0: target})[0]


def softmaxes_in_place(
    logits_MV: torch.Tensor, targets: Mapping[int, TargetTensors]
) -> dict[int, StudentSoftmax]:
    """Turn logits into probabilities, overwriting them; keep the log-probabilities that the targets
    need."""
    vocabulary = logits_MV.shape[1]
    wanted = [target.head_ids for target in targets.values()]
    wanted.append(next(iter(targets.values())).labels[:, None])
    rows = {source: target.tail.rows() for source, target in targets.items()}
    places = {source: rows[source] * vocabulary + t.tail.ids for source, t in targets.items()}
    chosen = logits_MV.gather(1, torch.cat(wanted, 1))
    tails = {source: logits_MV.view(-1)[at] for source, at in places.items()}
    top_M, log_norm_M, entropy_M = _softmax(logits_MV, overwrite=True)
    widths = [ids.shape[1] for ids in wanted]
    *heads, label = torch.split_with_sizes(chosen - log_norm_M[:, None], widths, 1)
    return {
        source: StudentSoftmax(
            probs_MV=logits_MV,
            head_logprobs=head,
            tail_logprobs=tails[source] - log_norm_M[rows[source]],
            tail_places=places[source],
            label_logprob=label[:, 0],
            top_logprob=top_M - log_norm_M,
            entropy=entropy_M,
        )
        for source, head in zip(targets, heads, strict=True)
    }


def entropies_and_labels(
    logits_MV: torch.Tensor, labels_M: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """[M] entropies in nats and [M] log-probabilities of the labels. The logits are not changed."""
    _, log_norm_M, entropy_M = _softmax(logits_MV, overwrite=False)
    return entropy_M, logits_MV.gather(1, labels_M[:, None])[:, 0] - log_norm_M


def _softmax(
    logits_MV: torch.Tensor, *, overwrite: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[M] largest logit, normaliser and entropy, computed for a few rows at a time.

    The normaliser is computed from the largest logit, whose probability is never small:
    `log Z = z_max - log q_max`. The entropy is `log Z - sum_i q_i z_i`.
    """
    count, vocabulary = logits_MV.shape
    elements = _CACHE_ELEMENTS if logits_MV.device.type == "cpu" else _DEVICE_ELEMENTS
    rows = min(count, max(1, elements // vocabulary))
    scratch = logits_MV.new_empty(rows, vocabulary)
    top_M, log_norm_M, entropy_M = logits_MV.new_empty(3, count).unbind()
    for start in range(0, count, rows):
        part = slice(start, min(start + rows, count))
        logits, probs = logits_MV[part], scratch[: part.stop - start]
        torch.softmax(logits, 1, out=probs)
        top_M[part] = logits.amax(1)
        log_norm_M[part] = top_M[part] - probs.amax(1).log()
        entropy_M[part] = log_norm_M[part] - torch.linalg.vecdot(probs, logits)
        if overwrite:
            logits.copy_(probs)
    return top_M, log_norm_M, entropy_M.clamp_(min=0.0)
