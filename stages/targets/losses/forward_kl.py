"""Forward KL from teacher to student: `sum_i p_i (log p_i - log q_i)`.

With tail samples it is the full divergence: the head is exact and the rest unbiased, because
forward KL is linear in the teacher's probabilities (sparse logit sampling, arXiv 2503.16870). The
expected gradient equals the gradient from the teacher's whole distribution.

Without samples (`tail = 0`) it is the divergence on the partition "each head token" and "everything
else" (the bucket). This is a lower bound of the full divergence, and zero if the student agrees on
the head and on the mass outside it. Plain truncation, which drops the bucket, is not a divergence:
its minimum is a student without mass outside the head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from ..softmax import SparseGradient
from ..tensors import tail_logprobs_at, tempered
from .support import refuse_temperature

if TYPE_CHECKING:
    from ....data.schema import Capture
    from ..softmax import StudentSoftmax
    from ..tensors import TargetTensors
    from .support import Support


@dataclass(frozen=True, slots=True)
class ForwardKL:
    """Exact at head = V, unbiased with tail samples, a lower bound with a head alone."""

    name: ClassVar[str] = "kl"
    needs_targets: ClassVar[bool] = True

    def refuse(self, capture: Capture, temperature: float) -> str | None:
        """Refused if the capture keeps nothing, or not at this temperature."""
        return refuse_temperature(capture, temperature)

    def support(self, capture: Capture, temperature: float, vocabulary: int) -> Support:
        """Exact at head = V, unbiased with tail samples, a lower bound with a head alone."""
        if capture.head >= vocabulary:
            return "exact"
        return "unbiased" if capture.tail else "a lower bound"

    def value(
        self, logprobs_MV: torch.Tensor, target: TargetTensors, temperature: float
    ) -> torch.Tensor:
        """[M] nats, from dense student log-probabilities at `temperature`."""
        head = logprobs_MV.gather(1, target.head_ids)
        tail = logprobs_MV.gather(1, target.tail_ids)
        outside = logprobs_MV.scatter(1, target.head_ids, -torch.inf)
        log_rest = torch.logsumexp(outside, 1) if target.tail_ids.shape[1] == 0 else None
        return _value(target, temperature, head, tail, log_rest)

    def gradient(
        self, student: StudentSoftmax, target: TargetTensors, temperature: float
    ) -> SparseGradient:
        """With samples, `q * mass - p` at head and samples. With a bucket of teacher mass m and
        student mass s, `q - p` on the head and `q (1 - m / s)` outside it."""
        teacher = tempered(target, temperature)
        head, tail = student.head_logprobs, student.tail_logprobs
        if target.tail_ids.shape[1]:
            value = _value(target, temperature, head, tail, None)
            mass = teacher.head.sum(1) + teacher.tail.sum(1)
            ids = torch.cat([target.head_ids, target.tail_ids], 1)
            return SparseGradient(value, mass, ids, -torch.cat([teacher.head, teacher.tail], 1))
        rest = student.rest(target)
        value = _value(target, temperature, head, tail, rest.log())
        # without teacher mass outside the head the gradient there is q itself
        share = torch.where(teacher.rest > 0, teacher.rest / rest, torch.zeros_like(rest))
        nothing = target.head_ids[:, :0]
        return SparseGradient(
            value, 1.0 - share, nothing, head[:, :0], head_gradient=head.exp() - teacher.head
        )


def _value(
    target: TargetTensors,
    temperature: float,
    head: torch.Tensor,
    tail: torch.Tensor,
    log_rest: torch.Tensor | None,
) -> torch.Tensor:
    """[M] from the student's log-probabilities of the head, the samples and the bucket."""
    teacher = tempered(target, temperature)
    if log_rest is not None:
        kl = (teacher.head * (teacher.log_head - head)).sum(1)
        bucket = torch.where(
            teacher.rest > 0, teacher.rest * (teacher.rest.log() - log_rest), torch.zeros_like(kl)
        )
        return kl + bucket
    if temperature == 1.0:  # the entropy is known exactly; samples only estimate it
        cross = -(teacher.head * head).sum(1) - (teacher.tail * tail).sum(1)
        return cross - target.entropy
    log_tail = tail_logprobs_at(target, temperature)
    return (teacher.head * (teacher.log_head - head)).sum(1) + (
        teacher.tail * (log_tail - tail)
    ).sum(1)
