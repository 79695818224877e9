"""The chunked head against whole logits and autograd."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import dense
import headed
import pytest
import torch
from coldstill.data.schema import Capture
from coldstill.stages.models import output_head
from coldstill.stages.models.output_head import OutputHead
from coldstill.stages.targets.losses import LOSSES
from coldstill.stages.targets.losses.loss import Loss
from coldstill.stages.targets.tensors import TargetTensors, tempered
from coldstill.stages.training.chunked_loss import COUNTS, Term, chunked_loss
from headed import ROWS, VOCABULARY, Headed
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coldstill.stages.targets.losses.loss import Support

TEMPERATURES = (2.0,)


class ReverseKL(Loss):
    """`sum_i q_i (log q_i - log p_i)` over the head: a loss that nobody wrote a closed form for."""

    name: ClassVar[str] = "reverse"

    def refuse(self, capture: Capture, temperature: float) -> str | None:
        return None

    def support(self, capture: Capture, temperature: float, vocabulary: int) -> Support:
        return "biased"

    def value(
        self, logprobs_MV: torch.Tensor, target: TargetTensors, temperature: float
    ) -> torch.Tensor:
        ours, theirs = logprobs_MV.gather(1, target.head_ids), tempered(target, temperature)
        return (ours.exp() * (ours - theirs.log_head)).sum(1)


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
KL, CE, REVERSE = LOSSES["kl"], LOSSES["cross_entropy"], ReverseKL()
OBJECTIVES: dict[str, list[Term]] = {
    "kl": [Term(KL, 1.0)],
    "ce": [Term(CE, 1.0)],
    "kl and ce": [Term(KL, 0.7), Term(CE, 0.4)],
    "kl at 2 and ce": [Term(KL, 0.7, 2.0), Term(CE, 0.4)],
    "kl at 2": [Term(KL, 1.3, 2.0)],
    "no closed form": [Term(REVERSE, 0.5)],
    "no closed form beside one": [Term(KL, 0.7, 2.0), Term(REVERSE, 0.5, 2.0), Term(CE, 0.2)],
}
CAPTURES = {
    "head and tail": Capture(head=5, tail=7, temperatures=TEMPERATURES),
    "bucket": Capture(head=9, tail=0, temperatures=TEMPERATURES),
    "everything": Capture(head=VOCABULARY, tail=0, temperatures=TEMPERATURES),
}


def draw(capture: Capture) -> tuple[torch.Tensor, TargetTensors]:
    """Hidden states and targets."""
    hidden_MD, _, target = headed.draw(capture)
    return hidden_MD, dense.cast(target, torch.float32)


def naive(
    logits_MV: torch.Tensor, target: TargetTensors, terms: Sequence[Term]
) -> tuple[torch.Tensor, dict[str, float]]:
    """Each loss from its own formula, on whole logits in float64."""
    total, parts = logits_MV.new_zeros(()).double(), {}
    for term in terms:
        logprobs = (logits_MV.double() / term.temperature).log_softmax(1)
        value = term.loss.value(logprobs, target, term.temperature).sum()
        total = total + term.weight * term.temperature**2 * value
        parts[term.loss.name] = float(value.detach())
    return total, parts


def finish(logits_MV: torch.Tensor, setting: Setting) -> torch.Tensor:
    logits_MV = logits_MV * setting.scale
    return (
        logits_MV
        if setting.softcap is None
        else setting.softcap * (logits_MV / setting.softcap).tanh()
    )


def gradients(states_MD: torch.Tensor, model: Headed) -> dict[str, torch.Tensor]:
    """Of the hidden states and every parameter."""
    found = {"hidden": states_MD.grad, **{n: p.grad for n, p in model.named_parameters()}}
    return {name: gradient for name, gradient in found.items() if gradient is not None}


def connect(model: Headed, setting: Setting) -> OutputHead:
    return OutputHead(
        model, VOCABULARY, scale=setting.scale, softcap=setting.softcap, whole=setting.whole
    )


def expect_agreement(
    setting: Setting, terms: Sequence[Term], capture: Capture, tolerance: float = 2e-5
) -> None:
    hidden_MD, target = draw(capture)
    model = Headed(bias=setting.bias)
    states = hidden_MD.clone().requires_grad_()
    if setting.whole:
        given = nn.functional.linear(states, model.head.weight[:VOCABULARY])
    else:
        given = states
    total, sums = chunked_loss(connect(model, setting), given, target, terms)
    torch.autograd.backward(3.0 * total)
    ours = gradients(states, model)

    model.zero_grad()
    plain = hidden_MD.clone().requires_grad_()
    weight, bias = model.head.weight[:VOCABULARY], model.head.bias
    logits = nn.functional.linear(plain, weight, None if bias is None else bias[:VOCABULARY])
    expected, parts = naive(finish(logits, setting), target, terms)
    torch.autograd.backward(3.0 * expected)
    theirs = gradients(plain, model)

    assert float(total.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    for name, value in parts.items():
        assert sums[name].dtype == torch.float64
        assert float(sums[name]) == pytest.approx(value, rel=1e-5, abs=1e-5), name
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        error = float((ours[name] - gradient).norm() / gradient.norm())
        assert error < tolerance, name
        if name != "hidden":
            assert not ours[name][VOCABULARY:].any()
            assert ours[name][:VOCABULARY].any()


@pytest.mark.parametrize("capture", CAPTURES.values(), ids=CAPTURES)
@pytest.mark.parametrize("terms", OBJECTIVES.values(), ids=OBJECTIVES)
@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_loss_and_gradients_equal_those_of_whole_logits(
    setting: Setting, terms: list[Term], capture: Capture
) -> None:
    expect_agreement(setting, terms, capture)


@pytest.mark.parametrize("chunk", [1, 5, 22, 23])
@pytest.mark.parametrize("setting", [SETTINGS["all"], SETTINGS["whole"]], ids=["all", "whole"])
def test_the_chunk_size_changes_memory_and_not_results(
    chunk: int, setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output_head, "CHUNK_ELEMENTS", chunk * VOCABULARY)
    assert connect(Headed(), setting).chunk == chunk
    for objective in ("kl at 2 and ce", "no closed form beside one"):
        expect_agreement(setting, OBJECTIVES[objective], CAPTURES["head and tail"])


def test_a_tied_weight_gets_the_gradient_of_both_its_uses() -> None:
    """The input embedding reads the same matrix that the head multiplies with."""
    _, target = draw(CAPTURES["head and tail"])
    tokens_M = torch.arange(ROWS) * 3 % VOCABULARY
    grads = []
    for chunked in (True, False):
        model = Headed()
        hidden_MD = nn.functional.embedding(tokens_M, model.head.weight).tanh()
        if chunked:
            total, _ = chunked_loss(connect(model, Setting()), hidden_MD, target, OBJECTIVES["kl"])
        else:
            logits = nn.functional.linear(hidden_MD, model.head.weight[:VOCABULARY])
            total, _ = naive(logits, target, OBJECTIVES["kl"])
        torch.autograd.backward(total)
        grads.append(model.head.weight.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-5)


def test_counts_match_their_definitions() -> None:
    hidden_MD, target = draw(CAPTURES["head and tail"])
    model = Headed()
    _, sums = chunked_loss(connect(model, Setting()), hidden_MD, target, OBJECTIVES["kl"])
    probs = (hidden_MD @ model.head.weight[:VOCABULARY].T).double().softmax(1)
    top = probs.argmax(1)
    expected = {
        "teacher_mass": target.head_logprobs.exp().sum(),
        "student_mass": probs.gather(1, target.head_ids).sum(),
        "agreement": (top == target.head_ids[:, 0]).sum(),
        "accuracy": (top == target.labels).sum(),
        "teacher_entropy": target.entropy.sum(),
        "student_entropy": -(probs * probs.log()).sum(),
        "label_loss": -probs.gather(1, target.labels[:, None]).log().sum(),
    }
    for name, value in expected.items():
        assert float(sums[name]) == pytest.approx(float(value.detach()), rel=1e-6), name


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_both_masses_are_of_one_temperature(temperature: float) -> None:
    """Of 1 wherever some loss lives there, of the only one there is otherwise."""
    capture = Capture(head=5, tail=7, temperatures=(0.5, 2.0))
    hidden_MD, target = draw(capture)
    model = Headed()
    head = connect(model, Setting())
    _, plain = chunked_loss(head, hidden_MD, target, OBJECTIVES["ce"])
    _, mixed = chunked_loss(head, hidden_MD, target, [Term(KL, 1.0, temperature), Term(CE, 1.0)])
    _, alone = chunked_loss(head, hidden_MD, target, [Term(KL, 1.0, temperature)])
    for name in COUNTS:
        assert float(mixed[name]) == pytest.approx(float(plain[name]), rel=1e-6)
    for name in ("agreement", "accuracy"):
        assert float(alone[name]) == float(plain[name])
    # of temperature 1, wherever losses live
    for name in ("teacher_entropy", "student_entropy", "label_loss"):
        assert float(alone[name]) == pytest.approx(float(plain[name]), rel=1e-6)
    logits = (hidden_MD @ model.head.weight[:VOCABULARY].T).detach().double()
    student_mass = (logits / temperature).softmax(1).gather(1, target.head_ids).sum()
    teacher_mass = tempered(target, temperature).head.sum()
    assert float(alone["student_mass"]) == pytest.approx(float(student_mass), rel=1e-6)
    assert float(alone["teacher_mass"]) == pytest.approx(float(teacher_mass), rel=1e-6)
    assert abs(float(alone["teacher_mass"] - plain["teacher_mass"])) > 0.1


@pytest.mark.parametrize("terms", OBJECTIVES.values(), ids=OBJECTIVES)
@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_every_objective_counts_the_loss_on_labels(setting: Setting, terms: list[Term]) -> None:
    """The one figure by which students of different objectives can be compared in training."""
    hidden_MD, target = draw(CAPTURES["head and tail"])
    model = Headed(bias=setting.bias)
    weight, bias = model.head.weight[:VOCABULARY], model.head.bias
    plain = nn.functional.linear(hidden_MD, weight, None if bias is None else bias[:VOCABULARY])
    given = plain.detach() if setting.whole else hidden_MD
    _, sums = chunked_loss(connect(model, setting), given, target, terms)
    logprobs = finish(plain.double(), setting).log_softmax(1)
    expected = -logprobs.gather(1, target.labels[:, None]).sum()
    assert float(sums["label_loss"]) == pytest.approx(float(expected.detach()), rel=1e-6)


def test_sums_are_sums() -> None:
    hidden_MD, target = draw(CAPTURES["head and tail"])
    head, terms = connect(Headed(), Setting()), OBJECTIVES["kl at 2 and ce"]
    whole, all_sums = chunked_loss(head, hidden_MD, target, terms)
    halves = [
        chunked_loss(head, hidden_MD[rows], target.rows(rows.start, rows.stop), terms)
        for rows in (slice(0, 9), slice(9, ROWS))
    ]
    added = float((halves[0][0] + halves[1][0]).detach())
    assert float(whole.detach()) == pytest.approx(added, rel=1e-5)
    for name, value in all_sums.items():
        assert float(value) == pytest.approx(float(halves[0][1][name] + halves[1][1][name]))


def test_frozen_parameters_get_no_gradient_and_evaluation_needs_none() -> None:
    hidden_MD, target = draw(CAPTURES["head and tail"])
    model = Headed(bias=True)
    expected, _ = chunked_loss(connect(model, Setting()), hidden_MD, target, OBJECTIVES["kl"])
    with torch.no_grad():
        value, _ = chunked_loss(connect(model, Setting()), hidden_MD, target, OBJECTIVES["kl"])
    assert float(value) == float(expected.detach())
    assert not value.requires_grad
    model.requires_grad_(False)
    states = hidden_MD.requires_grad_()
    total, _ = chunked_loss(connect(model, Setting()), states, target, OBJECTIVES["kl"])
    torch.autograd.backward(total)
    assert states.grad is not None
    assert model.head.weight.grad is None


def test_bf16_states_agree_up_to_their_rounding() -> None:
    hidden_MD, target = draw(CAPTURES["head and tail"])
    model, terms = Headed(dtype=torch.bfloat16), OBJECTIVES["kl and ce"]
    states = hidden_MD.bfloat16().requires_grad_()
    total, _ = chunked_loss(connect(model, Setting()), states, target, terms)
    torch.autograd.backward(total)
    exact = states.detach().float().requires_grad_()
    logits = exact @ model.head.weight[:VOCABULARY].float().T
    expected, _ = naive(logits, target, terms)
    torch.autograd.backward(expected)
    assert float(total.detach()) == pytest.approx(float(expected.detach()), rel=2e-2)
    for ours, theirs in ((states.grad, exact.grad),):
        assert ours is not None
        assert theirs is not None
        assert ours.dtype == torch.bfloat16
        assert float((ours.float() - theirs).norm() / theirs.norm()) < 2e-2
    weight: Any = model.head.weight.grad
    assert weight.dtype == torch.bfloat16
