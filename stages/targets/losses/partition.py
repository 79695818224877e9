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
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

import torch

from ..softmax import SparseGradient
from ..tensors import tempered
from .support import refuse_temperature

if TYPE_CHECKING:
    from ....data.schema import Capture
    from ..softmax import StudentSoftmax
    from ..tensors import TargetTensors
    from .support import Support

LOG_FLOOR = math.log(1e-30)


class PartitionLoss(ABC):
    """A divergence, defined by its formula on cells and the derivative of that formula."""

    __slots__ = ()
    name: ClassVar[str]
    title: ClassVar[str]
    """The name of the divergence in messages."""
    needs_targets: ClassVar[bool] = True

    @abstractmethod
    def divergence(self, log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
        """[M, C] `f(p, q)` of each cell. The sum over cells is the divergence in nats."""

    @abstractmethod
    def slope(self, log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
        """[M, C] `q df/dq` of each cell, up to one multiple of q for all cells."""

    def refuse(self, capture: Capture, temperature: float) -> str | None:
        """Refused without a head, or without this temperature."""
        if (reason := refuse_temperature(capture, temperature)) or capture.head:
            return reason
        return (
            f"{self.title} needs the teacher's probabilities of tokens that the student prefers; "
            "samples alone do not give them: capture again with logits.head > 0"
        )

    def support(self, capture: Capture, temperature: float, vocabulary: int) -> Support:
        """Exact at head = V, a lower bound otherwise."""
        return "exact" if capture.head >= vocabulary else "a lower bound"

    def value(
        self, logprobs_MV: torch.Tensor, target: TargetTensors, temperature: float
    ) -> torch.Tensor:
        """[M] nats, from dense student log-probabilities at `temperature`."""
        log_q = logprobs_MV.gather(1, target.head_ids)
        if not _is_whole(target, logprobs_MV):
            outside = logprobs_MV.scatter(1, target.head_ids, -torch.inf)
            log_q = torch.cat([log_q, outside.logsumexp(1, keepdim=True)], 1)
        log_p = _teacher_cells(target, temperature, log_q.shape[1])
        return self.divergence(log_p, log_q).sum(1)

    def gradient(
        self, student: StudentSoftmax, target: TargetTensors, temperature: float
    ) -> SparseGradient:
        """`q_c g_c - q_c H` on the head, `q (g_rest - H)` outside it, with `H = sum_c q_c g_c`."""
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
