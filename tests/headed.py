"""An output head without a model, and the same computation on whole logits in float64."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import dense
import torch
from coldstill.stages.models.output_head import OutputHead
from coldstill.stages.training.chunked_loss import Term, chunked_loss
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coldstill.data.schema import Capture
    from coldstill.stages.targets.tensors import TargetTensors

ROWS, WIDTH, VOCABULARY, PADDED = 23, 12, 60, 70


class Headed(nn.Module):
    """The part of a model that `OutputHead` needs; rows past the vocabulary are padding."""

    def __init__(self, *, bias: bool = False, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.head = nn.Linear(WIDTH, PADDED, bias=bias)
        self.device = torch.device("cpu")
        with torch.no_grad():
            for parameter in self.head.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        self.to(dtype)

    def get_output_embeddings(self) -> nn.Linear:
        return self.head


def draw(*captures: Capture) -> tuple[torch.Tensor, list[torch.Tensor], TargetTensors]:
    """Hidden states, the logits of each teacher and their targets, all but the first in float64."""
    generator = torch.Generator().manual_seed(2)
    hidden_MD = torch.randn(ROWS, WIDTH, generator=generator)
    labels_M = torch.randint(0, VOCABULARY, (ROWS,), generator=generator)
    labels_M[: ROWS // 2] = hidden_MD[: ROWS // 2].argmax(1)  # some that are easy to find
    teachers, targets = [], []
    for capture in captures:
        teachers.append(3.0 * torch.randn(ROWS, VOCABULARY, generator=generator).double())
        shifts_M = torch.rand(ROWS, generator=generator, dtype=torch.float64)
        targets.append(dense.record(teachers[-1], labels_M, shifts_M, capture))
    first, *others = targets
    return hidden_MD, teachers, dataclasses.replace(first, others=tuple(others))


def run(
    hidden_MD: torch.Tensor, target: TargetTensors, terms: Sequence[Term]
) -> tuple[float, dict[str, float], list[torch.Tensor]]:
    """Value, sums, and the gradients of hidden states and head of the chunked loss in float32."""
    model, states = Headed(), hidden_MD.clone().requires_grad_()
    rounded = dense.cast(target, torch.float32)
    total, sums = chunked_loss(OutputHead(model, VOCABULARY), states, rounded, terms)
    torch.autograd.backward(total)
    assert states.grad is not None
    assert model.head.weight.grad is not None
    gradients = [states.grad, model.head.weight.grad[:VOCABULARY]]
    return float(total.detach()), {name: float(value) for name, value in sums.items()}, gradients


def whole(hidden_MD: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """The student's whole logits in float64, and the leaves that they are computed from."""
    states = hidden_MD.double().requires_grad_()
    weight = Headed().head.weight[:VOCABULARY].detach().double().requires_grad_()
    return states @ weight.T, (states, weight)


def expect_close(
    ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor], tolerance: float = 2e-5
) -> None:
    """Two lists of gradients agree up to rounding."""
    for own, expected in zip(ours, theirs, strict=True):
        assert float((own - expected).norm()) < tolerance * float(expected.norm()) + 1e-7
