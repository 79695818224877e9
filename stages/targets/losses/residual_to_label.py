"""Forward KL from the head, with the mass outside the head moved to the label. This is the "naive
fix" of truncation in sparse logit sampling (arXiv 2503.16870).

    p'_i = p_i on the head, plus 1 - sum of the head at the label;    sum_i p'_i log(p'_i / q_i)

It corrects the loss of plain truncation, but not the calibration with a small head: averaged over
labels, a head token also gets its share of the mass outside the head.
"""

from __future__ import annotations

from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class ResidualToLabel:
    """`KL(p' || q)`. Exact at head = V; otherwise p' is not the teacher's distribution."""

    name: ClassVar[str] = "residual_to_label"
    needs_targets: ClassVar[bool] = True

    def refuse(self, capture: Capture, temperature: float) -> str | None:
        """Refused without a head, or without this temperature."""
        if (reason := refuse_temperature(capture, temperature)) or capture.head:
            return reason
        return (
            "it needs the teacher's most probable tokens, since all mass would go to the label: "
            "capture again with logits.head > 0, or use cross_entropy"
        )

    def support(self, capture: Capture, temperature: float, vocabulary: int) -> Support:
        """Exact at head = V, biased otherwise."""
        return "exact" if capture.head >= vocabulary else "biased"

    def value(
        self, logprobs_MV: torch.Tensor, target: TargetTensors, temperature: float
    ) -> torch.Tensor:
        """[M] nats, from dense student log-probabilities at `temperature`."""
        label = logprobs_MV.gather(1, target.labels[:, None])[:, 0]
        head, own = _target(target, temperature)
        return _value(head, own, logprobs_MV.gather(1, target.head_ids), label)

    def gradient(
        self, student: StudentSoftmax, target: TargetTensors, temperature: float
    ) -> SparseGradient:
        """`q - p'`."""
        head, own = _target(target, temperature)
        value = _value(head, own, student.head_logprobs, student.label_logprob)
        ids = torch.cat([target.head_ids, target.labels[:, None]], 1)
        entries = torch.cat([head, own[:, None]], 1)
        return SparseGradient(value, entries.sum(1), ids, -entries)


def _target(target: TargetTensors, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """[M, K] p' on the head, and [M] p' at a label outside it."""
    teacher = tempered(target, temperature)
    is_label = target.head_ids == target.labels[:, None]
    head = teacher.head + is_label * teacher.rest[:, None]
    return head, teacher.rest.masked_fill(is_label.any(1), 0.0)


def _value(
    head: torch.Tensor, own: torch.Tensor, log_head: torch.Tensor, log_label: torch.Tensor
) -> torch.Tensor:
    """[M] from p' and log q on the head and at a label outside it."""
    entropy = torch.xlogy(head, head).sum(1) + torch.xlogy(own, own)
    return entropy - (head * log_head).sum(1) - own * log_label
