"""Targets as tensors, and every loss against its formula on whole distributions.

A new loss needs a line in `formulas.PLAIN`; all tests of losses then include it.
"""

from __future__ import annotations

from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any

import dense
import numpy as np
import pytest
import torch
from coldstill.data.prepared import TokenizedDocument, build_sequences
from coldstill.data.schema import Block, Capture, Targets
from coldstill.stages.targets import losses
from coldstill.stages.targets.losses import LOSSES
from coldstill.stages.targets.losses.partition import PartitionLoss
from coldstill.stages.targets.softmax import StudentSoftmax
from coldstill.stages.targets.tensors import TailTensors, TargetTensors, tempered
from formulas import PLAIN, divergence

ROWS, VOCABULARY = 13, 40
TEMPERATURES = (0.5, 2.0)
EVERY_TEMPERATURE = (1.0, *TEMPERATURES)
WHOLE = Capture(head=VOCABULARY, tail=0, temperatures=TEMPERATURES)
BUCKET = Capture(head=6, tail=0, temperatures=TEMPERATURES)
BOTH = Capture(head=6, tail=9, temperatures=TEMPERATURES)
SAMPLES = Capture(head=0, tail=12, temperatures=TEMPERATURES)
HEAD_ONLY = Capture(head=6, tail=0, mass=False)
CAPTURES = {"whole": WHOLE, "bucket": BUCKET, "head and tail": BOTH, "tail alone": SAMPLES}


READERS = [name for name in PLAIN if name != "cross_entropy"]
COMPARING = [name for name in PLAIN if name not in ("cross_entropy", "chunk_likelihood")]
BOUNDS = [name for name, (loss, _) in PLAIN.items() if isinstance(loss, PartitionLoss)]
every_temperature = pytest.mark.parametrize("temperature", EVERY_TEMPERATURE)


def draw(seed: int = 0, rows: int = ROWS, scale: float = 3.0) -> tuple[torch.Tensor, ...]:
    """Teacher's and student's logits, labels and shifts, in float64."""
    random = torch.Generator().manual_seed(seed)
    teacher_MV = torch.randn(rows, VOCABULARY, generator=random, dtype=torch.float64) * scale
    student_MV = torch.randn(rows, VOCABULARY, generator=random, dtype=torch.float64) * 2
    labels_M = torch.randint(0, VOCABULARY, (rows,), generator=random)
    return teacher_MV, student_MV, labels_M, torch.rand(rows, generator=random, dtype=torch.float64)


def supported(name: str, capture: Capture) -> bool:
    return PLAIN[name][0].refuse(capture, 1.0) is None


def value(
    name: str, student_MV: torch.Tensor, target: TargetTensors, temperature: float
) -> torch.Tensor:
    logprobs_MV = (student_MV / temperature).log_softmax(1)
    found: torch.Tensor = PLAIN[name][0].value(logprobs_MV, target, temperature)
    return found


