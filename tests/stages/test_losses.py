"""Every loss against its plain formula, autograd, finite differences and the whole teacher."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import dense
import pytest
import torch
from coldstill.data.schema import Capture
from coldstill.stages.targets.losses import LOSSES

if TYPE_CHECKING:
    from coldstill.stages.targets.losses.sparse import SparseGradient
    from coldstill.stages.targets.tensors import TargetTensors

ROWS, VOCABULARY = 13, 60
TEMPERATURES = (0.5, 2.0, 4.0)
CAPTURES = {
    "head and tail": Capture(head=6, tail=9, temperatures=TEMPERATURES),
    "tail alone": Capture(head=0, tail=12, temperatures=TEMPERATURES),
    "bucket": Capture(head=8, tail=0, temperatures=TEMPERATURES),
    "everything": Capture(head=VOCABULARY, tail=0, temperatures=TEMPERATURES),
}
KL = LOSSES["kl"]


def draw(seed: int = 0, rows: int = ROWS, scale: float = 3.0) -> tuple[torch.Tensor, ...]:
    """Teacher's and student's logits, labels and shifts, in float64."""
    random = torch.Generator().manual_seed(seed)
    teacher_MV = torch.randn(rows, VOCABULARY, generator=random, dtype=torch.float64) * scale
    student_MV = torch.randn(rows, VOCABULARY, generator=random, dtype=torch.float64) * 2
    labels_M = torch.randint(0, VOCABULARY, (rows,), generator=random)
    return teacher_MV, student_MV, labels_M, torch.rand(rows, generator=random, dtype=torch.float64)


def value(
    name: str, student_MV: torch.Tensor, target: TargetTensors, temperature: float
) -> torch.Tensor:
    return LOSSES[name].value((student_MV / temperature).log_softmax(1), target, temperature)


def closed_form(
    name: str, student_MV: torch.Tensor, target: TargetTensors, temperature: float
) -> tuple[SparseGradient, torch.Tensor]:
    """The sparse gradient, and the same written out by the tempered logits."""
    student = dense.softmax_of(student_MV / temperature, target)
    probs_MV = student.probs_MV.clone()
    sparse: SparseGradient = LOSSES[name].gradient(  # type: ignore[attr-defined]
        student, target, temperature
    )
    whole = sparse.softmax_weight[:, None] * probs_MV
    if sparse.head_gradient is not None:
        whole = whole.scatter(1, target.head_ids, sparse.head_gradient)
    return sparse, whole.scatter_add(1, sparse.ids, sparse.entries)


CASES = list(itertools.product(LOSSES, CAPTURES, (1.0, *TEMPERATURES)))


@pytest.mark.parametrize(("name", "capture", "temperature"), CASES)
def test_the_closed_form_is_the_derivative_of_the_plain_formula(
    name: str, capture: str, temperature: float
) -> None:
    teacher_MV, student_MV, labels_M, shifts_M = draw()
    target = dense.record(teacher_MV, labels_M, shifts_M, CAPTURES[capture])
    sparse, gradient = closed_form(name, student_MV, target, temperature)
    plain = value(name, student_MV, target, temperature)
    torch.testing.assert_close(sparse.value, plain, rtol=1e-9, atol=1e-9)
    step, direction = 1e-5, torch.randn(student_MV.shape, dtype=torch.float64)
    ahead, behind = (
        value(name, student_MV + sign * step * direction * temperature, target, temperature)
        for sign in (1, -1)
    )
    slope = (ahead - behind) / (2 * step)
    torch.testing.assert_close((gradient * direction).sum(1), slope, rtol=1e-6, atol=1e-7)
    leaf = student_MV.clone().requires_grad_()
    torch.autograd.backward(value(name, leaf * temperature, target, temperature).sum())
    _, expected = closed_form(name, student_MV * temperature, target, temperature)
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("temperature", [1.0, *TEMPERATURES])
def test_with_everything_kept_it_is_the_divergence_itself(temperature: float) -> None:
    teacher_MV, student_MV, labels_M, shifts_M = draw()
    target = dense.record(teacher_MV, labels_M, shifts_M, CAPTURES["everything"])
    found = value("kl", student_MV, target, temperature)
    expected = dense.forward_kl(teacher_MV, student_MV, temperature)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert (found > 0.05).all()


def test_cross_entropy_is_of_the_label_and_of_no_other_token() -> None:
    teacher_MV, student_MV, labels_M, shifts_M = draw()
    target = dense.record(teacher_MV, labels_M, shifts_M, Capture(head=0, tail=0))
    found = value("cross_entropy", student_MV, target, 1.0)
    torch.testing.assert_close(found, dense.cross_entropy(student_MV, labels_M))
    assert not torch.allclose(found, dense.cross_entropy(student_MV, labels_M.roll(1)))


@pytest.mark.parametrize("temperature", [1.0, *TEMPERATURES])
@pytest.mark.parametrize("capture", ["bucket", "everything"])
def test_a_student_that_equals_the_teacher_has_nothing_to_learn(
    capture: str, temperature: float
) -> None:
    teacher_MV, _, labels_M, shifts_M = draw()
    target = dense.record(teacher_MV, labels_M, shifts_M, CAPTURES[capture])
    sparse, gradient = closed_form("kl", teacher_MV + 3.0, target, temperature)
    assert float(sparse.value.abs().max()) < 1e-9
    assert float(gradient.abs().max()) < 1e-9


@pytest.mark.parametrize("temperature", [1.0, *TEMPERATURES])
def test_a_bucket_never_says_more_than_the_divergence_and_never_less_than_nothing(
    temperature: float,
) -> None:
    teacher_MV, student_MV, labels_M, shifts_M = draw(rows=200)
    target = dense.record(teacher_MV, labels_M, shifts_M, CAPTURES["bucket"])
    found = value("kl", student_MV, target, temperature)
    assert (found >= -1e-12).all()
    assert (found <= dense.forward_kl(teacher_MV, student_MV, temperature) + 1e-12).all()
    assert (found > 0.01).any()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_bucket_is_the_divergence_of_the_partition(temperature: float) -> None:
    teacher_MV, student_MV, labels_M, shifts_M = draw()
    target = dense.record(teacher_MV, labels_M, shifts_M, CAPTURES["bucket"])

    def partition(logits_MV: torch.Tensor) -> torch.Tensor:
        probs_MV = (logits_MV / temperature).softmax(1)
        head = probs_MV.gather(1, target.head_ids)
        rest = probs_MV.scatter(1, target.head_ids, 0.0).sum(1, keepdim=True)
        return torch.cat([head, rest], 1)

    p, q = partition(teacher_MV), partition(student_MV)
    expected = (p * (p / q).log()).sum(1)
    torch.testing.assert_close(value("kl", student_MV, target, temperature), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("capture", CAPTURES)
def test_gradients_are_finite_at_every_end(
    capture: str, temperature: float, dtype: torch.dtype
) -> None:
    """Teachers with all or no mass beside the head; students likewise, and at the other end."""
    teacher_MV, student_MV, labels_M, shifts_M = draw()
    top, second = teacher_MV.topk(9, 1).indices[:, :8], teacher_MV.topk(40, 1).indices[:, 30:]
    teachers = [teacher_MV, teacher_MV * 0, teacher_MV * 40]
    teachers.append(teacher_MV.scatter(1, top[:, :1], 400.0))  # nothing beside the first token
    students = [teacher_MV, student_MV, student_MV * 40]
    students.append(student_MV.scatter(1, top, 300.0))  # everything on the teacher's head
    students.append(student_MV.scatter(1, second, 300.0))  # nothing there
    for teacher, student in itertools.product(teachers, students):
        target = dense.record(teacher, labels_M, shifts_M, CAPTURES[capture])
        rounded = dense.cast(target, dtype)
        sparse, gradient = closed_form("kl", student.to(dtype), rounded, temperature)
        assert torch.isfinite(gradient).all()
        assert torch.isfinite(sparse.value).all()


@pytest.mark.parametrize("temperature", [1.0, *TEMPERATURES])
@pytest.mark.parametrize("head", [0, 6])
def test_sampled_records_give_the_gradient_of_the_whole_teacher_on_average(
    head: int, temperature: float
) -> None:
    """Over equally spaced shifts the mean is an integral, off by at most a step per edge."""
    trials, tail = 3000, 10
    teacher_MV, student_MV, _, _ = draw(rows=1, scale=1.5)
    shifts_M = (torch.arange(trials, dtype=torch.float64) + 0.5) / trials
    capture = Capture(head=head, tail=tail, temperatures=TEMPERATURES)
    target = dense.record(
        teacher_MV.expand(trials, -1), torch.zeros(trials, dtype=torch.long), shifts_M, capture
    )
    sparse, gradient = closed_form("kl", student_MV.expand(trials, -1), target, temperature)
    q, p = ((x / temperature).softmax(1)[0] for x in (student_MV, teacher_MV))
    plain = teacher_MV.softmax(1)[0]
    rest = plain.scatter(0, target.head_ids[0], 0.0).sum()
    worth = (rest / tail * p / plain).scatter(0, target.head_ids[0], 0.0)
    bound = (worth + q * worth.sum()) / trials + 1e-9
    assert ((gradient.mean(0) - (q - p)).abs() <= bound).all()
    assert float(bound.max()) < 0.2 * float((q - p).abs().max())
    expected = dense.forward_kl(teacher_MV, student_MV, temperature)
    # at temperature 1 the entropy is exact and only log q is sampled
    sampled = q.log() if temperature == 1.0 else p.log() - q.log()
    slack = float((worth * sampled.abs()).sum()) / trials
    assert float(sparse.value.mean()) == pytest.approx(float(expected), abs=slack + 1e-9)
    assert slack < 0.1 * float(expected)
    assert float(gradient.std(0).max()) > 1e-3  # single records do differ


@pytest.mark.parametrize("temperature", [2.0, 4.0])
def test_samples_at_another_temperature_need_their_own_weights(temperature: float) -> None:
    """Giving every sample an equal share of the tempered tail is another, biased target."""
    teacher_MV, student_MV, labels_M, _ = draw(rows=1, scale=1.5)
    trials = 1000
    shifts_M = (torch.arange(trials, dtype=torch.float64) + 0.5) / trials
    capture = Capture(head=2, tail=8, temperatures=TEMPERATURES)
    target = dense.record(teacher_MV.expand(trials, -1), labels_M.expand(trials), shifts_M, capture)
    _, gradient = closed_form("kl", student_MV.expand(trials, -1), target, temperature)
    q, p = ((x / temperature).softmax(1)[0] for x in (student_MV, teacher_MV))
    rest = p.scatter(0, target.head_ids[0], 0.0).sum()
    naive = torch.zeros(trials, VOCABULARY, dtype=torch.float64)
    naive.scatter_add_(1, target.tail_ids, (rest / 8).expand(trials, 8))
    naive = naive.mean(0).scatter(0, target.head_ids[0], p[target.head_ids[0]])
    ours = float((q - gradient.mean(0) - p).abs().max())
    assert float((naive - p).abs().max()) > 20 * ours


def test_a_sampled_gradient_points_where_the_whole_one_does_and_truncation_does_not() -> None:
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


def test_what_a_record_cannot_support_is_refused_in_a_line() -> None:
    assert KL.refuse(Capture(head=1, tail=0), 1.0) is None
    assert KL.refuse(Capture(head=0, tail=1, temperatures=(2.0,)), 2.0) is None
    nothing = KL.refuse(Capture(head=0, tail=0), 1.0)
    assert nothing == "the store kept neither head nor tail, so there is no distribution to match"
    other = KL.refuse(Capture(temperatures=(2.0,)), 3.0)
    assert other is not None
    assert "temperature 3.0 was not captured (captured: 1.0, 2.0)" in other
    assert "logits.temperatures = [3.0]" in other
    assert LOSSES["cross_entropy"].refuse(Capture(head=0, tail=0), 1.0) is None
