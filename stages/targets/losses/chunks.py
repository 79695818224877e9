"""The likelihood of chunks: what two tokenisations of one text share without any common token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from ..softmax import SparseGradient
from ..tensors import log_norm_at
from .loss import Loss

if TYPE_CHECKING:
    from ....data.schema import Capture
    from ..softmax import StudentSoftmax
    from ..tensors import TargetTensors
    from .loss import Support

_CERTAIN = 1e-5
"""A chunk counts as at least this far from certain, in nats: the slope at a probability of 1 is
infinite."""
_IMPOSSIBLE = -1e4
"""Least log-probability of a chunk."""


@dataclass(frozen=True, slots=True)
class ChunkLikelihood(Loss):
    """Binarised KL between the probabilities of chunks (approximate likelihood matching, ALM, arXiv
    2503.20083):

        tau (p log(p / q) + (1 - p) log((1 - p) / (1 - q))),    p = P(chunk)^(1 / tau)

    with q from the student in the same way. A chunk is the text between two borders that the tokens
    of teacher and student share (`data/schema.py`); its probability is the product of those of its
    labels. In a store with the teacher's own tokens every label is a chunk. For large tau it
    becomes `b - a - a log(b / a)`, with the negative log-likelihoods a of the teacher and b of the
    student in nats. The factor tau keeps the size of the gradient when tau changes.

    It reads nothing of the teacher but the log-probabilities of labels, so it is exact with any
    capture. The first position of a chunk has its whole value; the others have 0.
    """

    name: ClassVar[str] = "chunk_likelihood"
    inside_chunks: ClassVar[bool] = True
    tau: float = 100.0
    """tau, above 0: how much the logarithms of the probabilities are damped."""

    def refuse(self, capture: Capture, temperature: float) -> str | None:
        """The reason why a capture is refused, or None: labels whose log-probability is a guess, or
        a temperature."""
        if capture.guessed_labels or not capture.mass:
            return (
                "the store was written without the log-probabilities of its labels, which it "
                "compares: write it again with label_logprob"
            )
        return self.refuse_temperature(capture, temperature)

    def support(self, capture: Capture, temperature: float, vocabulary: int) -> Support:
        return "exact"

    def value(
        self, logprobs_MV: torch.Tensor, target: TargetTensors, temperature: float
    ) -> torch.Tensor:
        own = logprobs_MV.gather(1, target.labels[:, None])[:, 0]
        return self._parts(own, target, temperature)[0]

    def gradient(
        self, student: StudentSoftmax, target: TargetTensors, temperature: float
    ) -> SparseGradient:
        """The loss and its gradient by the logits: `c (q - onehot(label))` at every label of a
        chunk, with `c = (p - q) / (1 - q)` of the chunk."""
        value, slope = self._parts(student.label_logprob, target, temperature)
        return SparseGradient(value, slope, target.labels[:, None], -slope[:, None])

    def _parts(
        self, own_M: torch.Tensor, target: TargetTensors, temperature: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[M] the value, and [M] minus its derivative by the label's log-probability."""
        theirs_M = target.label_logprob
        if temperature != 1.0:
            theirs_M = theirs_M / temperature - log_norm_at(target, temperature)
        begins = target.begins
        if begins is None:
            value, slope = self._binarised(theirs_M, own_M)
            return value, slope
        chunk_M = begins.cumsum(0) - 1
        joint_M = own_M.new_zeros(len(own_M)).index_add(0, chunk_M, own_M)
        value, slope = self._binarised(theirs_M, joint_M[chunk_M])
        # inside a chunk the teacher's value is that of its first position
        slope = slope[begins][chunk_M]
        return value * begins, slope

    def _binarised(
        self, log_p: torch.Tensor, log_q: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # in fp64, since the terms nearly cancel; no tensor here is larger than [M]
        damped_p = log_p.double().clamp(min=_IMPOSSIBLE, max=-_CERTAIN) / self.tau
        damped_q = log_q.double().clamp(min=_IMPOSSIBLE, max=-_CERTAIN) / self.tau
        p, other_p, other_q = damped_p.exp(), -torch.expm1(damped_p), -torch.expm1(damped_q)
        value = p * (damped_p - damped_q) + other_p * (other_p / other_q).log()
        # (p - q) / (1 - q), without the difference of two numbers near 1
        slope = (other_q - other_p) / other_q
        return (self.tau * value).to(log_q.dtype), slope.detach().to(log_q.dtype)