def closed_form(
    name: str, student_MV: torch.Tensor, target: TargetTensors, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The closed form's value, and its gradient by the tempered logits."""
    student = dense.softmax_of(student_MV / temperature, target)
    probs_MV = student.probs_MV.clone()
    sparse = PLAIN[name][0].gradient(student, target, temperature)
    whole = sparse.softmax_weight[:, None] * probs_MV
    if sparse.head_gradient is not None:
        whole = whole.scatter(1, target.head_ids, sparse.head_gradient)
    whole = whole.scatter_add(1, sparse.ids, sparse.entries)
    if sparse.tail is not None:
        places = target.tail.rows(), target.tail.ids
        whole = whole.index_put(places, sparse.tail, accumulate=True)
    return sparse.value, whole


def test_every_loss_has_a_plain_formula() -> None:
    # `test_branches` compares the loss beside the text with a loop over texts
    of_text = {name: loss for name, loss in LOSSES.items() if not loss.beside_text}
    assert PLAIN.keys() >= of_text.keys()
    assert all(PLAIN[name][0] is loss for name, loss in of_text.items())
    assert all(loss.name == name for name, loss in LOSSES.items())
    assert all(hasattr(loss, "gradient") for loss in LOSSES.values())


@every_temperature
@pytest.mark.parametrize("name", PLAIN)
def test_a_capture_of_the_whole_distribution_gives_the_formula_and_its_derivative(
    name: str, temperature: float
) -> None:
    teacher_MV, student_MV, labels_M, shifts_M = draw()
    target = dense.record(teacher_MV, labels_M, shifts_M, WHOLE)
    leaf = student_MV.clone().requires_grad_()
    p, q = (teacher_MV / temperature).softmax(1), (leaf / temperature).softmax(1)
    expected = PLAIN[name][1](p, q, labels_M)
    (slope,) = torch.autograd.grad(expected.sum() * temperature, leaf)
    plain = value(name, student_MV, target, temperature)
    torch.testing.assert_close(plain, expected.detach(), rtol=1e-9, atol=1e-11)
    found, gradient = closed_form(name, student_MV, target, temperature)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(gradient, slope, rtol=1e-9, atol=1e-11)
    if not name.endswith("at 1") or name == "jsd at 1":
        assert float(expected.detach().min()) > 1e-3
        assert float(slope.abs().max()) > 1e-2


@every_temperature
@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize("name", PLAIN)
def test_the_closed_form_is_the_derivative_of_the_value(
    name: str, capture: str, temperature: float
) -> None:
    if not supported(name, CAPTURES[capture]):
        return
    teacher_MV, student_MV, labels_M, shifts_M = draw()
    target = dense.record(teacher_MV, labels_M, shifts_M, CAPTURES[capture])
    found, gradient = closed_form(name, student_MV, target, temperature)
    leaf = student_MV.clone().requires_grad_()
    plain = value(name, leaf, target, temperature) + 0.0 * leaf.sum(1)
    (slope,) = torch.autograd.grad(plain.sum() * temperature, leaf)
    torch.testing.assert_close(found, plain.detach(), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(gradient, slope, rtol=1e-9, atol=1e-11)


def cells(logits_MV: torch.Tensor, target: TargetTensors, temperature: float) -> torch.Tensor:
    """[M, K + 1] the probability of each head token and of everything else."""
    probs_MV = (logits_MV / temperature).softmax(1)
    head = probs_MV.gather(1, target.head_ids)
    return torch.cat([head, probs_MV.scatter(1, target.head_ids, 0.0).sum(1, keepdim=True)], 1)


@every_temperature
@pytest.mark.parametrize("name", [*BOUNDS, "kl"])
def test_a_head_alone_gives_a_lower_bound_on_its_partition(name: str, temperature: float) -> None:
    teacher_MV, student_MV, labels_M, shifts_M = draw(rows=300)
    target = dense.record(teacher_MV, labels_M, shifts_M, BUCKET)
    formula = PLAIN[name][1]
    p, q = (cells(logits, target, temperature) for logits in (teacher_MV, student_MV))
    found = value(name, student_MV, target, temperature)
    torch.testing.assert_close(found, formula(p, q, labels_M), rtol=1e-9, atol=1e-11)
    whole = formula(
        (teacher_MV / temperature).softmax(1), (student_MV / temperature).softmax(1), labels_M
    )
    assert (found <= whole + 1e-12).all()
    if PLAIN[name][0].support(BUCKET, temperature, VOCABULARY) != "a lower bound":
        pytest.fail("a record that bounds must say so")
    if not name.startswith("skew") or not name.endswith("at 1"):
        assert (found < 0.999 * whole).any()


@pytest.mark.parametrize("name", BOUNDS)
def test_samples_of_unknown_probability_do_not_change_a_lower_bound(name: str) -> None:
    """A head with samples of unknown probability gives what the head alone gives."""
    teacher_MV, student_MV, labels_M, shifts_M = draw()
    unknown = dense.record(teacher_MV, labels_M, shifts_M, Capture(head=6, tail=9))
    alone = dense.record(teacher_MV, labels_M, shifts_M, Capture(head=6, tail=0))
    for one, other in zip(
        closed_form(name, student_MV, unknown, 1.0),
        closed_form(name, student_MV, alone, 1.0),
        strict=True,
    ):
        assert torch.equal(one, other)


@every_temperature
@pytest.mark.parametrize("capture", ["whole", "bucket"])
@pytest.mark.parametrize("name", READERS)
def test_the_loss_and_gradient_are_zero_if_the_student_equals_the_target(
    name: str, capture: str, temperature: float
) -> None:
    teacher_MV, _, labels_M, shifts_M = draw()
    target = dense.record(teacher_MV, labels_M, shifts_M, CAPTURES[capture])
    student_MV = teacher_MV + 3.0
    if name == "residual_to_label" and capture == "bucket":
        p = (teacher_MV / temperature).softmax(1)
        kept = torch.zeros_like(p).scatter(1, target.head_ids, p.gather(1, target.head_ids))
        at_label = torch.nn.functional.one_hot(labels_M, VOCABULARY)
        aimed_at = kept + (1 - kept.sum(1, keepdim=True)) * at_label
        student_MV = aimed_at.clamp(min=1e-200).log() * temperature
    found, gradient = closed_form(name, student_MV, target, temperature)
    assert float(found.abs().max()) < 1e-12
    if name != "total_variation":  # which has an edge there: every direction leads up
        assert float(gradient.abs().max()) < 1e-12
    other, moved = closed_form(name, student_MV.roll(1, 1), target, temperature)
    if not (name.startswith("skew") and name.endswith("at 1")):
        assert float(other.min()) > 1e-3
        assert float(moved.abs().max()) > 1e-3


@every_temperature
@pytest.mark.parametrize("capture", ["whole", "bucket"])
@pytest.mark.parametrize("name", PLAIN)
def test_a_divergence_is_never_negative(name: str, capture: str, temperature: float) -> None:
    for seed, scale in enumerate((0.1, 1.0, 3.0, 30.0)):
        teacher_MV, student_MV, labels_M, shifts_M = draw(seed, rows=200, scale=scale)
        target = dense.record(teacher_MV, labels_M, shifts_M, CAPTURES[capture])
        for near in (student_MV, teacher_MV + 0.01 * student_MV, 20 * student_MV):
            assert float(value(name, near, target, temperature).min()) >= -1e-12
            rounded = dense.cast(target, torch.float32)
            found, _ = closed_form(name, near.float(), rounded, temperature)
            assert float(found.min()) >= -3e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize("name", PLAIN)
def test_value_and_gradient_are_finite_for_extreme_distributions(
    name: str, capture: str, temperature: float, dtype: torch.dtype
) -> None:
    """Teachers with all or no mass beside the head; students likewise, and at the other end."""
    if not supported(name, CAPTURES[capture]):
        return
    teacher_MV, student_MV, labels_M, shifts_M = draw()
    top, second = teacher_MV.topk(7, 1).indices[:, :6], teacher_MV.topk(30, 1).indices[:, 20:]
    teachers = [teacher_MV, teacher_MV * 0, teacher_MV * 40]
    teachers.append(teacher_MV.scatter(1, top[:, :1], 400.0))  # nothing beside the first token
    teachers.append(teacher_MV.scatter_add(1, top, torch.full_like(teacher_MV, 120.0)))
    students = [teacher_MV, student_MV, student_MV * 40]
    students.append(student_MV.scatter(1, top, 300.0))  # everything on the teacher's head
    students.append(student_MV.scatter(1, second, 300.0))  # nothing there
    for teacher in teachers:
        target = dense.cast(dense.record(teacher, labels_M, shifts_M, CAPTURES[capture]), dtype)
        for student in students:
            found, gradient = closed_form(name, student.to(dtype), target, temperature)
            assert torch.isfinite(found).all()
            assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("name", COMPARING)
def test_a_teacher_without_a_tail_has_no_mass_beside_its_head(name: str) -> None:
    """Exactly none: its logarithm is minus infinity."""
    teacher_MV, student_MV, labels_M, shifts_M = draw()
    top = teacher_MV.topk(6, 1).indices
    alone = torch.full_like(teacher_MV, -torch.inf).scatter(1, top, teacher_MV.gather(1, top))
    target = dense.cast(dense.record(alone, labels_M, shifts_M, BUCKET), torch.float32)
    assert (target.log_tail == -torch.inf).all()
    for temperature in EVERY_TEMPERATURE:
        found, gradient = closed_form(name, student_MV.float(), target, temperature)
        assert torch.isfinite(found).all()
        assert torch.isfinite(gradient).all()
        inside = gradient.gather(1, target.head_ids).sum(1)  # mass is to move into the head
        assert (inside <= 1e-6).all()
        # what a logit gains another loses
        assert float(gradient.sum(1).abs().max()) < 1e-4


@every_temperature
@pytest.mark.parametrize("head", [0, 6])
@pytest.mark.parametrize(
    ("name", "skew"),
    [("kl", 0.0), ("skew_kl at 0", 0.0), ("skew_kl", 0.1), ("skew_kl at 0.7", 0.7)],
)
def test_samples_give_the_loss_and_gradient_of_the_whole_teacher_on_average(
    name: str, skew: float, head: int, temperature: float
) -> None:
    """Over equally spaced shifts the mean is an integral, off by at most a step per edge."""
    trials, tail = 2000, 10
    teacher_MV, student_MV, _, _ = draw(rows=1, scale=1.5)
    shifts_M = (torch.arange(trials, dtype=torch.float64) + 0.5) / trials
    capture = Capture(head=head, tail=tail, temperatures=TEMPERATURES)
    assert PLAIN[name][0].support(capture, temperature, VOCABULARY) == "unbiased"
    labels_M = torch.zeros(trials, dtype=torch.long)
    target = dense.record(teacher_MV.expand(trials, -1), labels_M, shifts_M, capture)
    value, gradient = closed_form(name, student_MV.expand(trials, -1), target, temperature)
    leaf = student_MV.clone().requires_grad_()
    p, q = (teacher_MV / temperature).softmax(1), (leaf / temperature).softmax(1)
    expected = PLAIN[name][1](p, q, labels_M[:1])
    (slope,) = torch.autograd.grad(expected.sum() * temperature, leaf)

    plain, p, q = teacher_MV.softmax(1)[0], p[0], q.detach()[0]
    head_ids = target.head_ids[0]
    rest = plain.scatter(0, head_ids, 0.0).sum()
    worth = (rest / tail * p / plain).scatter(0, head_ids, 0.0)
    m = skew * p + (1 - skew) * q
    pull = worth * (1 - skew) * q / m
    bound = (pull + q * pull.sum()) / trials + 1e-9
    assert ((gradient.mean(0) - slope[0]).abs() <= bound).all()
    assert float(bound.max()) < 0.2 * float(slope.abs().max())
    assert float(gradient.std(0).max()) > 1e-4  # single records differ
    # KL at temperature 1 has an exact entropy and samples only log q
    sampled = q.log() if name == "kl" and temperature == 1.0 else (p / m).log()
    slack = float((worth * sampled.abs()).sum()) / trials + 1e-9
    assert float(value.mean()) == pytest.approx(float(expected.detach()), abs=slack)
    assert slack < 0.15 * float(expected.detach())


def test_the_residual_goes_to_the_label_whether_it_is_in_the_head_or_not() -> None:
    teacher_MV, student_MV, labels_M, shifts_M = draw()
    inside = torch.arange(ROWS) % 2 == 0
    top = teacher_MV.topk(VOCABULARY, 1).indices
    labels_M = torch.where(inside, top[:, 2], top[:, 20])
    target = dense.record(teacher_MV, labels_M, shifts_M, BUCKET)
    _, gradient = closed_form("residual_to_label", student_MV, target, 1.0)
    p, q = teacher_MV.softmax(1), student_MV.softmax(1)
    aimed_at = torch.zeros_like(p).scatter(1, top[:, :6], p.gather(1, top[:, :6]))
    rest = 1 - aimed_at.sum(1)
    aimed_at[torch.arange(ROWS), labels_M] += rest
    assert float(rest.min()) > 1e-3
    torch.testing.assert_close(gradient, q - aimed_at, rtol=1e-9, atol=1e-11)
    found = value("residual_to_label", student_MV, target, 1.0)
    torch.testing.assert_close(found, divergence(aimed_at, q), rtol=1e-9, atol=1e-11)


RECORDS = (
    (Capture(head=9, tail=0), 9),
    (Capture(head=4, tail=3), 9),
    (Capture(head=0, tail=3), 9),
    (Capture(head=4, tail=0), 9),
)
"""The columns of the package's table, and the vocabulary."""


@pytest.mark.parametrize("name", LOSSES)
def test_the_table_of_supports_is_correct(name: str) -> None:
    (line,) = [row for row in str(losses.__doc__).splitlines() if row.split()[:1] == [name]]
    columns = [line[at:end].strip() for at, end in ((23, 31), (31, 44), (44, 58), (58, 80))]
    for cell, (record, vocabulary) in zip(columns, RECORDS, strict=True):
        capture = record
        if LOSSES[name].beside_text:
            capture = replace(capture, chunks=True, branches=True)
        with_logprobs = replace(capture, tail_logprobs=True)
        used = with_logprobs if cell.endswith("*") else capture
        if cell == "refused":
            assert LOSSES[name].refuse(capture, 1.0) is not None
            continue
        assert LOSSES[name].refuse(used, 1.0) is None
        support = LOSSES[name].support(used, 1.0, vocabulary)
        assert support.removeprefix("a ") == cell.removesuffix("*").strip()
        if cell.endswith("*"):
            without = LOSSES[name].refuse(capture, 1.0) is None
            assert without == (capture.head > 0)
            if without:
                assert LOSSES[name].support(capture, 1.0, vocabulary) == "a lower bound"


@pytest.mark.parametrize("name", sorted(name for name in LOSSES if name in COMPARING))
def test_a_capture_that_cannot_support_a_loss_is_refused_in_one_line(name: str) -> None:
    loss = LOSSES[name]
    nothing = loss.refuse(Capture(head=0, tail=0), 1.0)
    assert nothing == "the store kept neither head nor tail, so there is no distribution to match"
    other = loss.refuse(Capture(head=3, temperatures=(2.0,)), 3.0)
    assert other is not None
    assert other.startswith("temperature 3.0 was not captured (captured: 1.0, 2.0); use one of")
    assert other.endswith("or capture again with logits.temperatures = [3.0]")
    samples = loss.refuse(Capture(head=0, tail=50), 1.0)
    assert (samples is None) == (name == "kl")
    assert samples is None or "capture again with logits.head > 0" in samples
    assert loss.refuse(Capture(head=1, tail=50), 1.0) is None


def test_samples_alone_are_refused_by_losses_that_weight_by_the_student() -> None:
    assert LOSSES["reverse_kl"].refuse(Capture(head=0, tail=50, temperatures=(2.0,)), 2.0) == (
        "reverse KL needs the teacher's probabilities of tokens that the student prefers; "
        "samples alone do not give them: capture again with logits.head > 0"
    )
    assert LOSSES["skew_kl"].refuse(Capture(head=0, tail=50, temperatures=(2.0,)), 1.0) is None
    assert LOSSES["skew_kl"].refuse(Capture(head=0, tail=50), 1.0) == (
        "skewed KL needs the teacher's probability of each token, and the store kept only the ids "
        "of its samples: capture again with logits.head > 0 or with logits.temperatures"
    )


def test_a_sampled_gradient_has_the_direction_of_the_exact_one_and_truncation_has_not() -> None:
    """Angle and length against the full teacher's gradient (arXiv 2503.16870, table 3)."""
    rows, vocabulary = 400, 2000
    random = torch.Generator().manual_seed(5)
    ranks = torch.arange(1, vocabulary + 1, dtype=torch.float64)
    noise = torch.randn(rows, vocabulary, generator=random, dtype=torch.float64)
    teacher_MV = noise - 1.3 * ranks.log()  # few tokens are frequent, as in text
    student_MV = teacher_MV + 0.3 * torch.randn(vocabulary, generator=random, dtype=torch.float64)
    labels_M = torch.zeros(rows, dtype=torch.long)
    shifts_M = torch.rand(rows, generator=random, dtype=torch.float64)
    target = dense.record(teacher_MV, labels_M, shifts_M, Capture(head=16, tail=16))
    features_MD = torch.randn(rows, 8, generator=random, dtype=torch.float64) + 1.0

    def of_weights(gradient_MV: torch.Tensor) -> torch.Tensor:
        return gradient_MV.T @ features_MD  # what a head's weights receive from all positions

    p, q = teacher_MV.softmax(1), student_MV.softmax(1)
    _, gradient = closed_form("kl", student_MV, target, 1.0)
    angle, ratio = dense.angle_and_ratio(of_weights(gradient), of_weights(q - p))
    kept = torch.zeros_like(p).scatter(1, target.head_ids, p.gather(1, target.head_ids))
    truncated = kept.sum(1, keepdim=True) * q - kept
    angle_cut, ratio_cut = dense.angle_and_ratio(of_weights(truncated), of_weights(q - p))
    assert angle < 12
    assert ratio == pytest.approx(1.0, abs=0.05)
    assert angle_cut > 40
    assert ratio_cut > 1.8


CAPTURED = (0.5, 2.0, 4.0)


def record(capture: Capture, rows: int = 6) -> tuple[torch.Tensor, TargetTensors]:
    random = torch.Generator().manual_seed(0)
    logits_MV = torch.randn(rows, 80, generator=random, dtype=torch.float64) * 3
    shifts_M = torch.rand(rows, generator=random, dtype=torch.float64)
    return logits_MV, dense.record(logits_MV, torch.arange(rows), shifts_M, capture)


@pytest.mark.parametrize("temperature", [1.0, *CAPTURED])
def test_head_and_rest_are_exact_at_every_captured_temperature(temperature: float) -> None:
    logits_MV, target = record(Capture(head=7, tail=5, temperatures=CAPTURED))
    probs_MV = (logits_MV / temperature).softmax(1)
    found = tempered(target, temperature)
    torch.testing.assert_close(found.head, probs_MV.gather(1, target.head_ids))
    torch.testing.assert_close(found.log_head, found.head.log())
    torch.testing.assert_close(found.rest, 1 - found.head.sum(1))


def test_at_temperature_1_every_sample_stands_for_an_equal_share() -> None:
    _, target = record(Capture(head=7, tail=50))
    found = tempered(target, 1.0)
    share_J = (target.log_tail.exp() / 50)[target.tail.rows()]
    assert target.tail.counts.max() > 1
    torch.testing.assert_close(found.tail, share_J * target.tail.counts)


def test_an_empty_tail_is_empty_at_every_temperature() -> None:
    _, target = record(Capture(head=80, tail=0, temperatures=CAPTURED))
    for temperature in (1.0, *CAPTURED):
        assert not tempered(target, temperature).rest.any()


def test_a_tail_beyond_fp32_has_finite_samples() -> None:
    """Four hundred nats below the head: zero at T = 2, and never NaN."""
    log = torch.full((1, 3), -400.0)
    target = TargetTensors(
        labels=torch.zeros(1, dtype=torch.long),
        head_ids=torch.zeros(1, 1, dtype=torch.long),
        head_logprobs=torch.zeros(1, 1),
        log_tail=torch.tensor([-398.0]),
        tail=TailTensors.from_draws(torch.tensor([[1, 2, 3]]), log),
        label_logprob=torch.zeros(1),
        entropy=torch.zeros(1),
        log_norm=torch.zeros(1, 2),
        capture=Capture(head=1, tail=3, temperatures=(2.0, 100.0)),
    )
    assert not tempered(target, 2.0).tail.any()
    expected = torch.tensor(2.0 - 4.0).exp() / 3  # e^2 tokens' worth of e^-4 each
    torch.testing.assert_close(tempered(target, 100.0).tail, expected.expand(3))


def test_rows_are_rows_of_every_part() -> None:
    _, target = record(Capture(head=7, tail=5, temperatures=CAPTURED))
    part = target.rows(2, 5)
    assert len(part) == 3
    for field in fields(target):
        value = getattr(target, field.name)
        if isinstance(value, torch.Tensor):
            assert torch.equal(getattr(part, field.name), value[2:5])
    inside = (target.tail.rows() >= 2) & (target.tail.rows() < 5)
    assert torch.equal(part.tail.rows(), target.tail.rows()[inside] - 2)
    assert torch.equal(part.tail.ids, target.tail.ids[inside])
    assert torch.equal(part.tail.counts, target.tail.counts[inside])
    assert part.capture == target.capture
    assert torch.equal(target.to(torch.device("cpu")).log_norm, target.log_norm)


def test_without_targets_only_the_labels_are_there() -> None:
    tokens_T = np.array([5, 6, 7, 8], dtype=np.int32)
    learned_T = np.array([True, False, True, True])
    sequences = build_sequences(0, [[TokenizedDocument(0, tokens_T, learned_T)]])
    targets, capture = Targets.empty(2), Capture(tail=0)
    target = TargetTensors.from_block(Block(sequences=sequences, targets=targets, capture=capture))
    assert target.labels.tolist() == [7, 8]
    assert target.head_ids.shape == target.log_norm.shape == (2, 0)
    assert len(target.tail.ids) == 0
    assert target.tail.lengths.tolist() == [0, 0]
    assert target.tail.logprobs is None


def test_the_mass_outside_the_head_is_a_sum_and_keeps_its_digits() -> None:
    logits_MV = torch.tensor([[0.0, -20.0, -21.0, -22.0]])
    nothing = torch.zeros(1)
    student = StudentSoftmax(
        probs_MV=logits_MV.softmax(1),
        head_logprobs=nothing[:, None],
        tail_logprobs=nothing[:0],
        tail_places=nothing[:0].long(),
        label_logprob=nothing,
        top_logprob=nothing,
        entropy=nothing,
    )
    target: Any = SimpleNamespace(head_ids=torch.tensor([[0]]))
    exact = logits_MV.double().softmax(1)[0, 1:].sum().item()
    assert student.rest(target).item() == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_kl_on_the_head_is_that_of_both_sides_normalised_over_it(temperature: float) -> None:
    """The dense formula on the head, its derivative, and no pull on any other token."""
    teacher_MV, student_MV, labels_M, shifts_M = draw()
    target = replace(dense.record(teacher_MV, labels_M, shifts_M, BUCKET), capture=HEAD_ONLY)
    leaf = student_MV.clone().requires_grad_()
    p = (teacher_MV.gather(1, target.head_ids) / temperature).softmax(1)
    q = (leaf.gather(1, target.head_ids) / temperature).softmax(1)
    expected = divergence(p, q)
    (slope,) = torch.autograd.grad(expected.sum() * temperature, leaf)
    found = value("kl", student_MV, target, temperature)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-9, atol=1e-11)
    closed, gradient = closed_form("kl", student_MV, target, temperature)
    torch.testing.assert_close(closed, expected.detach(), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(gradient, slope, rtol=1e-9, atol=1e-11)
    assert float(expected.detach().min()) > 1e-3
    outside = gradient.scatter(1, target.head_ids, 0.0)
    assert float(outside.abs().max()) == 0.0


def test_only_losses_that_need_no_mass_are_supported() -> None:
    supported = {name for name, loss in LOSSES.items() if loss.refuse(HEAD_ONLY, 1.0) is None}
    assert supported == {"kl", "cross_entropy"}
    assert LOSSES["kl"].support(HEAD_ONLY, 1.0, 40) == "on the head only"
    assert LOSSES["kl"].support(BUCKET, 1.0, 40) == "a lower bound"
    reason = LOSSES["reverse_kl"].refuse(HEAD_ONLY, 1.0)
    assert reason is not None
    assert "imported without the mass outside the head" in reason
