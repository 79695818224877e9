"""The chunked head with every loss, alone, in company and of several teachers, against formulas on
whole logits."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import dense
import headed
import pytest
import torch
from coldstill.data.errors import ColdstillError
from coldstill.data.schema import Capture
from coldstill.stages.models import output_head
from coldstill.stages.models.output_head import OutputHead
from coldstill.stages.objective_config import ObjectiveConfig
from coldstill.stages.targets.losses import LOSSES
from coldstill.stages.targets.tensors import TargetTensors, tempered
from coldstill.stages.training.chunked_loss import COUNTS, Term, chunked_loss
from coldstill.stages.training.objective import mixed_terms, terms_of
from formulas import PLAIN
from headed import ROWS, VOCABULARY, Headed, expect_close, run, whole
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Sequence

SHARES = (0.7, 0.3)
TEMPERATURES = (2.0,)


class WithoutClosedForm:
    """A loss that is differentiated by autograd."""

    needs_targets: ClassVar[bool] = True

    def __init__(self, loss: Any) -> None:
        self.name, self.value = loss.name, loss.value
        self.refuse, self.support = loss.refuse, loss.support


@dataclass(frozen=True)
class Setting:
    """What a model does around its head."""

    bias: bool = False
    scale: float = 1.0
    softcap: float | None = None
    whole: bool = False


SETTINGS = {
    "plain": Setting(),
    "bias": Setting(bias=True),
    "scaled": Setting(scale=0.3),
    "capped": Setting(softcap=5.0),
    "all": Setting(bias=True, scale=1.7, softcap=4.0),
    "whole": Setting(whole=True),
}
KL, CE = LOSSES["kl"], LOSSES["cross_entropy"]
REVERSE: Any = WithoutClosedForm(LOSSES["reverse_kl"])
GENERIC_KL: Any = WithoutClosedForm(KL)
OBJECTIVES: dict[str, list[Term]] = {
    "kl": [Term(KL, 1.0)],
    "ce": [Term(CE, 1.0)],
    "kl and ce": [Term(KL, 0.7), Term(CE, 0.4)],
    "kl at 2 and ce": [Term(KL, 0.7, 2.0), Term(CE, 0.4)],
    "no closed form": [Term(REVERSE, 0.5)],
    "no closed form beside one": [Term(KL, 0.7, 2.0), Term(REVERSE, 0.5, 2.0), Term(CE, 0.2)],
    "all losses": [
        Term(loss, 0.1 * (place + 1), 2.0 if loss.needs_targets else 1.0)
        for place, loss in enumerate(LOSSES.values())
    ],
}
CAPTURES = {
    "head and tail": Capture(head=5, tail=7, temperatures=TEMPERATURES),
    "bucket": Capture(head=9, tail=0, temperatures=TEMPERATURES),
    "everything": Capture(head=VOCABULARY, tail=0, temperatures=TEMPERATURES),
}


def draw(capture: Capture) -> tuple[torch.Tensor, TargetTensors]:
    """Hidden states and targets, weighted as those of branches are."""
    hidden_MD, _, target = headed.draw(capture)
    weights_M = torch.rand(ROWS, generator=torch.Generator().manual_seed(1))
    return hidden_MD, dataclasses.replace(dense.cast(target, torch.float32), weights=weights_M)


def naive(
    logits_MV: torch.Tensor, target: TargetTensors, terms: Sequence[Term]
) -> tuple[torch.Tensor, dict[str, float]]:
    """Each loss from its own formula, on whole logits in float64."""
    total, parts = 0.0 * logits_MV.double().sum(), {}
    for term in terms:
        logprobs = (logits_MV.double() / term.temperature).log_softmax(1)
        value = term.loss.value(logprobs, target, term.temperature).sum()
        total = total + term.weight * term.temperature**2 * value
        parts[term.loss.name] = float(value.detach())
    return total, parts


def finish(logits_MV: torch.Tensor, setting: Setting) -> torch.Tensor:
    scaled, cap = logits_MV * setting.scale, setting.softcap
    return scaled if cap is None else cap * (scaled / cap).tanh()


def gradients(states_MD: torch.Tensor, model: Headed) -> dict[str, torch.Tensor]:
    """Of the hidden states and every parameter."""
    found = {"hidden": states_MD.grad, **{n: p.grad for n, p in model.named_parameters()}}
    return {name: gradient for name, gradient in found.items() if gradient is not None}


def connect(model: Headed, setting: Setting = SETTINGS["plain"]) -> OutputHead:
    return OutputHead(
        model, VOCABULARY, scale=setting.scale, softcap=setting.softcap, whole=setting.whole
    )


def whole_logits(states_MD: torch.Tensor, model: Headed) -> torch.Tensor:
    weight, bias = model.head.weight[:VOCABULARY], model.head.bias
    return nn.functional.linear(states_MD, weight, None if bias is None else bias[:VOCABULARY])


def expect_agreement(setting: Setting, terms: Sequence[Term], capture: Capture) -> None:
    hidden_MD, target = draw(capture)
    model = Headed(bias=setting.bias)
    states = hidden_MD.clone().requires_grad_()
    given = whole_logits(states, model) if setting.whole else states
    total, sums = chunked_loss(connect(model, setting), given, target, terms)
    torch.autograd.backward(3.0 * total)
    ours = gradients(states, model)

    model.zero_grad()
    plain = hidden_MD.clone().requires_grad_()
    logits_MV = finish(whole_logits(plain, model), setting)
    expected, parts = naive(logits_MV, target, terms)
    torch.autograd.backward(3.0 * expected)
    theirs = gradients(plain, model)

    assert float(total.detach()) == pytest.approx(float(expected.detach()), rel=1e-5, abs=1e-5)
    label_loss = float(dense.cross_entropy(logits_MV.detach(), target.labels).sum())
    for name, value in (parts | {"label_loss": label_loss}).items():
        assert sums[name].dtype == torch.float64
        assert float(sums[name]) == pytest.approx(value, rel=1e-5, abs=1e-5), name
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        error = float((ours[name] - gradient).norm())
        assert error < 2e-5 * float(gradient.norm()) + 1e-6, name
        if name != "hidden":
            assert not ours[name][VOCABULARY:].any()


@pytest.mark.parametrize("terms", OBJECTIVES.values(), ids=OBJECTIVES)
@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_loss_and_gradients_equal_those_of_whole_logits(
    setting: Setting, terms: list[Term]
) -> None:
    """The loss on labels is counted too: it compares students of different objectives."""
    for capture in CAPTURES.values():
        expect_agreement(setting, terms, capture)


@pytest.mark.parametrize("name", PLAIN)
def test_a_loss_alone_equals_its_formula_in_any_chunks(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = PLAIN[name][0]
    for chunk in (1, 5, ROWS - 1, ROWS):
        monkeypatch.setattr(output_head, "CHUNK_ELEMENTS", chunk * VOCABULARY)
        assert connect(Headed()).chunk == chunk
        for temperature in (1.0, 2.0):
            expect_agreement(
                SETTINGS["plain"], [Term(loss, 0.7, temperature)], CAPTURES["everything"]
            )


@pytest.mark.parametrize("chunk", [1, 5, ROWS - 1])
def test_the_chunk_size_changes_memory_and_not_results(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output_head, "CHUNK_ELEMENTS", chunk * VOCABULARY)
    for setting in (SETTINGS["all"], SETTINGS["whole"]):
        for objective in ("kl at 2 and ce", "no closed form beside one", "all losses"):
            expect_agreement(setting, OBJECTIVES[objective], CAPTURES["head and tail"])


@pytest.mark.parametrize("confidence", [5.0, 20.0, 45.0])
def test_no_precision_is_lost_if_the_student_is_sure_of_a_head(confidence: float) -> None:
    """In float32, for each loss and for two teachers whose heads overlap in part."""
    generator = torch.Generator().manual_seed(0)
    teachers = [torch.randn(ROWS, VOCABULARY, generator=generator).double() for _ in range(2)]
    labels_M = torch.randint(0, VOCABULARY, (ROWS,), generator=generator)
    capture = Capture(head=8, tail=0)
    exact = [dense.record(one, labels_M, torch.zeros(ROWS), capture) for one in teachers]
    common = (exact[0].head_ids[:, :, None] == exact[1].head_ids[:, None]).any(2)
    assert common.any()
    assert not common.all()
    student_MV = torch.randn(ROWS, VOCABULARY, generator=generator)
    student_MV.scatter_add_(1, exact[0].head_ids, torch.full((ROWS, 8), confidence))
    first, second = (dense.cast(one, torch.float32) for one in exact)
    target = dataclasses.replace(first, others=(second,))
    objectives = [[Term(loss, 1.0)] for loss, _ in PLAIN.values() if loss.needs_targets]
    objectives.append([Term(KL, 1.0, 1.0, source, share) for source, share in enumerate(SHARES)])
    for terms in objectives:
        leaf = student_MV.double().requires_grad_()
        logprobs = leaf.log_softmax(1)
        parts = [t.share * t.loss.value(logprobs, exact[t.source], 1.0).sum() for t in terms]
        expected = torch.stack(parts).sum() + 0.0 * leaf.sum()
        torch.autograd.backward(expected)
        states = student_MV.clone().requires_grad_()
        head = OutputHead(Headed(), VOCABULARY, whole=True)
        total, _ = chunked_loss(head, states, target, terms)
        torch.autograd.backward(total)
        assert leaf.grad is not None
        assert states.grad is not None
        torch.testing.assert_close(states.grad.double(), leaf.grad, rtol=0.0, atol=4e-6)
        assert float(total.detach()) == pytest.approx(float(expected.detach()), rel=1e-5, abs=1e-5)


def test_a_tied_weight_gets_the_gradient_of_both_its_uses() -> None:
    """The input embedding reads the same matrix that the head multiplies with."""
    _, target = draw(CAPTURES["head and tail"])
    tokens_M = torch.arange(ROWS) * 3 % VOCABULARY
    grads = []
    for chunked in (True, False):
        model = Headed()
        hidden_MD = nn.functional.embedding(tokens_M, model.head.weight).tanh()
        if chunked:
            total, _ = chunked_loss(connect(model), hidden_MD, target, OBJECTIVES["kl"])
        else:
            total, _ = naive(whole_logits(hidden_MD, model), target, OBJECTIVES["kl"])
        torch.autograd.backward(total)
        grads.append(model.head.weight.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-5)


def test_counts_match_their_definitions() -> None:
    hidden_MD, target = draw(CAPTURES["head and tail"])
    model = Headed()
    _, sums = chunked_loss(connect(model), hidden_MD, target, OBJECTIVES["kl"])
    probs = (hidden_MD @ model.head.weight[:VOCABULARY].T).double().softmax(1)
    top = probs.argmax(1)
    expected = {
        "teacher_mass": target.head_logprobs.exp().sum(),
        "student_mass": probs.gather(1, target.head_ids).sum(),
        "agreement": (top == target.head_ids[:, 0]).sum(),
        "accuracy": (top == target.labels).sum(),
        "teacher_entropy": target.entropy.sum(),
        "student_entropy": -(probs * probs.log()).sum(),
    }
    for name, value in expected.items():
        assert float(sums[name]) == pytest.approx(float(value.detach()), rel=1e-6), name


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_both_masses_have_one_temperature(temperature: float) -> None:
    """It is 1 if a loss has temperature 1, otherwise that of the losses."""
    capture = Capture(head=5, tail=7, temperatures=(0.5, 2.0))
    hidden_MD, target = draw(capture)
    model = Headed()
    head = connect(model)
    _, plain = chunked_loss(head, hidden_MD, target, OBJECTIVES["ce"])
    _, mixed = chunked_loss(head, hidden_MD, target, [Term(KL, 1.0, temperature), Term(CE, 1.0)])
    _, alone = chunked_loss(head, hidden_MD, target, [Term(KL, 1.0, temperature)])
    for name in COUNTS:
        assert float(mixed[name]) == pytest.approx(float(plain[name]), rel=1e-6)
        if "mass" not in name:  # entropies and the label loss are always at temperature 1
            assert float(alone[name]) == pytest.approx(float(plain[name]), rel=1e-6)
    logits = (hidden_MD @ model.head.weight[:VOCABULARY].T).detach().double()
    student_mass = (logits / temperature).softmax(1).gather(1, target.head_ids).sum()
    teacher_mass = tempered(target, temperature).head.sum()
    assert float(alone["student_mass"]) == pytest.approx(float(student_mass), rel=1e-6)
    assert float(alone["teacher_mass"]) == pytest.approx(float(teacher_mass), rel=1e-6)
    assert abs(float(alone["teacher_mass"] - plain["teacher_mass"])) > 0.1


def test_frozen_parameters_get_no_gradient_and_evaluation_needs_none() -> None:
    hidden_MD, target = draw(CAPTURES["head and tail"])
    model = Headed(bias=True)
    expected, _ = chunked_loss(connect(model), hidden_MD, target, OBJECTIVES["kl"])
    with torch.no_grad():
        value, _ = chunked_loss(connect(model), hidden_MD, target, OBJECTIVES["kl"])
    assert float(value) == float(expected.detach())
    assert not value.requires_grad
    model.requires_grad_(False)
    states = hidden_MD.requires_grad_()
    total, _ = chunked_loss(connect(model), states, target, OBJECTIVES["kl"])
    torch.autograd.backward(total)
    assert states.grad is not None
    assert model.head.weight.grad is None


def test_bf16_states_agree_up_to_their_rounding() -> None:
    hidden_MD, target = draw(CAPTURES["head and tail"])
    model, terms = Headed(dtype=torch.bfloat16), OBJECTIVES["kl and ce"]
    states = hidden_MD.bfloat16().requires_grad_()
    total, _ = chunked_loss(connect(model), states, target, terms)
    torch.autograd.backward(total)
    exact = states.detach().float().requires_grad_()
    expected, _ = naive(exact @ model.head.weight[:VOCABULARY].float().T, target, terms)
    torch.autograd.backward(expected)
    assert float(total.detach()) == pytest.approx(float(expected.detach()), rel=2e-2)
    ours, theirs, weight = states.grad, exact.grad, model.head.weight.grad
    assert ours is not None
    assert theirs is not None
    assert weight is not None
    assert ours.dtype == weight.dtype == torch.bfloat16
    assert float((ours.float() - theirs).norm() / theirs.norm()) < 2e-2


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("loss", [KL, GENERIC_KL], ids=["closed form", "autograd"])
def test_two_teachers_give_the_divergence_from_their_mixture(loss: Any, temperature: float) -> None:
    """The gradient is exact; the value has a constant: the divergence of teachers and mixture."""
    hidden_MD, teachers, target = headed.draw(CAPTURES["everything"], CAPTURES["everything"])
    terms = [Term(loss, 0.9, temperature, source, share) for source, share in enumerate(SHARES)]
    value, sums, found = run(hidden_MD, target, [*terms, Term(CE, 0.2)])

    logits_MV, leaves = whole(hidden_MD)
    probs = [(teacher.double() / temperature).softmax(1) for teacher in teachers]
    mixture = SHARES[0] * probs[0] + SHARES[1] * probs[1]
    logprobs = (logits_MV / temperature).log_softmax(1)
    kl = (mixture * (mixture.log() - logprobs)).sum()
    objective = 0.9 * temperature**2 * kl
    objective = objective + 0.2 * dense.cross_entropy(logits_MV, target.labels).sum()
    expect_close(found, torch.autograd.grad(objective, leaves))

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


@pytest.mark.parametrize("second", RECORDS)
@pytest.mark.parametrize("first", RECORDS)
def test_targets_of_any_shape_add_up_by_their_shares(
    first: str, second: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In chunks, with and without closed forms, against each record's formula on whole logits."""
    hidden_MD, _, target = headed.draw(RECORDS[first], RECORDS[second], RECORDS["head"])
    shares = (0.5, 0.3, 0.2)
    for temperature, chunk, losses in (
        (1.0, 5, (KL, KL, KL)),
        (2.0, ROWS - 1, (KL, GENERIC_KL, KL)),
        (2.0, 1, (GENERIC_KL, KL, KL)),
    ):
        monkeypatch.setattr(OutputHead, "chunk", chunk)
        terms = [
            Term(loss, 0.9, temperature, source, share)
            for source, (loss, share) in enumerate(zip(losses, shares, strict=True))
        ]
        value, sums, found = run(hidden_MD, target, [*terms, Term(CE, 0.2)])
        logits_MV, leaves = whole(hidden_MD)
        logprobs = (logits_MV / temperature).log_softmax(1)
        kl = torch.stack([KL.value(logprobs, one, temperature).sum() for one in target.sources])
        mixed = (kl * torch.tensor(shares)).sum()
        objective = 0.9 * temperature**2 * mixed
        objective = objective + 0.2 * CE.value(logits_MV.log_softmax(1), target, 1.0).sum()
        expect_close(found, torch.autograd.grad(objective, leaves))
        assert value == pytest.approx(float(objective.detach()), rel=1e-5)
        assert sums["kl"] == pytest.approx(float(mixed.detach()), rel=1e-5)


