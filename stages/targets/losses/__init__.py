"""What a student can be asked to match. One file a loss, one line below.

A loss says what it is in two ways. `value` is the plain formula on dense log-probabilities: what
the tests hold everything against, and what autograd can differentiate for any loss. `gradient` is
optional: the same value and its gradient from a softmax that several losses share, as
`weight * softmax + a few entries`. Losses without it go through autograd, chunk by chunk.

What a record makes of each (`support`; K is its head, R its tail samples):

    loss               K = V   K, R > 0     K = 0, R > 0  K > 0, R = 0
    cross_entropy      exact   exact        exact         exact
    kl                 exact   unbiased     unbiased      lower bound
    reverse_kl         exact   lower bound  refused       lower bound
    jsd                exact   lower bound  refused       lower bound
    total_variation    exact   lower bound  refused       lower bound
    skew_kl            exact   unbiased *   unbiased *    lower bound
    skew_reverse_kl    exact   lower bound  refused       lower bound
    residual_to_label  exact   biased       refused       biased

    * where the samples' log-probabilities are stored, as with captured temperatures; elsewhere a
      lower bound with a head and refused without one

The same holds at every temperature that was captured; others are refused. A lower bound is the
divergence on the cells "each head token, and everything else": zero where the student agrees on
all of them. Biased means that the target is another distribution than the teacher's.

Fields of a loss are its parameters, which the recipe's objective sets by their names.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Protocol

from .cross_entropy import CrossEntropy
from .forward_kl import ForwardKL
from .jsd import JensenShannon
from .residual_to_label import ResidualToLabel
from .reverse_kl import ReverseKL
from .skew_kl import SkewKL
from .skew_reverse_kl import SkewReverseKL
from .total_variation import TotalVariation

if TYPE_CHECKING:
    import torch

    from ....data.schema import Capture
    from ..tensors import TargetTensors
    from .support import Support


class Loss(Protocol):
    """One objective."""

    name: ClassVar[str]
    needs_targets: ClassVar[bool]
    """Whether it reads anything of the teacher's."""

    def refuse(self, capture: Capture, temperature: float) -> str | None:
        """Why this record cannot support the loss at this temperature, or None."""
        ...

    def support(self, capture: Capture, temperature: float, vocabulary: int) -> Support:
        """What a record that is not refused gives, of a teacher with so many tokens."""
        ...

    def value(
        self, logprobs_MV: torch.Tensor, target: TargetTensors, temperature: float
    ) -> torch.Tensor:
        """[M] the loss in nats, from the student's log-probabilities at `temperature`."""
        ...


LOSSES: dict[str, Loss] = {
    "kl": ForwardKL(),
    "cross_entropy": CrossEntropy(),
    "reverse_kl": ReverseKL(),
    "jsd": JensenShannon(),
    "total_variation": TotalVariation(),
    "skew_kl": SkewKL(),
    "skew_reverse_kl": SkewReverseKL(),
    "residual_to_label": ResidualToLabel(),
}
