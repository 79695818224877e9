"""Lines of metrics.jsonl and reports of progress."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from coldstill.data.schema import Capture
from coldstill.stages.training.feed import StoreDataset
from coldstill.stages.training.metrics import read_metrics
from small_runs import CLOCKS, LENGTH, capture_store, prepare, save_teacher
from small_trainings import lines, train_small

if TYPE_CHECKING:
    from pathlib import Path

    from coldstill.data.store.reader import StoreReader
    from coldstill.stages.report import Report


def test_metrics_begin_with_the_first_step(store: StoreReader, tmp_path: Path) -> None:
    reports: list[Report] = []
    train_small(store, tmp_path, reports.append, steps=5, log_every=3, learning_rate=1e-3)
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == [1, 3]
    for line in lines:
        assert {
            "loss", "kl", "cross_entropy", "teacher_mass", "student_mass", "agreement", "accuracy",
            *CLOCKS, "learning_rate", "grad_norm", "epoch",
        } <= line.keys()  # fmt: skip
        expected = line["kl"] + 0.5 * line["cross_entropy"]
        assert line["loss"] == pytest.approx(expected, rel=1e-6)
        assert line["label_loss"] == pytest.approx(line["cross_entropy"], rel=1e-6)
        assert 0 < line["student_mass"] < line["teacher_mass"] < 1
        assert 0 <= line["accuracy"] <= 1
        assert line["tokens_per_second"] > 0
        assert 0 < line["data_wait"] < 1
    steps = [report for report in reports if report.total]
    assert [report.done for report in steps] == [4 * LENGTH * i for i in range(6)]
    assert {report.total for report in steps} == {5 * 4 * LENGTH}


def test_targets_without_a_head_have_no_head_metrics(tokenizer: Any, tmp_path: Path) -> None:
    corpus = prepare(tmp_path / "corpus", tokenizer)
    teacher = save_teacher(tmp_path / "teacher", tokenizer)
    store = capture_store(corpus, teacher, tmp_path / "logits", Capture(head=0, tail=12))
    train_small(store, tmp_path, steps=1)
    line = read_metrics(tmp_path)[0]
    assert not {"agreement", "teacher_mass", "student_mass"} & line.keys()
    assert {"kl", "accuracy"} <= line.keys()


def test_a_line_weighs_positions_and_not_steps(store: StoreReader, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"steps": 6, "learning_rate": 1e-2, "batch_tokens": LENGTH}
    train_small(store, tmp_path / "each", **settings)
    train_small(store, tmp_path / "three", **settings, log_every=3)
    order = store.order(11, 0)
    positions = np.array([len(store.read(order[i : i + 1]).targets) for i in range(6)])
    each = lines(tmp_path / "each")
    for line, steps in zip(lines(tmp_path / "three"), ([0], [1, 2], [3, 4, 5]), strict=True):
        weights = positions[steps] / positions[steps].sum()
        for name in ("loss", "kl", "label_loss", "accuracy", "student_entropy"):
            exact = sum(w * each[i][name] for w, i in zip(weights, steps, strict=True))
            assert line[name] == pytest.approx(exact, rel=1e-6), name
            if name == "loss" and len(steps) > 1:
                assert np.mean([each[i][name] for i in steps]) != pytest.approx(exact, rel=1e-5)


def test_time_spent_waiting_for_data_is_reported(
    store: StoreReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = StoreDataset.__getitems__

    def slow(dataset: StoreDataset, indices: list[int]) -> Any:
        time.sleep(0.2)
        return read(dataset, indices)

    train_small(store, tmp_path / "quick", steps=2)
    monkeypatch.setattr(StoreDataset, "__getitems__", slow)
    train_small(store, tmp_path / "slow", steps=2)
    assert read_metrics(tmp_path / "slow")[1]["data_wait"] > 0.75
    assert read_metrics(tmp_path / "quick")[1]["data_wait"] < 0.5
