"""A pilot's figures are compared with the whole distribution and with captured stores."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from coldstill.data.errors import ColdstillError
from coldstill.data.schema import Capture
from coldstill.stages.planning import pilot as pilot_stage
from coldstill.stages.planning.estimator import EstimatorMeter, EstimatorQuality
from coldstill.stages.planning.pilot import PilotFigures, WayFigures, run_pilot
from conftest import VOCABULARY
from small_runs import (
    LENGTH,
    SmallCorpus,
    capture_store,
    load_teacher,
    plan_capture,
)

if TYPE_CHECKING:
    from pathlib import Path

    from coldstill.stages.capture.plan import CapturePlan
    from coldstill.stages.capture.teacher import Teacher
    from coldstill.stages.report import Report

pytest_plugins = ("captured",)

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


def all_logits(plan: CapturePlan, teacher: Teacher) -> torch.Tensor:
    """[M, V] in float64, from the model's own forward pass, one document at a time."""
    sequences = plan.sequences
    found = []
    for one in (sequences.read(np.array([row])) for row in range(len(sequences))):
        tokens = torch.from_numpy(one.tokens[0].astype(np.int64))
        starts = [*one.document_starts[0].tolist(), len(tokens)]
        logits = [
            teacher.head.model(input_ids=tokens[None, a:b], use_cache=False).logits[0]
            for a, b in pairwise(starts)
        ]
        found.append(torch.cat(logits)[one.positions[0].astype(np.int64), :VOCABULARY])
    return torch.cat(found).detach().double()


def test_covered_mass_is_that_of_the_whole_distribution(
    plans: list[CapturePlan],
    teacher: Teacher,
    measured: tuple[PilotFigures, list[Report], Path],
) -> None:
    figures = measured[0]
    probs_MV = all_logits(plans[0], teacher).softmax(1).sort(1, descending=True).values
    assert figures.positions == len(probs_MV)
    assert list(figures.covered_mass) == [1, 4, 8, 16, 32, 64, 128]
    for size, mass in figures.covered_mass.items():
        assert mass == pytest.approx(float(probs_MV[:, :size].sum(1).mean()), abs=1e-4)


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
