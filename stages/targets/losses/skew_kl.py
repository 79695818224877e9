"""Skewed forward KL: `KL(p || s p + (1 - s) q)` (DistiLLM, arXiv 2402.03898).

Forward KL with a bounded loss where the student has no mass and the teacher has some: the mixture
has at least s p there, so a token costs at most `log(1 / s)`. s = 0 is forward KL.

It is an expectation under the teacher of a function of the teacher's own probability. Tail samples
give it without bias if their log-probabilities are stored, as in captures with temperatures.
Otherwise it is a lower bound on the cells of the head (`partition.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from ..softmax import SparseGradient
from ..tensors import tail_logprobs_at, tempered
from .partition import LOG_FLOOR, PartitionLoss, log_mixture
from .support import refuse_temperature

if TYPE_CHECKING:
    from ....data.schema import Capture
    from ..softmax import StudentSoftmax
    from ..tensors import TargetTensors
    from .support import Support


@dataclass(frozen=True, slots=True)
class SkewKL(PartitionLoss):
    """Skewed KL, `KL(p || m)`: from samples with known probability, otherwise on cells."""

    name: ClassVar[str] = "skew_kl"
    title: ClassVar[str] = "skewed KL"
    skew: float = 0.1
    """s, the weight of the teacher in the mixture."""

    def divergence(self, log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
        """`p log(p / m)`."""
        return log_p.exp() * (log_p - log_mixture(log_p, log_q, self.skew))

    def slope(self, log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
        """`g = -(1 - s) p / m`."""
        return -log_p.exp() * self._share(log_q, log_mixture(log_p, log_q, self.skew))

    def refuse(self, capture: Capture, temperature: float) -> str | None:
        """Refused without probabilities, or without this temperature."""
        if (reason := refuse_temperature(capture, temperature)) or capture.head:
            return reason
        if capture.keeps_tail_logprobs:
            return None
        return (
            "skewed KL needs the teacher's probability of each token, and the store kept only the "
            "ids of its samples: capture again with logits.head > 0 or with logits.temperatures"
        )

    def support(self, capture: Capture, temperature: float, vocabulary: int) -> Support:
        """Exact at head = V, unbiased with samples of known probability, else a lower bound."""
        if capture.head < vocabulary and capture.keeps_tail_logprobs:
            return "unbiased"
        return PartitionLoss.support(self, capture, temperature, vocabulary)

    def value(
        self, logprobs_MV: torch.Tensor, target: TargetTensors, temperature: float
    ) -> torch.Tensor:
        """[M] nats, from dense student log-probabilities at `temperature`."""
        if not _has_known_samples(target):
            return PartitionLoss.value(self, logprobs_MV, target, temperature)
        ids = torch.cat([target.head_ids, target.tail_ids], 1)
        log_p, worth = _known(target, temperature)
        log_m = log_mixture(log_p, logprobs_MV.gather(1, ids), self.skew)
        return (worth * (log_p - log_m)).sum(1)

    def gradient(
        self, student: StudentSoftmax, target: TargetTensors, temperature: float
    ) -> SparseGradient:
        """With samples, `q * sum(pull) - pull`: the pull of a token is its weight times the
        student's share of the mixture."""
        if not _has_known_samples(target):
            return PartitionLoss.gradient(self, student, target, temperature)
        ids = torch.cat([target.head_ids, target.tail_ids], 1)
        log_q = torch.cat([student.head_logprobs, student.tail_logprobs], 1)
        log_p, worth = _known(target, temperature)
        log_m = log_mixture(log_p, log_q, self.skew)
        pull = worth * self._share(log_q, log_m)
        value = (worth * (log_p - log_m)).sum(1)
        return SparseGradient(value, pull.sum(1), ids, -pull)

    def _share(self, log_q: torch.Tensor, log_m: torch.Tensor) -> torch.Tensor:
        """`(1 - s) q / m`, between 0 and 1."""
        return (1.0 - self.skew) * (log_q - log_m).exp()


def _has_known_samples(target: TargetTensors) -> bool:
    return target.tail_logprobs is not None and target.tail_ids.shape[1] > 0


def _known(target: TargetTensors, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """[M, K + R] the teacher's log-probabilities of head and samples at a temperature, and their
    weights."""
    teacher = tempered(target, temperature)
    log_tail = tail_logprobs_at(target, temperature)
    log_p = torch.cat([teacher.log_head, log_tail], 1).clamp(min=LOG_FLOOR)
    return log_p, torch.cat([teacher.head, teacher.tail], 1)
