"""The student's mass outside the head."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from coldstill.stages.targets.softmax import StudentSoftmax


def test_the_mass_outside_the_head_is_a_sum_and_keeps_its_digits() -> None:
    logits_MV = torch.tensor([[0.0, -20.0, -21.0, -22.0]])
    nothing = torch.zeros(1)
    student = StudentSoftmax(
        probs_MV=logits_MV.softmax(1),
        head_logprobs=nothing[:, None],
        tail_logprobs=nothing[:, None],
        label_logprob=nothing,
        top_logprob=nothing,
        entropy=nothing,
    )
    target: Any = SimpleNamespace(head_ids=torch.tensor([[0]]))
    exact = logits_MV.double().softmax(1)[0, 1:].sum().item()
    assert student.rest(target).item() == pytest.approx(exact, rel=1e-5)
