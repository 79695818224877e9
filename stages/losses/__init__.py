"""What a student can be asked to match. One file a loss, one line below.

A loss says what it is in two ways. `value` is the plain formula on dense log-probabilities: what
the tests hold everything against, and what autograd can differentiate for any loss. `gradient` is
optional: the same value and its gradient from a softmax that several losses share, as
`weight * softmax + a few entries`. Losses without it go through autograd, chunk by chunk.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Protocol

from .cross_entropy import CrossEntropy
from .forward_kl import ForwardKL

if TYPE_CHECKING:
    import torch

    from ...data.schema import Capture
    from ..targets import TargetTensors


class Loss(Protocol):
    """One objective."""

    name: ClassVar[str]
    needs_targets: ClassVar[bool]
    """Whether it reads anything of the teacher's."""

    def refuse(self, capture: Capture, temperature: float) -> str | None:
        """Why this record cannot support the loss at this temperature, or None."""
        ...

    def value(
        self, logprobs_MV: torch.Tensor, target: TargetTensors, temperature: float
    ) -> torch.Tensor:
        """[M] the loss in nats, from the student's log-probabilities at `temperature`."""
        ...


LOSSES: dict[str, Loss] = {
    "kl": ForwardKL(),
    "cross_entropy": CrossEntropy(),
}
