"""Several teachers in one loss, against whole distributions."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

import dense
import pytest
import torch
from coldstill.data.errors import ColdstillError
from coldstill.data.schema import Capture
from coldstill.stages.config import ObjectiveConfig
from coldstill.stages.models.output_head import OutputHead
from coldstill.stages.targets.losses import LOSSES
from coldstill.stages.targets.losses.loss import Loss
from coldstill.stages.training.chunked_loss import COUNTS, Term, chunked_loss
from coldstill.stages.training.objective import mixed_terms, terms_of
from headed import ROWS, VOCABULARY, Headed, draw, expect_close, run, whole

if TYPE_CHECKING:
    from coldstill.stages.targets.losses.loss import Support
    from coldstill.stages.targets.tensors import TargetTensors

SHARES = (0.7, 0.3)
KL, CE = LOSSES["kl"], LOSSES["cross_entropy"]
TEMPERATURES = (2.0,)


class GenericKL(Loss):
    """Forward KL without its closed form: what autograd makes of the formula."""

    name: ClassVar[str] = "kl"

    def refuse(self, capture: Capture, temperature: float) -> str | None:
        return None

    def support(self, capture: Capture, temperature: float, vocabulary: int) -> Support:
        return KL.support(capture, temperature, vocabulary)

    def value(
        self, logprobs_MV: torch.Tensor, target: TargetTensors, temperature: float
    ) -> torch.Tensor:
        return KL.value(logprobs_MV, target, temperature)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("loss", [KL, GenericKL()], ids=["closed form", "autograd"])
def test_whole_distributions_give_the_divergence_from_the_mixture(
    loss: Any, temperature: float
) -> None:
    """In gradient exactly; in value but for what the teachers differ by."""
    everything = Capture(head=VOCABULARY, tail=0, temperatures=TEMPERATURES)
    hidden_MD, teachers, target = draw(everything, everything)
    terms = [Term(loss, 0.9, temperature, source, share) for source, share in enumerate(SHARES)]
    value, sums, gradients = run(hidden_MD, target, [*terms, Term(CE, 0.2)])

    logits_MV, leaves = whole(hidden_MD)
    probs = [(teacher.double() / temperature).softmax(1) for teacher in teachers]
    mixture = SHARES[0] * probs[0] + SHARES[1] * probs[1]
    logprobs = (logits_MV / temperature).log_softmax(1)
    kl = (mixture * (mixture.log() - logprobs)).sum()
    objective = 0.9 * temperature**2 * kl
    objective = objective + 0.2 * dense.cross_entropy(logits_MV, target.labels).sum()
    expect_close(gradients, torch.autograd.grad(objective, leaves))

    apart = [float((p * (p.log() - mixture.log())).sum()) for p in probs]
    constant = sum(share * each for share, each in zip(SHARES, apart, strict=True))
    assert constant > 1.0
    assert sums["kl"] == pytest.approx(float(kl.detach()) + constant, rel=1e-5)
    expected = float(objective.detach()) + 0.9 * temperature**2 * constant
    assert value == pytest.approx(expected, rel=1e-5)
    for source, teacher in enumerate(teachers):
        alone = dense.forward_kl(teacher, logits_MV, temperature).sum()
        assert sums[f"kl_teacher_{source}"] == pytest.approx(float(alone.detach()), rel=1e-5)


RECORDS = {
    "head": Capture(head=9, tail=0, temperatures=TEMPERATURES),
    "samples": Capture(head=0, tail=11, temperatures=TEMPERATURES),
    "head and samples": Capture(head=5, tail=7, temperatures=TEMPERATURES),
    "short head": Capture(head=3, tail=0, temperatures=TEMPERATURES),
}


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("second", RECORDS)
@pytest.mark.parametrize("first", RECORDS)
def test_targets_of_any_shape_add_up_by_their_shares(
    first: str, second: str, temperature: float
) -> None:
    """Against each record's own formula on whole logits, differentiated by autograd."""
    hidden_MD, _, target = draw(RECORDS[first], RECORDS[second], RECORDS["head"])
    shares = (0.5, 0.3, 0.2)
    terms = [Term(KL, 0.9, temperature, source, share) for source, share in enumerate(shares)]
    value, sums, gradients = run(hidden_MD, target, [*terms, Term(CE, 0.2)])
    logits_MV, leaves = whole(hidden_MD)
    logprobs = (logits_MV / temperature).log_softmax(1)
    kl = torch.stack([KL.value(logprobs, one, temperature).sum() for one in target.sources])
    mixed = (kl * torch.tensor(shares)).sum()
    objective = 0.9 * temperature**2 * mixed
    objective = objective + 0.2 * CE.value(logits_MV.log_softmax(1), target, 1.0).sum()
    expect_close(gradients, torch.autograd.grad(objective, leaves))
    assert value == pytest.approx(float(objective.detach()), rel=1e-5)
    assert sums["kl"] == pytest.approx(float(mixed.detach()), rel=1e-5)


