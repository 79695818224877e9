"""Divergences on the partition "each token of the head" and "everything else".

Some divergences are not expectations under the teacher: reverse KL weights tokens by the student,
the generalised Jensen-Shannon divergence by both. They cannot be estimated from the teacher's
samples, but they can be computed on the cells of a partition. All are f-divergences, which merging
tokens never increases (data processing inequality). The result is a lower bound of the whole
divergence and zero if both sides agree on every cell. At head = V, where the cell of everything
else is empty and left out, it is the divergence itself.

Each is a sum of `f(p_c, q_c)` over cells. With `g_c = df/dq_c` the gradient by the logits is

    dD/dz_j = q_j (g_c(j) - sum_c q_c g_c)

for a token j in the cell c(j). Outside the head this is proportional to the softmax. A loss defines
`q_c g_c`, in which the 1 / q of most divergences cancels. `g` may be shifted by any constant, since
the q_c sum to 1; each loss uses the constant for which `g` vanishes at p = q.

Teacher probabilities below 1e-30 count as 1e-30, so that a student with mass where the teacher has
none gets a large gradient and not an infinite one.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch

from ..softmax import SparseGradient
from ..tensors import summed, tail_logprobs_at, tempered
from .loss import Loss

if TYPE_CHECKING:
    from ....data.schema import Capture
    from ..softmax import StudentSoftmax
    from ..tensors import TargetTensors
    from .loss import Support

LOG_FLOOR = math.log(1e-30)


class PartitionLoss(Loss):
    """A divergence, defined by its formula on cells and the derivative of that formula."""

    __slots__ = ()
    title: ClassVar[str]
    """The name of the divergence in messages."""

    @abstractmethod
    def divergence(self, log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
        """[M, C] `f(p, q)` of each cell. The sum over cells is the divergence in nats."""

    @abstractmethod
    def slope(self, log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
        """[M, C] `q df/dq` of each cell, up to one multiple of q for all cells."""

    def refuse(self, capture: Capture, temperature: float) -> str | None:
        """The reason why a capture is refused, or None; a capture without a head is refused too."""
        if (reason := Loss.refuse(self, capture, temperature)) or capture.head:
            return reason
        return (
            f"{self.title} needs the teacher's probabilities of tokens that the student prefers; "
            "samples alone do not give them: capture again with logits.head > 0"
        )

    def support(self, capture: Capture, temperature: float, vocabulary: int) -> Support:
        return "exact" if capture.head >= vocabulary else "a lower bound"

    def value(
        self, logprobs_MV: torch.Tensor, target: TargetTensors, temperature: float
    ) -> torch.Tensor:
        log_q = logprobs_MV.gather(1, target.head_ids)
        if not _is_whole(target, logprobs_MV):
            outside = logprobs_MV.scatter(1, target.head_ids, -torch.inf)
            log_q = torch.cat([log_q, outside.logsumexp(1, keepdim=True)], 1)
        log_p = _teacher_cells(target, temperature, log_q.shape[1])
        return self.divergence(log_p, log_q).sum(1)

    def gradient(
        self, student: StudentSoftmax, target: TargetTensors, temperature: float
    ) -> SparseGradient:
        """The loss and its gradient by the logits.

        It is `q_c g_c - q_c H` on the head and `q (g_rest - H)` outside, with `H = sum_c q_c g_c`.
        """
        log_q, head = student.head_logprobs, student.head_logprobs.shape[1]
        rest = None if _is_whole(target, student.probs_MV) else student.rest(target)
        if rest is not None:
            log_q = torch.cat([log_q, rest.log()[:, None]], 1)
        log_p = _teacher_cells(target, temperature, log_q.shape[1])
        value, slope = self.divergence(log_p, log_q).sum(1), self.slope(log_p, log_q)
        total = slope.sum(1)
        on_head = slope[:, :head] - student.head_logprobs.exp() * total[:, None]
        off_head = torch.zeros_like(total) if rest is None else slope[:, head] / rest - total
        nothing = target.head_ids[:, :0]
        return SparseGradient(value, off_head, nothing, log_q[:, :0], head_gradient=on_head)


def log_mixture(log_p: torch.Tensor, log_q: torch.Tensor, share: float) -> torch.Tensor:
    """`log(share p + (1 - share) q)`; exactly log q at share 0 and log p at share 1."""
    if share in (0.0, 1.0):
        return log_p if share else log_q
    return torch.logaddexp(log_p + math.log(share), log_q + math.log1p(-share))


def _is_whole(target: TargetTensors, whole_MV: torch.Tensor) -> bool:
    """Whether the head is the whole vocabulary."""
    return target.head_ids.shape[1] == whole_MV.shape[1]


def _teacher_cells(target: TargetTensors, temperature: float, cells: int) -> torch.Tensor:
    """[M, C] the teacher's log-probability of each cell, at least log 1e-30."""
    teacher = tempered(target, temperature)
    log_p = teacher.log_head
    if cells > log_p.shape[1]:
        log_p = torch.cat([log_p, teacher.rest.log()[:, None]], 1)
    return log_p.clamp(min=LOG_FLOOR)


