"""Every loss through the chunked head, alone and in company, against formulas on whole logits."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import dense
import pytest
import torch
from coldstill.data.schema import Capture
from coldstill.stages.models import output_head
from coldstill.stages.models.output_head import OutputHead
from coldstill.stages.targets.losses import LOSSES
from coldstill.stages.training.chunked_loss import Term, chunked_loss
from formulas import PLAIN
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coldstill.stages.targets.tensors import TargetTensors

ROWS, WIDTH, VOCABULARY = 23, 12, 60
WHOLE = Capture(head=VOCABULARY, tail=0, temperatures=(2.0,))
CAPTURES = {
    "whole": WHOLE,
    "bucket": Capture(head=7, tail=0, temperatures=(2.0,)),
    "head and tail": Capture(head=5, tail=8, temperatures=(2.0,)),
}
MIXED = {name: 0.1 * (place + 1) for place, name in enumerate(PLAIN)}
"""All losses at once, each by another weight."""


class PreciseHead(OutputHead):
    """Hands logits through in float64: finite differences need the digits."""

    def buffer(self, positions: int, device: torch.device) -> torch.Tensor:
        return super().buffer(positions, device).double()


class Headed(nn.Module):
    """As much of a model as its head needs."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.head = nn.Linear(WIDTH, VOCABULARY + 4, bias=False)
        with torch.no_grad():
            self.head.weight.copy_(torch.randn(VOCABULARY + 4, WIDTH, generator=generator))
        self.to(dtype)

    def get_output_embeddings(self) -> nn.Linear:
        return self.head


def draw(*captures: Capture) -> tuple[torch.Tensor, list[torch.Tensor], TargetTensors]:
    """Hidden states, each teacher's logits, and what was kept of all of them, in float64."""
    generator = torch.Generator().manual_seed(2)
    hidden_MD = torch.randn(ROWS, WIDTH, generator=generator)
    labels_M = torch.randint(0, VOCABULARY, (ROWS,), generator=generator)
    teachers, records = [], []
    for capture in captures:
        teachers.append(3.0 * torch.randn(ROWS, VOCABULARY, generator=generator).double())
        shifts_M = torch.rand(ROWS, generator=generator, dtype=torch.float64)
        records.append(dense.record(teachers[-1], labels_M, shifts_M, capture))
    first, *others = records
    return hidden_MD, teachers, dataclasses.replace(first, others=tuple(others))


def run(
    hidden_MD: torch.Tensor, target: TargetTensors, terms: Sequence[Term]
) -> tuple[float, dict[str, float], list[torch.Tensor]]:
    """Value, sums, and the gradients of hidden states and head."""
    model, states = Headed(), hidden_MD.clone().requires_grad_()
    rounded = dense.cast(target, torch.float32)
    rounded = dataclasses.replace(
        rounded, others=tuple(dense.cast(other, torch.float32) for other in target.others)
    )
    total, sums = chunked_loss(OutputHead(model, VOCABULARY), states, rounded, terms)
    torch.autograd.backward(total)
    assert states.grad is not None
    assert model.head.weight.grad is not None
    gradients = [states.grad, model.head.weight.grad[:VOCABULARY]]
    return float(total.detach()), {name: float(value) for name, value in sums.items()}, gradients


def whole(hidden_MD: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """The same student's logits in float64, and what they are made of."""
    states = hidden_MD.double().requires_grad_()
    weight = Headed().head.weight[:VOCABULARY].detach().double().requires_grad_()
    return states @ weight.T, (states, weight)


def expect_close(
    ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor], tolerance: float = 2e-5
) -> None:
    for own, expected in zip(ours, theirs, strict=True):
        assert float((own - expected).norm()) < tolerance * float(expected.norm()) + 1e-7