def test_counts_of_several_teachers_use_the_first_record() -> None:
    hidden_MD, _, target = headed.draw(RECORDS["head"], RECORDS["short head"])
    terms = [Term(KL, 1.0, 1.0, source, share) for source, share in enumerate(SHARES)]
    _, mixed, _ = run(hidden_MD, target, terms)
    _, single, _ = run(hidden_MD, dataclasses.replace(target, others=()), [Term(KL, 1.0)])
    assert mixed.keys() == single.keys() | {"kl_teacher_0", "kl_teacher_1"}
    for name in COUNTS:
        assert mixed[name] == single[name]
    assert mixed["kl_teacher_0"] == single["kl"]


def test_terms_name_each_teacher_once_and_the_labels_once() -> None:
    """The temperature is that of the teachers, not of the labels."""
    captures = [(RECORDS["head"], "a"), (RECORDS["samples"], "b"), (RECORDS["head"], "c")]
    objective = ObjectiveConfig(kl=0.5, cross_entropy=0.25, temperature=2.0)
    terms = mixed_terms(objective, captures, (0.5, 0.0, 0.5), "students.x.objective")
    assert terms == [Term(KL, 0.5, 2.0, 0, 0.5), Term(CE, 0.25), Term(KL, 0.5, 2.0, 2, 0.5)]
    alone = terms_of(objective, captures[0][0], "x")
    assert mixed_terms(objective, captures[:1], (1.0,), "x") == alone
    assert alone == [Term(KL, 0.5, 2.0), Term(CE, 0.25)]
    message = r"^students\.x\.objective: b: kl: temperature 3\.0 was not captured"
    captures[0] = (Capture(head=3, tail=0, temperatures=(3.0,)), "a")
    with pytest.raises(ColdstillError, match=message):
        mixed_terms(ObjectiveConfig(temperature=3.0), captures[:2], SHARES, "students.x.objective")