@dataclass(frozen=True, slots=True)
class ReverseKL(PartitionLoss):
    """Reverse KL from student to teacher, on cells: `sum_i q_i (log q_i - log p_i)`.

    It seeks one mode of the teacher, whereas forward KL covers all modes (MiniLLM, arXiv
    2306.08543). It weights tokens by the student, so it needs the teacher's probability wherever
    the student has mass.
    """

    name: ClassVar[str] = "reverse_kl"
    title: ClassVar[str] = "reverse KL"

    def divergence(self, log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
        """[M, C] `q (log q - log p)`."""
        return log_q.exp() * (log_q - log_p)

    def slope(self, log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
        """[M, C] `q g` with `g = log q - log p`; the constant 1 is left out."""
        return self.divergence(log_p, log_q)


@dataclass(frozen=True, slots=True)
class TotalVariation(PartitionLoss):
    """Total variation on cells: `1/2 sum_i |p_i - q_i|`, between 0 and 1.

    It is the probability that speculative decoding rejects a token that the student proposes, so
    its minimum is the best draft model (arXiv 2211.17192; as an objective: DistillSpec, arXiv
    2310.08461).
    """

    name: ClassVar[str] = "total_variation"
    title: ClassVar[str] = "total variation"

    def divergence(self, log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
        """[M, C] `|p - q| / 2`."""
        return 0.5 * (log_p.exp() - log_q.exp()).abs()

    def slope(self, log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
        """[M, C] `q g` with `g = sign(q - p) / 2`; 0 where both are equal."""
        return 0.5 * log_q.exp() * torch.sign(log_q - log_p)


@dataclass(frozen=True, slots=True)
class JensenShannon(PartitionLoss):
    """Generalised Jensen-Shannon divergence on cells (GKD, arXiv 2306.13649):

        beta KL(p || m) + (1 - beta) KL(q || m),    m = beta p + (1 - beta) q

    At beta = 1/2 it is symmetric and at most `log 2`. It approaches `beta KL(p || q)` for beta
    towards 0 and `(1 - beta) KL(q || p)` for beta towards 1, so that it vanishes at both ends. As
    usual, it is defined there as forward KL (beta = 0) and reverse KL (beta = 1). Its scale
    therefore jumps at the ends: weights are not comparable with those of other betas.
    """

    name: ClassVar[str] = "jsd"
    title: ClassVar[str] = "the Jensen-Shannon divergence"
    beta: float = 0.5
    """Weight of the teacher in the mixture, 0 to 1."""

    def divergence(self, log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
        """[M, C] `beta p log(p / m) + (1 - beta) q log(q / m)`; forward or reverse KL at 0 or 1."""
        if self.beta == 0.0:
            return log_p.exp() * (log_p - log_q)
        if self.beta == 1.0:
            return log_q.exp() * (log_q - log_p)
        log_m = log_mixture(log_p, log_q, self.beta)
        forward = self.beta * log_p.exp() * (log_p - log_m)
        return forward + (1.0 - self.beta) * log_q.exp() * (log_q - log_m)

    def slope(self, log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
        """[M, C] `q g` with `g = (1 - beta) log(q / m)`; `-p / q` at beta 0, `log(q / p)` at 1."""
        if self.beta == 0.0:
            return -log_p.exp()
        if self.beta == 1.0:
            return log_q.exp() * (log_q - log_p)
        log_m = log_mixture(log_p, log_q, self.beta)
        return (1.0 - self.beta) * log_q.exp() * (log_q - log_m)


@dataclass(frozen=True, slots=True)
class SkewReverseKL(PartitionLoss):
    """Skewed reverse KL on cells: `KL(q || (1 - s) p + s q)` (DistiLLM, arXiv 2402.03898).

    Reverse KL with a bounded gradient where the student has mass and the teacher has none: the
    mixture has at least s q there, so a token costs at most `log(1 / s)`. s = 0 is reverse KL.
    """

    name: ClassVar[str] = "skew_reverse_kl"
    title: ClassVar[str] = "skewed reverse KL"
    skew: float = 0.1
    """s, the weight of the student in the mixture."""

    def divergence(self, log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
        """[M, C] `q log(q / m)`."""
        return log_q.exp() * (log_q - log_mixture(log_p, log_q, 1.0 - self.skew))

    def slope(self, log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
        """[M, C] `q g` with `g = log(q / m) + s (1 - q / m)`; the constant `1 - s` is left out."""
        log_ratio = log_q - log_mixture(log_p, log_q, 1.0 - self.skew)
        return log_q.exp() * (log_ratio + self.skew * (1.0 - log_ratio.exp()))


@dataclass(frozen=True, slots=True)
class SkewKL(PartitionLoss):
    """Skewed forward KL: `KL(p || s p + (1 - s) q)` (DistiLLM, arXiv 2402.03898).

    Forward KL with a bounded loss where the student has no mass and the teacher has some: the
    mixture has at least s p there, so a token costs at most `log(1 / s)`. s = 0 is forward KL.

    It is an expectation under the teacher of a function of the teacher's own probability. Tail
    samples give it without bias if their log-probabilities are stored, as in captures with
    temperatures. Otherwise it is a lower bound on the cells of the head.
    """

    name: ClassVar[str] = "skew_kl"
    title: ClassVar[str] = "skewed KL"
    skew: float = 0.1
    """s, the weight of the teacher in the mixture."""

    def divergence(self, log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
        """[M, C] `p log(p / m)`."""
        return log_p.exp() * (log_p - log_mixture(log_p, log_q, self.skew))

    def slope(self, log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
        """[M, C] `q g` with `g = -(1 - s) p / m`."""
        return -log_p.exp() * self._share(log_q, log_mixture(log_p, log_q, self.skew))

    def refuse(self, capture: Capture, temperature: float) -> str | None:
        """The reason why a capture is refused, or None.

        A capture without a head is also refused if its samples have no log-probabilities.
        """
        if (reason := Loss.refuse(self, capture, temperature)) or capture.head:
            return reason
        if capture.keeps_tail_logprobs:
            return None
        return (
            "skewed KL needs the teacher's probability of each token, and the store kept only the "
            "ids of its samples: capture again with logits.head > 0 or with logits.temperatures"
        )

    def support(self, capture: Capture, temperature: float, vocabulary: int) -> Support:
        if capture.head < vocabulary and capture.keeps_tail_logprobs:
            return "unbiased"
        return PartitionLoss.support(self, capture, temperature, vocabulary)

    def value(
        self, logprobs_MV: torch.Tensor, target: TargetTensors, temperature: float
    ) -> torch.Tensor:
        if not _has_known_samples(target):
            return PartitionLoss.value(self, logprobs_MV, target, temperature)
        on_head, on_tail = _known(target, temperature)
        value, _ = self._pull(on_head, logprobs_MV.gather(1, target.head_ids))
        value_tail, _ = self._pull(on_tail, logprobs_MV[target.tail.rows(), target.tail.ids])
        return value.sum(1) + summed(target, value_tail)

    def gradient(
        self, student: StudentSoftmax, target: TargetTensors, temperature: float
    ) -> SparseGradient:
        """The loss and its gradient by the logits.

        With samples, it is `q * sum(pull) - pull`: the pull of a token is its weight times the
        student's share of the mixture.
        """
        if not _has_known_samples(target):
            return PartitionLoss.gradient(self, student, target, temperature)
        on_head, on_tail = _known(target, temperature)
        value, pull = self._pull(on_head, student.head_logprobs)
        value_tail, pull_tail = self._pull(on_tail, student.tail_logprobs)
        return SparseGradient(
            value.sum(1) + summed(target, value_tail),
            pull.sum(1) + summed(target, pull_tail),
            target.head_ids,
            -pull,
            tail=-pull_tail,
        )

    def _pull(self, known: _Known, log_q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The part of the loss at each token, and the token's pull."""
        log_m = log_mixture(known.log_p, log_q, self.skew)
        return known.weight * (known.log_p - log_m), known.weight * self._share(log_q, log_m)

    def _share(self, log_q: torch.Tensor, log_m: torch.Tensor) -> torch.Tensor:
        """`(1 - s) q / m`, between 0 and 1."""
        return (1.0 - self.skew) * (log_q - log_m).exp()


def _has_known_samples(target: TargetTensors) -> bool:
    return target.tail.logprobs is not None and target.capture.tail > 0


class _Known(NamedTuple):
    """Tokens whose probability under the teacher is known."""

    log_p: torch.Tensor
    """[M, K] or [J] their log-probabilities."""
    weight: torch.Tensor
    """What each stands for; the sum over all is 1 in expectation."""


def _known(target: TargetTensors, temperature: float) -> tuple[_Known, _Known]:
    """Head and samples at a temperature."""
    teacher = tempered(target, temperature)
    log_tail = tail_logprobs_at(target, temperature)
    return (
        _Known(teacher.log_head.clamp(min=LOG_FLOOR), teacher.head),
        _Known(log_tail.clamp(min=LOG_FLOOR), teacher.tail),
    )
