"""Every loss through the chunked head, alone and in company, against formulas on whole logits."""

from __future__ import annotations

import dense
import pytest
import torch
from coldstill.data.schema import Capture
from coldstill.stages.models import output_head
from coldstill.stages.models.output_head import OutputHead
from coldstill.stages.targets.losses import LOSSES
from coldstill.stages.training.chunked_loss import Term, chunked_loss
from formulas import PLAIN
from headed import ROWS, VOCABULARY, Headed, draw, expect_close, run, whole

WHOLE = Capture(head=VOCABULARY, tail=0, temperatures=(2.0,))
CAPTURES = {
    "whole": WHOLE,
    "bucket": Capture(head=7, tail=0, temperatures=(2.0,)),
    "head and tail": Capture(head=5, tail=8, temperatures=(2.0,)),
}
MIXED = {name: 0.1 * (place + 1) for place, name in enumerate(PLAIN)}
"""All losses at once, each by another weight."""


@pytest.mark.parametrize("chunk", [1, 5, 23])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name", PLAIN)
def test_a_whole_distribution_gives_the_formula_times_the_squared_temperature(
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


@pytest.mark.parametrize("confidence", [5.0, 20.0, 45.0])
@pytest.mark.parametrize("name", [name for name in PLAIN if PLAIN[name][0].needs_targets])
def test_no_precision_is_lost_if_the_student_is_sure_of_the_head(
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