def test_losses_with_and_without_a_closed_form_can_be_mixed() -> None:
    hidden_MD, _, target = draw(RECORDS["head"], RECORDS["short head"])
    terms = [Term(KL, 0.9, 1.0, 0, 0.6), Term(KL, 0.9, 1.0, 1, 0.4)]
    value, sums, gradients = run(hidden_MD, target, terms)
    for source in (0, 1):
        beside = [dataclasses.replace(term) for term in terms]
        beside[source] = dataclasses.replace(terms[source], loss=GenericKL())
        other_value, other_sums, other_gradients = run(hidden_MD, target, beside)
        assert other_value == pytest.approx(value, rel=1e-5)
        assert other_sums == pytest.approx(sums, rel=1e-5)
        expect_close(other_gradients, gradients)


@pytest.mark.parametrize("confidence", [5.0, 30.0])
def test_two_buckets_lose_no_precision_if_the_student_is_sure_of_a_head(
    confidence: float,
) -> None:
    """The heads overlap in part, and the student leaves nothing beside the first."""
    generator = torch.Generator().manual_seed(0)
    teachers = [torch.randn(ROWS, VOCABULARY, generator=generator) for _ in range(2)]
    labels_M = torch.randint(0, VOCABULARY, (ROWS,), generator=generator)
    exact = [
        dense.record(teacher, labels_M, torch.zeros(ROWS), Capture(head=8, tail=0))
        for teacher in teachers
    ]
    common = (exact[0].head_ids[:, :, None] == exact[1].head_ids[:, None]).any(2)
    assert common.any()
    assert not common.all()
    student_MV = torch.randn(ROWS, VOCABULARY, generator=generator)
    student_MV.scatter_add_(1, exact[0].head_ids, torch.full((ROWS, 8), confidence))

    leaf = student_MV.double().requires_grad_()
    logprobs = leaf.log_softmax(1)
    values = [s * KL.value(logprobs, one, 1.0).sum() for s, one in zip(SHARES, exact, strict=True)]
    torch.autograd.backward(torch.stack(values).sum())

    states = student_MV.clone().requires_grad_()
    first, second = (dense.cast(one, torch.float32) for one in exact)
    terms = [Term(KL, 1.0, 1.0, source, share) for source, share in enumerate(SHARES)]
    target = dataclasses.replace(first, others=(second,))
    total, _ = chunked_loss(OutputHead(Headed(), VOCABULARY, whole=True), states, target, terms)
    torch.autograd.backward(total)
    assert leaf.grad is not None
    assert states.grad is not None
    torch.testing.assert_close(states.grad.double(), leaf.grad, rtol=0.0, atol=2e-6)


@pytest.mark.parametrize("chunk", [1, 5, ROWS - 1])
def test_every_record_is_cut_into_the_same_chunks(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden_MD, _, target = draw(RECORDS["head"], RECORDS["head and samples"])
    terms = [Term(KL, 0.9, 2.0, source, share) for source, share in enumerate(SHARES)]
    value, sums, gradients = run(hidden_MD, target, terms)
    monkeypatch.setattr(OutputHead, "chunk", chunk)
    other_value, other_sums, other_gradients = run(hidden_MD, target, terms)
    assert other_value == pytest.approx(value, rel=1e-5)
    assert other_sums == pytest.approx(sums, rel=1e-5)
    expect_close(other_gradients, gradients)


def test_counts_are_of_the_first_record() -> None:
    hidden_MD, _, target = draw(RECORDS["head"], RECORDS["short head"])
    alone = dataclasses.replace(target, others=())
    terms = [Term(KL, 1.0, 1.0, source, share) for source, share in enumerate(SHARES)]
    _, mixed, _ = run(hidden_MD, target, terms)
    _, single, _ = run(hidden_MD, alone, [Term(KL, 1.0)])
    assert mixed.keys() == single.keys() | {"kl_teacher_0", "kl_teacher_1"}
    for name in COUNTS:
        assert mixed[name] == single[name]
    assert mixed["kl_teacher_0"] == single["kl"]


def test_terms_name_each_teacher_once_and_the_labels_once() -> None:
    captures = [(RECORDS["head"], "a"), (RECORDS["samples"], "b"), (RECORDS["head"], "c")]
    objective = ObjectiveConfig(kl=0.5, cross_entropy=0.25, temperature=2.0)
    terms = mixed_terms(objective, captures, (0.5, 0.0, 0.5), "students.x.objective")
    assert terms == [
        Term(KL, 0.5, 2.0, 0, 0.5),
        Term(CE, 0.25),
        Term(KL, 0.5, 2.0, 2, 0.5),
    ]
    assert mixed_terms(objective, captures[:1], (1.0,), "x") == terms_of(
        objective, captures[0][0], "x"
    )
    told = r"^students\.x\.objective: b: kl: temperature 3\.0 was not captured"
    captures[0] = (Capture(head=3, tail=0, temperatures=(3.0,)), "a")
    with pytest.raises(ColdstillError, match=told):
        mixed_terms(ObjectiveConfig(temperature=3.0), captures[:2], SHARES, "students.x.objective")
