"""Cross-entropy with the next token of the corpus: the loss of training without a teacher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from ..softmax import SparseGradient

if TYPE_CHECKING:
    from ....data.schema import Capture
    from ..softmax import StudentSoftmax
    from ..tensors import TargetTensors
    from .support import Support


@dataclass(frozen=True, slots=True)
class CrossEntropy:
    """`-log q(label)`. It reads no targets, so it is exact with any capture."""

    name: ClassVar[str] = "cross_entropy"
    needs_targets: ClassVar[bool] = False

    def refuse(self, capture: Capture, temperature: float) -> str | None:
        """Never refused."""
        return None

    def support(self, capture: Capture, temperature: float, vocabulary: int) -> Support:
        """Always exact."""
        return "exact"

    def value(
        self, logprobs_MV: torch.Tensor, target: TargetTensors, temperature: float
    ) -> torch.Tensor:
        """[M] nats."""
        return -logprobs_MV.gather(1, target.labels[:, None])[:, 0]

    def gradient(
        self, student: StudentSoftmax, target: TargetTensors, temperature: float
    ) -> SparseGradient:
        """`q - onehot(label)`."""
        ones = torch.ones_like(student.label_logprob)
        return SparseGradient(-student.label_logprob, ones, target.labels[:, None], -ones[:, None])
