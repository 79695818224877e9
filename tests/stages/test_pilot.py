"""A pilot's figures against the whole distribution, and against stores really captured."""

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
from coldstill.stages.capture.plan import make_manifest
from coldstill.stages.planning import pilot as pilot_stage
from coldstill.stages.planning.estimator import EstimatorMeter, EstimatorQuality
from coldstill.stages.planning.pilot import PilotFigures, PilotPlan, WayFigures, run_pilot
from conftest import VOCABULARY
from small_runs import (
    LENGTH,
    SmallCorpus,
    capture_store,
    load_teacher,
    plan_capture,
    prepare,
    save_teacher,
)

if TYPE_CHECKING:
    from pathlib import Path

    from coldstill.data.store.manifest import Manifest
    from coldstill.stages.capture.teacher import Teacher
    from coldstill.stages.report import Report

CAPTURES = (Capture(head=4, tail=4, seed=3), Capture(head=0, tail=8, seed=3))


@pytest.fixture(scope="module")
def corpus(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> SmallCorpus:
    return prepare(tmp_path_factory.mktemp("corpus"), tokenizer)


@pytest.fixture(scope="module")
def folder(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher") / "model", tokenizer)


@pytest.fixture(scope="module")
def teacher(folder: Path) -> Teacher:
    return load_teacher(folder)


@pytest.fixture(scope="module")
def manifests(
    corpus: SmallCorpus, folder: Path, teacher: Teacher, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Manifest, ...]:
    """Both captures in `compact`, the first in `plain` too."""
    where = tmp_path_factory.mktemp("nowhere") / "logits"
    ways = [(CAPTURES[0], "compact"), (CAPTURES[0], "plain"), (CAPTURES[1], "compact")]
    plans = [plan_capture(corpus, folder, where, c, codec=codec) for c, codec in ways]
    return tuple(make_manifest(plan, teacher.isolation) for plan in plans)


def planned(
    corpus: SmallCorpus, folder: Path, manifests: tuple[Manifest, ...], **changes: Any
) -> PilotPlan:
    """The whole training split, in batches of two sequences."""
    plan = plan_capture(corpus, folder, folder, CAPTURES[0])
    whole = PilotPlan(
        sequences=plan.sequences, rows=plan.rows, manifests=manifests, batch_tokens=2 * LENGTH
    )
    return dataclasses.replace(whole, **changes)


@pytest.fixture(scope="module")
def measured(
    corpus: SmallCorpus,
    folder: Path,
    teacher: Teacher,
    manifests: tuple[Manifest, ...],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[PilotFigures, list[Report], Path]:
    scratch = tmp_path_factory.mktemp("scratch")
    reports: list[Report] = []
    plan = planned(corpus, folder, manifests)
    return run_pilot(plan, teacher, scratch, reports.append), reports, scratch


def every_logit(corpus: SmallCorpus, folder: Path, teacher: Teacher) -> torch.Tensor:
    """[M, V] in float64, from the model's own forward, one document at a time."""
    sequences = plan_capture(corpus, folder, folder, CAPTURES[0]).sequences
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
    corpus: SmallCorpus,
    folder: Path,
    teacher: Teacher,
    measured: tuple[PilotFigures, list[Report], Path],
) -> None:
    figures = measured[0]
    probs_MV = every_logit(corpus, folder, teacher).softmax(1).sort(1, descending=True).values
    assert figures.positions == len(probs_MV)
    assert list(figures.covered_mass) == [1, 4, 8, 16, 32, 64, 128]
    for size, mass in figures.covered_mass.items():
        assert mass == pytest.approx(float(probs_MV[:, :size].sum(1).mean()), abs=1e-4)


def test_bytes_and_distortion_are_those_of_stores_captured_likewise(
    corpus: SmallCorpus,
    folder: Path,
    manifests: tuple[Manifest, ...],
    measured: tuple[PilotFigures, list[Report], Path],
    tmp_path: Path,
) -> None:
    for place, way in enumerate(measured[0].ways):
        assert way.manifest == manifests[place]
        codec = str(way.manifest.codec["name"])
        at = tmp_path / str(place)
        store = capture_store(corpus, folder, at, way.manifest.capture, codec=codec)
        stored = sum(commit.bytes for commit in store.commits()) / store.positions
        # sequences are written as batches of like length come, so only nearly the same bytes
        assert way.bytes_per_position == pytest.approx(stored, rel=0.02)
        assert way.kl == pytest.approx(store.statistics.distortion / store.positions, abs=1e-7)
    compact, plain, tail = measured[0].ways
    assert compact.bytes_per_position < plain.bytes_per_position
    assert plain.kl == 0.0
    assert tail.kl < 1e-6 < compact.kl


def test_gradients_are_measured_on_what_a_capture_would_see(
    corpus: SmallCorpus,
    folder: Path,
    teacher: Teacher,
    manifests: tuple[Manifest, ...],
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
    figures = run_pilot(planned(corpus, folder, manifests), teacher, tmp_path)
    store = capture_store(corpus, folder, tmp_path / "store", CAPTURES[0])
    assert float(torch.cat(seen).mean()) == pytest.approx(
        -store.statistics.loss / store.positions, rel=1e-4
    )
    for way, first in zip(figures.ways, measured[0].ways, strict=True):
        assert way.quality == first.quality  # the same sequences, the same figures
        assert way.quality.capture == way.manifest.capture
        assert way.quality.positions == figures.positions


def test_a_pilot_reports_every_sequence_and_leaves_no_shards(
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


def test_the_time_of_looking_does_not_count(
    corpus: SmallCorpus,
    folder: Path,
    teacher: Teacher,
    manifests: tuple[Manifest, ...],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    look, hidden = pilot_stage._Pass._look, type(teacher.head).hidden

    def slow_look(self: Any, *parts: Any) -> None:
        clock[0] += 1000.0
        look(self, *parts)

    def slow_hidden(self: Any, inputs: Any) -> torch.Tensor:
        clock[0] += 4.0
        return hidden(self, inputs)

    monkeypatch.setattr(pilot_stage._Pass, "_look", slow_look)
    monkeypatch.setattr(type(teacher.head), "hidden", slow_hidden)
    rows = np.arange(4)  # in two batches, of which the first warms up
    full = planned(corpus, folder, manifests, rows=rows, batch_tokens=4 * LENGTH)
    kept = tuple(dataclasses.replace(m, sequences=len(rows)) for m in manifests)
    figures = run_pilot(dataclasses.replace(full, manifests=kept), teacher, tmp_path)
    assert figures.tokens_per_second == pytest.approx(LENGTH * len(rows) / 4.0)


def test_an_error_is_the_distance_of_two_gradients() -> None:
    def error(angle: float, ratio: float) -> float:
        quality = EstimatorQuality(
            capture=CAPTURES[0], angle=angle, norm_ratio=ratio, relative_error=0.0, positions=1
        )
        way = WayFigures(manifest=None, bytes_per_position=1.0, kl=0.0, quality=quality)  # type: ignore[arg-type]
        return way.gradient_error

    assert error(0.0, 1.0) == 0.0
    assert error(0.0, 2.5) == pytest.approx(1.5)
    assert error(90.0, 1.0) == pytest.approx(math.sqrt(2))
    assert error(180.0, 1.0) == pytest.approx(2.0)


def test_a_teacher_without_numbers_is_refused(
    corpus: SmallCorpus, folder: Path, manifests: tuple[Manifest, ...], tmp_path: Path
) -> None:
    broken = load_teacher(folder)
    with torch.no_grad():
        broken.head.model.get_output_embeddings().weight[5] = torch.nan
    with pytest.raises(ColdstillError, match=r"its logits are not finite at train sequence 0"):
        run_pilot(planned(corpus, folder, manifests), broken, tmp_path)
