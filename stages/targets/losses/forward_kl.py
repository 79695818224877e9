"""Losses of the form `sum_i p_i f(q_i)`: forward KL, cross-entropy, KL with a moved residual."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from ..softmax import SparseGradient
from ..tensors import summed, tail_logprobs_at, tempered
from .loss import Loss

if TYPE_CHECKING:
    from ....data.schema import Capture
    from ..softmax import StudentSoftmax
    from ..tensors import TargetTensors
    from .loss import Support


@dataclass(frozen=True, slots=True)
class CrossEntropy(Loss):
    """Cross-entropy with the next token of the corpus, `-log q(label)`: training without a teacher.

    It reads no targets, so it is exact with any capture. With `inside` it counts only where a store
    with a student's tokens has no distribution, beside a loss that leaves these positions out.
    """

    name: ClassVar[str] = "cross_entropy"
    needs_targets: ClassVar[bool] = False
    inside_chunks: ClassVar[bool] = True
    inside: float = 0.0
    """1 to count only at positions without a distribution, 0 to count at all."""

    def refuse(self, capture: Capture, temperature: float) -> str | None:
        """The reason why `inside` is refused, or None."""
        if not self.inside or capture.chunks:
            return None
        return (
            "labels_inside is for stores with a student's tokens; in this one the teacher's "
            "distribution is known at every position: leave it out"
        )

    def support(self, capture: Capture, temperature: float, vocabulary: int) -> Support:
        return "exact"

    def value(
        self, logprobs_MV: torch.Tensor, target: TargetTensors, temperature: float
    ) -> torch.Tensor:
        value = -logprobs_MV.gather(1, target.labels[:, None])[:, 0]
        return value * ~target.known if self.inside and target.known is not None else value

    def gradient(
        self, student: StudentSoftmax, target: TargetTensors, temperature: float
    ) -> SparseGradient:
        """The loss and its gradient by the logits, `q - onehot(label)`."""
        ones = torch.ones_like(student.label_logprob)
        ids, entries = target.labels[:, None], -ones[:, None]
        sparse = SparseGradient(-student.label_logprob, ones, ids, entries)
        return (
            sparse.at(~target.known, target) if self.inside and target.known is not None else sparse
        )


@dataclass(frozen=True, slots=True)
class ForwardKL(Loss):
    """Forward KL from teacher to student: `sum_i p_i (log p_i - log q_i)`.

    With tail samples it is the full divergence: the head is exact and the rest unbiased, because
    forward KL is linear in the teacher's probabilities (sparse logit sampling, arXiv 2503.16870).
    The expected gradient equals the gradient from the teacher's whole distribution.

    Without samples (`tail = 0`) it is the divergence on the partition "each head token" and
    "everything else" (the bucket). This is a lower bound of the full divergence, and zero if the
    student agrees on the head and on the mass outside it. Plain truncation, which drops the bucket,
    is not a divergence: its minimum is a student without mass outside the head.

    Without the mass (`capture.mass`) it is the divergence on the head only: both sides are
    normalised over the head's tokens. It says nothing of the student's mass outside the head.
    """

    name: ClassVar[str] = "kl"
    inside_chunks: ClassVar[bool] = True
    needs_mass: ClassVar[bool] = False

    def support(self, capture: Capture, temperature: float, vocabulary: int) -> Support:
        if not capture.mass:
            return "on the head only"
        if capture.head >= vocabulary:
            return "exact"
        return "unbiased" if capture.tail else "a lower bound"

    def value(
        self, logprobs_MV: torch.Tensor, target: TargetTensors, temperature: float
    ) -> torch.Tensor:
        head = logprobs_MV.gather(1, target.head_ids)
        if not target.capture.mass:
            return _on_head(target, temperature, head)[0]
        tail = logprobs_MV[target.tail.rows(), target.tail.ids]
        log_rest = None
        if target.capture.tail == 0:
            log_rest = logprobs_MV.scatter(1, target.head_ids, -torch.inf).logsumexp(1)
        return _forward_kl(target, temperature, head, tail, log_rest)

    def gradient(
        self, student: StudentSoftmax, target: TargetTensors, temperature: float
    ) -> SparseGradient:
        """The loss and its gradient by the logits.

        With samples, the gradient is `q * mass - p` at head and samples. With a bucket of teacher
        mass m and student mass s, it is `q - p` on the head and `q (1 - m / s)` outside it. On the
        head only, it is `q / s - p` there, with s the student's mass on the head, and 0 outside.
        """
        if not target.capture.mass:
            value, on_head = _on_head(target, temperature, student.head_logprobs)
            nothing = target.head_ids[:, :0]
            return SparseGradient(
                value, torch.zeros_like(value), nothing, on_head[:, :0], head_gradient=on_head
            )
        teacher = tempered(target, temperature)
        head, tail = student.head_logprobs, student.tail_logprobs
        if target.capture.tail:
            value = _forward_kl(target, temperature, head, tail, None)
            mass = teacher.head.sum(1) + summed(target, teacher.tail)
            return SparseGradient(value, mass, target.head_ids, -teacher.head, tail=-teacher.tail)
        rest = student.rest(target)
        value = _forward_kl(target, temperature, head, tail, rest.log())
        # without teacher mass outside the head the gradient there is q itself
        share = torch.where(teacher.rest > 0, teacher.rest / rest, torch.zeros_like(rest))
        nothing = target.head_ids[:, :0]
        return SparseGradient(
            value, 1.0 - share, nothing, head[:, :0], head_gradient=head.exp() - teacher.head
        )


def _forward_kl(
    target: TargetTensors,
    temperature: float,
    head: torch.Tensor,
    tail: torch.Tensor,
    log_rest: torch.Tensor | None,
) -> torch.Tensor:
    """[M] the loss, from the student's log-probabilities of head [M, K], samples [J] and bucket
    [M]."""
    teacher = tempered(target, temperature)
    if log_rest is None and temperature == 1.0:
        # the entropy is known exactly; samples only estimate it
        cross = -(teacher.head * head).sum(1) - summed(target, teacher.tail * tail)
        return cross - target.entropy
    on_head = (teacher.head * (teacher.log_head - head)).sum(1)
    if log_rest is None:
        log_tail = tail_logprobs_at(target, temperature)
        return on_head + summed(target, teacher.tail * (log_tail - tail))
    bucket = teacher.rest * (teacher.rest.log() - log_rest)
    return on_head + torch.where(teacher.rest > 0, bucket, torch.zeros_like(bucket))


def _on_head(
    target: TargetTensors, temperature: float, head: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """[M] forward KL with both sides normalised over the head, and its gradient [M, K] there.

    head  [M, K] the student's log-probabilities at the temperature
    """
    log_p = (target.head_logprobs / temperature).log_softmax(1)
    log_q = head.log_softmax(1)
    return (log_p.exp() * (log_p - log_q)).sum(1), log_q.exp() - log_p.exp()


@dataclass(frozen=True, slots=True)
class ResidualToLabel(Loss):
    """`sum_i p'_i log(p'_i / q_i)`, where p' is the head with the mass outside it at the label.

    This is the "naive fix" of truncation in sparse logit sampling (arXiv 2503.16870). It corrects
    the loss of plain truncation, but not the calibration with a small head: averaged over labels, a
    head token also gets its share of the mass outside the head.
    """

    name: ClassVar[str] = "residual_to_label"

    def refuse(self, capture: Capture, temperature: float) -> str | None:
        """The reason why a capture is refused, or None; a capture without a head is refused too."""
        if (reason := Loss.refuse(self, capture, temperature)) or capture.head:
            return reason
        return (
            "it needs the teacher's most probable tokens, since all mass would go to the label: "
            "capture again with logits.head > 0, or use cross_entropy"
        )

    def support(self, capture: Capture, temperature: float, vocabulary: int) -> Support:
        return "exact" if capture.head >= vocabulary else "biased"

    def value(
        self, logprobs_MV: torch.Tensor, target: TargetTensors, temperature: float
    ) -> torch.Tensor:
        head, own = _with_residual(target, temperature)
        label = logprobs_MV.gather(1, target.labels[:, None])[:, 0]
        return _residual_kl(head, own, logprobs_MV.gather(1, target.head_ids), label)

    def gradient(
        self, student: StudentSoftmax, target: TargetTensors, temperature: float
    ) -> SparseGradient:
        """The loss and its gradient by the logits, `q - p'`."""
        head, own = _with_residual(target, temperature)
        value = _residual_kl(head, own, student.head_logprobs, student.label_logprob)
        ids = torch.cat([target.head_ids, target.labels[:, None]], 1)
        entries = torch.cat([head, own[:, None]], 1)
        return SparseGradient(value, entries.sum(1), ids, -entries)


def _with_residual(target: TargetTensors, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """[M, K] p' on the head, and [M] p' at a label outside it."""
    teacher = tempered(target, temperature)
    is_label = target.head_ids == target.labels[:, None]
    head = teacher.head + is_label * teacher.rest[:, None]
    return head, teacher.rest.masked_fill(is_label.any(1), 0.0)


def _residual_kl(
    head: torch.Tensor, own: torch.Tensor, log_head: torch.Tensor, log_label: torch.Tensor
) -> torch.Tensor:
    """[M] the loss, from p' and log q on the head and at a label outside it."""
    entropy = torch.xlogy(head, head).sum(1) + torch.xlogy(own, own)
    return entropy - (head * log_head).sum(1) - own * log_label
