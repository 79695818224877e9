"""A pilot's figures and gradient errors against whole distributions and captured stores."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from coldstill.data.errors import ColdstillError
from coldstill.data.order import uniform
from coldstill.data.schema import Capture
from coldstill.stages.planning import pilot as pilot_stage
from coldstill.stages.planning.estimator import EstimatorMeter, EstimatorQuality
from coldstill.stages.planning.pilot import PilotFigures, WayFigures, run_pilot
from conftest import VOCABULARY
from dense import angle_and_ratio, logits_alone, record
from small_runs import LENGTH, SmallCorpus, capture_store, load_teacher, plan_capture

if TYPE_CHECKING:
    from pathlib import Path

    from coldstill.stages.capture.plan import CapturePlan
    from coldstill.stages.capture.teacher import Teacher
    from coldstill.stages.report import Report


OWN, TAIL = Capture(head=4, tail=4, seed=3), Capture(head=0, tail=8, seed=3)
WAYS = ((OWN, "compact"), (OWN, "plain"), (TAIL, "compact"))


@pytest.fixture(scope="module")
def teacher(saved_teacher: Path) -> Teacher:
    return load_teacher(saved_teacher)


@pytest.fixture(scope="module")
def plans(corpus: SmallCorpus, saved_teacher: Path) -> list[CapturePlan]:
    """All ways, on the whole training split, in batches of two sequences."""
    return [plan_capture(corpus, saved_teacher, saved_teacher, c, codec=codec) for c, codec in WAYS]


@pytest.fixture(scope="module")
def measured(
    plans: list[CapturePlan], teacher: Teacher, tmp_path_factory: pytest.TempPathFactory
) -> tuple[PilotFigures, list[Report], Path]:
    scratch = tmp_path_factory.mktemp("scratch")
    reports: list[Report] = []
    return run_pilot(plans, teacher, scratch, reports.append), reports, scratch


@pytest.mark.slow
def test_covered_mass_is_that_of_the_whole_distribution(
    plans: list[CapturePlan], teacher: Teacher, measured: tuple[PilotFigures, list[Report], Path]
) -> None:
    figures = measured[0]
    sequences = plans[0].sequences
    with torch.no_grad():
        logits_MV, _ = logits_alone(
            teacher.head.model, sequences.read(np.arange(len(sequences))), VOCABULARY
        )
    probs_MV = logits_MV.double().softmax(1).sort(1, descending=True).values
    assert figures.positions == len(probs_MV)
    assert list(figures.covered_mass) == [1, 4, 8, 16, 32, 64, 128]
    for size, mass in figures.covered_mass.items():
        assert mass == pytest.approx(float(probs_MV[:, :size].sum(1).mean()), abs=1e-4)


@pytest.mark.slow
def test_bytes_and_codec_errors_are_those_of_captured_stores(
    corpus: SmallCorpus,
    saved_teacher: Path,
    measured: tuple[PilotFigures, list[Report], Path],
    tmp_path: Path,
) -> None:
    for (capture, codec), way in zip(WAYS, measured[0].ways, strict=True):
        assert (way.manifest.capture, way.manifest.codec["name"]) == (capture, codec)
        at = tmp_path / f"{capture.head} {codec}"
        store = capture_store(corpus, saved_teacher, at, capture, codec=codec)
        stored = sum(commit.bytes for commit in store.commits()) / store.positions
        # sequences are written in the order of batches of similar length, so bytes differ a little
        assert way.bytes_per_position == pytest.approx(stored, rel=0.02)
        assert way.kl == pytest.approx(store.statistics.distortion / store.positions, abs=1e-7)
    compact, plain, tail = measured[0].ways
    assert compact.bytes_per_position < plain.bytes_per_position
    assert plain.kl == 0.0
    assert tail.kl < 1e-6 < compact.kl


@pytest.mark.slow
def test_gradients_are_measured_on_the_positions_of_a_capture(
    corpus: SmallCorpus,
    saved_teacher: Path,
    teacher: Teacher,
    plans: list[CapturePlan],
    measured: tuple[PilotFigures, list[Report], Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    seen: list[torch.Tensor] = []

    class Meter(EstimatorMeter):
        def add(self, *parts: torch.Tensor) -> None:
            hidden_MD, logits_MV, labels_M, uniform_M = parts
            again = teacher.head.logits(hidden_MD, torch.empty_like(logits_MV))
            assert torch.equal(again, logits_MV)
            assert labels_M.dtype == torch.int64
            assert uniform_M.dtype == torch.float64
            seen.append(logits_MV.log_softmax(1).gather(1, labels_M[:, None]))
            super().add(*parts)

    monkeypatch.setattr(pilot_stage, "EstimatorMeter", Meter)
    figures = run_pilot(plans, teacher, tmp_path)
    store = capture_store(corpus, saved_teacher, tmp_path / "store", OWN)
    assert float(torch.cat(seen).mean()) == pytest.approx(
        -store.statistics.loss / store.positions, rel=1e-4
    )
    for way, first in zip(figures.ways, measured[0].ways, strict=True):
        assert way.quality == first.quality  # the same sequences, the same figures
        assert way.quality.capture == way.manifest.capture
        assert way.quality.positions == figures.positions


def test_a_pilot_reports_every_sequence_and_deletes_its_shards(
    corpus: SmallCorpus, measured: tuple[PilotFigures, list[Report], Path]
) -> None:
    figures, reports, scratch = measured
    sequences = corpus.record.splits["train"].sequences
    assert figures.sequences == sequences
    counted = [report for report in reports if not report.doing]
    assert [counted[0].done, counted[0].total] == [0, sequences * LENGTH]
    assert counted[-1].done == counted[-1].total == sequences * LENGTH
    assert sum(report.step for report in reports) == sequences * LENGTH
    assert figures.tokens_per_second > 0
    assert list(scratch.rglob("*.arrow")) == []


def test_only_the_recipe_s_own_capture_counts_for_the_speed(
    plans: list[CapturePlan], teacher: Teacher, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    compare, hidden = pilot_stage._Measuring._compare, type(teacher.head).hidden

    def slow_compare(self: Any, *parts: Any) -> None:
        clock[0] += 1000.0
        compare(self, *parts)

    def slow_hidden(self: Any, inputs: Any) -> torch.Tensor:
        clock[0] += 4.0
        return hidden(self, inputs)

    monkeypatch.setattr(pilot_stage._Measuring, "_compare", slow_compare)
    monkeypatch.setattr(type(teacher.head), "hidden", slow_hidden)
    rows = np.arange(4)  # two batches, of which the first is a warm-up
    few = [dataclasses.replace(plan, rows=rows, batch_tokens=4 * LENGTH) for plan in plans]
    figures = run_pilot(few, teacher, tmp_path)
    assert figures.tokens_per_second == pytest.approx(LENGTH * len(rows) / 4.0)


def test_a_gradient_error_is_the_distance_between_two_gradients() -> None:
    def error(angle: float, ratio: float) -> float:
        quality = EstimatorQuality(
            capture=OWN, angle=angle, norm_ratio=ratio, relative_error=0.0, positions=1
        )
        way = WayFigures(manifest=None, bytes_per_position=1.0, kl=0.0, quality=quality)  # type: ignore[arg-type]
        return way.gradient_error

    assert error(0.0, 1.0) == 0.0
    assert error(0.0, 2.5) == pytest.approx(1.5)
    assert error(90.0, 1.0) == pytest.approx(math.sqrt(2))
    assert error(180.0, 1.0) == pytest.approx(2.0)


def test_a_teacher_with_nan_logits_is_refused(
    plans: list[CapturePlan], saved_teacher: Path, tmp_path: Path
) -> None:
    broken = load_teacher(saved_teacher)
    with torch.no_grad():
        broken.head.model.get_output_embeddings().weight[5] = torch.nan
    with pytest.raises(ColdstillError, match=r"its logits are not finite at train sequence 0"):
        run_pilot(plans, broken, tmp_path)


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
        own = target.tail.slice(row, row + 1)
        for token, count in zip(own.ids.tolist(), own.counts.tolist(), strict=True):
            ours[row, token] -= count * rest / capture.tail
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


@pytest.mark.slow
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
