"""The loss of words beside the text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ....data.errors import ColdstillError
from ..softmax import SparseGradient
from .loss import Loss

if TYPE_CHECKING:
    import torch

    from ....data.schema import Capture
    from ..softmax import StudentSoftmax
    from ..tensors import TargetTensors
    from .loss import Support


@dataclass(frozen=True, slots=True)
class BranchLikelihood(Loss):
    """`-w log q(token | text, earlier tokens of the branch)` for each token of a branch but the
    first, with the probability w that the branch stands for (`data/branches.py`).

    Together with `kl` at the branch's first token, the expectation over the draws is the forward KL
    divergence between the teacher's words and the student's spellings of them, less the teacher's
    entropy: `sum_i p_i (-log q(spelling of i))`, in which the chain rule splits the spelling.
    """

    name: ClassVar[str] = "branches"
    needs_targets: ClassVar[bool] = False
    inside_chunks: ClassVar[bool] = True
    beside_text: ClassVar[bool] = True

    def refuse(self, capture: Capture, temperature: float) -> str | None:
        """The reason why a capture without branches is refused, or None."""
        if capture.branches:
            return None
        if capture.chunks:
            return (
                "the store has no branches: set retokenize.branches above 0 (coldstill store "
                "retokenize --branches), or leave the loss out"
            )
        return (
            "it is for students with other tokens than the teacher; with the teacher's tokens "
            "every word is one token: leave it out"
        )

    def support(self, capture: Capture, temperature: float, vocabulary: int) -> Support:
        # without samples the words outside the head are not known
        return "unbiased" if capture.tail or capture.head >= vocabulary else "biased"

    def value(
        self, logprobs_MV: torch.Tensor, target: TargetTensors, temperature: float
    ) -> torch.Tensor:
        return -logprobs_MV.gather(1, target.labels[:, None])[:, 0] * _weights(target)

    def gradient(
        self, student: StudentSoftmax, target: TargetTensors, temperature: float
    ) -> SparseGradient:
        """The loss and its gradient by the logits, `w (q - onehot(label))`."""
        weights = _weights(target).to(student.label_logprob.dtype)
        ids, entries = target.labels[:, None], -weights[:, None]
        return SparseGradient(-student.label_logprob * weights, weights, ids, entries)


def _weights(target: TargetTensors) -> torch.Tensor:
    if target.weights is None:
        raise ColdstillError(
            "branches: these are targets of the text; its own are those of batch.branches, which "
            "collate(rows, branches=True) makes"
        )
    return target.weights