@pytest.mark.parametrize("chunk", [1, 5, 23])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name", PLAIN)
def test_a_whole_record_gives_the_formula_times_the_squared_temperature_once(
    name: str, temperature: float, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output_head, "CHUNK_ELEMENTS", chunk * VOCABULARY)
    hidden_MD, (teacher_MV,), target = draw(WHOLE)
    loss, formula = PLAIN[name]
    value, sums, gradients = run(hidden_MD, target, [Term(loss, 0.7, temperature)])
    logits_MV, leaves = whole(hidden_MD)
    p, q = ((logits / temperature).softmax(1) for logits in (teacher_MV, logits_MV))
    expected = formula(p, q, target.labels).sum()
    objective = 0.7 * temperature**2 * expected
    expect_close(gradients, torch.autograd.grad(objective, leaves))
    assert sums[loss.name] == pytest.approx(float(expected.detach()), rel=1e-5, abs=1e-5)
    assert value == pytest.approx(float(objective.detach()), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name", PLAIN)
def test_the_gradient_is_how_the_value_changes(name: str, temperature: float, capture: str) -> None:
    """Finite differences of the chunked value itself, in float64, by every logit's direction."""
    _, _, target = draw(CAPTURES[capture])
    generator = torch.Generator().manual_seed(3)
    logits_MV = 2.0 * torch.randn(ROWS, VOCABULARY, generator=generator).double()
    head = PreciseHead(Headed(torch.float64), VOCABULARY, whole=True)
    loss = PLAIN[name][0]
    terms = [Term(loss, 1.0, temperature)]
    states = logits_MV.clone().requires_grad_()
    torch.autograd.backward(chunked_loss(head, states, target, terms)[0])
    assert states.grad is not None
    step = 1e-5
    for _ in range(4):
        direction = torch.randn(logits_MV.shape, generator=generator).double()
        ahead, behind = (
            chunked_loss(head, logits_MV + sign * step * direction, target, terms)[1][loss.name]
            for sign in (1, -1)
        )
        slope = temperature**2 * float(ahead - behind) / (2 * step)
        found = float((states.grad * direction).sum())
        assert found == pytest.approx(slope, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("chunk", [1, 7, 23])
@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_losses_are_added_by_their_weights(
    temperature: float, capture: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output_head, "CHUNK_ELEMENTS", chunk * VOCABULARY)
    hidden_MD, _, target = draw(CAPTURES[capture])
    terms = [
        Term(loss, MIXED[name], temperature if loss.needs_targets else 1.0)
        for name, loss in LOSSES.items()
    ]
    value, sums, gradients = run(hidden_MD, target, terms)
    logits_MV, leaves = whole(hidden_MD)
    objective = logits_MV.new_zeros(())
    for term in terms:
        logprobs = (logits_MV / term.temperature).log_softmax(1)
        alone = term.loss.value(logprobs, target, term.temperature).sum()
        assert sums[term.loss.name] == pytest.approx(float(alone.detach()), rel=1e-5)
        objective = objective + term.weight * term.temperature**2 * alone
    expect_close(gradients, torch.autograd.grad(objective, leaves))
    assert value == pytest.approx(float(objective.detach()), rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_losses_are_added_over_teachers_whose_heads_differ(temperature: float) -> None:
    captures, shares = (CAPTURES["bucket"], CAPTURES["head and tail"]), (0.7, 0.3)
    hidden_MD, _, target = draw(*captures)
    terms = [
        Term(loss, MIXED[name], temperature, source, share)
        for source, share in enumerate(shares)
        for name, loss in LOSSES.items()
        if loss.needs_targets
    ]
    value, sums, gradients = run(hidden_MD, target, terms)
    logits_MV, leaves = whole(hidden_MD)
    logprobs = (logits_MV / temperature).log_softmax(1)
    objective = logits_MV.new_zeros(())
    for term in terms:
        alone = term.loss.value(logprobs, target.sources[term.source], temperature).sum()
        named = sums[f"{term.loss.name}_teacher_{term.source}"]
        assert named == pytest.approx(float(alone.detach()), rel=1e-5)
        objective = objective + term.share * term.weight * temperature**2 * alone
    expect_close(gradients, torch.autograd.grad(objective, leaves))
    assert value == pytest.approx(float(objective.detach()), rel=1e-5)


@pytest.mark.parametrize("confidence", [5.0, 20.0, 45.0])
@pytest.mark.parametrize("name", [name for name in PLAIN if PLAIN[name][0].needs_targets])
def test_nothing_cancels_however_sure_of_the_head_the_student_is(
    name: str, confidence: float
) -> None:
    """In float32, to nearly as many digits as float64 has it."""
    generator = torch.Generator().manual_seed(0)
    teacher_MV = torch.randn(ROWS, VOCABULARY, generator=generator).double()
    labels_M = torch.randint(0, VOCABULARY, (ROWS,), generator=generator)
    capture = Capture(head=8, tail=0)
    exact = dense.record(teacher_MV, labels_M, torch.zeros(ROWS), capture)
    student_MV = torch.randn(ROWS, VOCABULARY, generator=generator)
    student_MV.scatter_add_(1, exact.head_ids, torch.full((ROWS, 8), confidence))
    leaf = student_MV.double().requires_grad_()
    loss = PLAIN[name][0]
    alone = loss.value(leaf.log_softmax(1), exact, 1.0).sum() + 0.0 * leaf.sum()
    torch.autograd.backward(alone)
    states = student_MV.clone().requires_grad_()
    head = OutputHead(Headed(), VOCABULARY, whole=True)
    total, _ = chunked_loss(head, states, dense.cast(exact, torch.float32), [Term(loss, 1.0)])
    torch.autograd.backward(total)
    assert leaf.grad is not None
    assert states.grad is not None
    torch.testing.assert_close(states.grad.double(), leaf.grad, rtol=0.0, atol=4e-6)
    assert float(total.detach()) == pytest.approx(float(alone.detach()), rel=1e-5, abs=1e-5)
