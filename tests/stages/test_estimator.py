"""The meter is compared with dense gradients in float64."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from coldstill.data.errors import ColdstillError
from coldstill.data.order import uniform
from coldstill.data.schema import Capture
from coldstill.stages.planning.estimator import EstimatorMeter, EstimatorQuality
from dense import angle_and_ratio, record

V, D, M = 300, 24, 60


def draw(
    seed: int = 0, *, width: int = D, vocabulary: int = V, count: int = M
) -> tuple[torch.Tensor, ...]:
    """Hidden states with a common direction, Zipf-like logits, labels and random numbers."""
    generator = torch.Generator().manual_seed(seed)
    hidden_MD = torch.randn(count, width, generator=generator) + 0.5
    output = torch.randn(width, vocabulary, generator=generator) * (8.0 / width**0.5)
    prior = -torch.log(torch.arange(vocabulary) + 2.0)
    logits_MV = (hidden_MD - 0.5) @ output * 0.4 + 1.5 * prior
    labels_M = torch.randint(0, vocabulary, (count,), generator=generator)
    return hidden_MD, logits_MV, labels_M, shifts(seed, count)


def shifts(seed: int, count: int) -> torch.Tensor:
    return torch.from_numpy(uniform(seed, np.arange(count), np.arange(count, dtype=np.int32)))


def measure(capture: Capture, *parts: tuple[torch.Tensor, ...]) -> EstimatorQuality:
    meter = EstimatorMeter([Capture(head=1, tail=1), capture])
    for part in parts:
        meter.add(*part)
    return meter.result()[1]


def gradients_by_logits(
    logits_MV: torch.Tensor, labels_M: torch.Tensor, uniform_M: torch.Tensor, capture: Capture
) -> tuple[torch.Tensor, torch.Tensor]:
    """[M, V] gradients of the record and of the whole distribution in float64, token by token."""
    teacher = logits_MV.double().softmax(1)
    frequencies = (teacher.sum(0) + 1.0 / V) / (len(teacher) + 1)
    student = (teacher + frequencies) / 2
    target = record(logits_MV, labels_M, uniform_M, capture)
    ours = student.clone()
    for row in range(len(ours)):
        head = target.head_ids[row].tolist()
        rest = float(target.log_tail[row].exp())
        if capture.tail == 0:
            outside = [token for token in range(V) if token not in head]
            ours[row, outside] *= 1.0 - rest / float(student[row, outside].sum())
        for token in head:
            ours[row, token] -= teacher[row, token]
        for token in target.tail_ids[row].tolist():
            ours[row, token] -= rest / capture.tail
    return ours, student - teacher


@pytest.mark.parametrize(("head", "tail"), [(0, 12), (5, 7), (6, 0), (1, 1), (40, 0)])
def test_figures_equal_those_of_dense_gradients(head: int, tail: int) -> None:
    hidden_MD, logits_MV, labels_M, uniform_M = draw()
    capture = Capture(head=head, tail=tail)
    found = measure(capture, (hidden_MD, logits_MV, labels_M, uniform_M))
    ours, full = gradients_by_logits(logits_MV, labels_M, uniform_M, capture)
    hidden = hidden_MD.double()
    angle, ratio = angle_and_ratio(ours.t() @ hidden, full.t() @ hidden)
    squares_M = hidden.square().sum(1)
    error = ((ours - full).square().sum(1) * squares_M).sum()
    assert found.capture == capture
    assert found.positions == M
    assert found.angle == pytest.approx(angle, rel=1e-3)
    assert found.norm_ratio == pytest.approx(ratio, rel=1e-4)
    exact = (full.square().sum(1) * squares_M).sum()
    assert found.relative_error == pytest.approx(float(error / exact), rel=1e-3)


def test_a_head_of_the_whole_vocabulary_is_exact() -> None:
    found = measure(Capture(head=V, tail=0), draw())
    assert found.angle < 1e-3
    assert found.norm_ratio == pytest.approx(1.0, abs=1e-6)
    assert found.relative_error < 1e-9


@pytest.mark.parametrize(("head", "tail"), [(0, 12), (4, 6)])
def test_samples_average_to_the_exact_gradient_and_a_head_alone_does_not(
    head: int, tail: int
) -> None:
    """The same positions with many seeds: noise falls with the root of their number, bias stays."""
    hidden_MD, logits_MV, labels_M, _ = draw()
    runs = [(hidden_MD, logits_MV, labels_M, shifts(seed, M)) for seed in range(100)]
    sampled, alone = Capture(head=head, tail=tail), Capture(head=4, tail=0)
    one, many = measure(sampled, runs[0]), measure(sampled, *runs)
    assert many.positions == 100 * M
    assert many.angle < 0.15 * one.angle
    assert many.norm_ratio == pytest.approx(1.0, abs=0.005)
    assert many.relative_error == pytest.approx(one.relative_error, rel=0.2)
    biased = measure(alone, runs[0]), measure(alone, *runs)
    assert biased[1].angle == pytest.approx(biased[0].angle, rel=0.1)
    assert biased[1].angle > 5 * many.angle


def test_more_samples_have_less_noise() -> None:
    positions = draw(count=400)
    errors = [
        measure(Capture(head=0, tail=tail), positions).relative_error for tail in (4, 8, 16, 32)
    ]
    assert all(b < 0.6 * a for a, b in pairwise(errors))


def test_wide_hidden_states_are_measured_almost_as_well() -> None:
    """The projection to 64 numbers is compared with the dense gradient of all 500."""
    hidden_MD, logits_MV, labels_M, uniform_M = draw(width=500)
    for capture in (Capture(head=0, tail=8), Capture(head=4, tail=0)):
        found = measure(capture, (hidden_MD, logits_MV, labels_M, uniform_M))
        ours, full = gradients_by_logits(logits_MV, labels_M, uniform_M, capture)
        hidden = hidden_MD.double()
        angle, ratio = angle_and_ratio(ours.t() @ hidden, full.t() @ hidden)
        assert found.angle == pytest.approx(angle, rel=0.15)
        assert found.norm_ratio == pytest.approx(ratio, rel=0.1)


def test_logits_are_not_changed_and_large_vocabularies_are_processed_in_chunks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    positions = draw()
    before = positions[1].clone()
    whole = measure(Capture(head=2, tail=9), positions)
    assert torch.equal(positions[1], before)
    monkeypatch.setattr("coldstill.stages.planning.estimator._CHUNK_ELEMENTS", 7 * V)
    few = measure(Capture(head=2, tail=9), positions)
    assert few.positions == whole.positions
    # not equal: the token frequencies are those of the rows so far
    assert few.angle == pytest.approx(whole.angle, rel=0.2)
    assert few.relative_error == pytest.approx(whole.relative_error, rel=0.2)


def test_hidden_states_may_have_any_precision() -> None:
    hidden_MD, *rest = draw()
    half = measure(Capture(head=2, tail=9), (hidden_MD.bfloat16(), *rest))
    assert half.angle == pytest.approx(
        measure(Capture(head=2, tail=9), (hidden_MD, *rest)).angle, rel=0.05
    )


def test_an_empty_capture_and_no_positions_are_refused() -> None:
    with pytest.raises(ColdstillError, match="estimator: the store kept neither head nor tail"):
        EstimatorMeter([Capture(head=0, tail=0)])
    with pytest.raises(ColdstillError, match="estimator: no position was measured"):
        EstimatorMeter([Capture()]).result()
