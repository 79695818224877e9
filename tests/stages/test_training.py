"""The training loop: normalisation, order, checkpoints, metrics and progress."""

from __future__ import annotations

import re
import shutil
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from coldstill.data.errors import ColdstillError, DamageError
from coldstill.data.schema import Capture
from coldstill.stages.models.output_head import connect_head
from coldstill.stages.report import silent
from coldstill.stages.training.checkpoints import last_whole_checkpoint
from coldstill.stages.training.feed import StoreDataset
from coldstill.stages.training.loop import StoreTrainer, train
from conftest import VOCABULARY, make_model
from safetensors.torch import load_file, save_file
from small_runs import CLOCKS, LENGTH, SmallCorpus, capture_store
from small_students import KilledError, killed_at
from small_trainings import lines, read_metrics, small_job, spoiled, train_small

if TYPE_CHECKING:
    from pathlib import Path

    from coldstill.data.store.reader import StoreReader
    from coldstill.stages.report import Report


@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_micro_batches_change_memory_and_not_results(
    clip: float, store: StoreReader, tmp_path: Path
) -> None:
    """Sequences differ in supervised positions, so a mean of means would give something else."""
    assert len(set(store.read(torch.arange(len(store)).numpy()).sequences.positions.lengths)) > 5
    results = {}
    for micro in (8, 4, 2, 1):
        results[micro] = train_small(
            store,
            tmp_path / str(micro),
            steps=4,  # the third begins in one epoch and ends in the next
            batch_tokens=8 * LENGTH,
            micro_batch_tokens=micro * LENGTH,
            learning_rate=1.0,
            gradient_clip=clip,
            schedule="constant",
            trainer={"optim": "sgd"},
        )
    assert len(store) % 8
    assert len(store) < 4 * 8
    for micro in (4, 2, 1):
        for name, weight in results[8].items():
            error = float((results[micro][name] - weight).norm() / weight.norm())
            assert error < 1e-5, (micro, name)
        for ours, theirs in zip(lines(tmp_path / str(micro)), lines(tmp_path / "8"), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_killed_run_resumes_as_if_uninterrupted(
    family: str, store: StoreReader, tmp_path: Path
) -> None:
    """Killed in the first epoch and again in the second; gpt2 has dropout on top."""
    settings: dict[str, Any] = {"steps": 14, "checkpoint_every": 5, "family": family}
    assert 5 < len(store) / 4 < 7
    straight = train_small(store, tmp_path / "straight", **settings)
    with pytest.raises(KilledError):
        train_small(store, tmp_path / "killed", killed_at(7, "train-student test"), **settings)
    assert [line["step"] for line in read_metrics(tmp_path / "killed")] == [1, 2, 3, 4, 5, 6]
    notes: list[str] = []
    with pytest.raises(KilledError):
        train_small(store, tmp_path / "killed", killed_at(13, "train-student test"), **settings)
    again = train_small(
        store, tmp_path / "killed", lambda report: notes.append(report.note), **settings
    )
    assert notes[0] == "resuming from step 10"
    assert lines(tmp_path / "killed") == lines(tmp_path / "straight")
    assert len(lines(tmp_path / "killed")) == 14
    for name, weight in straight.items():
        assert torch.equal(weight, again[name]), name


def test_a_checkpoint_that_was_cut_short_is_ignored(store: StoreReader, tmp_path: Path) -> None:
    train_small(store, tmp_path, steps=4, checkpoint_every=2)
    checkpoints = tmp_path / "checkpoints"
    assert last_whole_checkpoint(checkpoints) == checkpoints / "checkpoint-4"
    shutil.copytree(checkpoints / "checkpoint-4", checkpoints / "checkpoint-10")
    (checkpoints / "checkpoint-10" / "whole.json").unlink()
    (checkpoints / "checkpoint-10" / "model.safetensors").write_bytes(b"")
    assert last_whole_checkpoint(checkpoints) == checkpoints / "checkpoint-4"
    (checkpoints / "checkpoint-4" / "whole.json").unlink()
    assert last_whole_checkpoint(checkpoints) == checkpoints / "checkpoint-2"
    notes: list[str] = []
    train_small(
        store, tmp_path, lambda report: notes.append(report.note), steps=4, checkpoint_every=2
    )
    assert notes[0] == "resuming from step 2"
    assert {path.name for path in checkpoints.iterdir()} == {"checkpoint-2", "checkpoint-4"}


def test_a_checkpoint_with_other_tensors_is_not_resumed_from(
    store: StoreReader, tmp_path: Path
) -> None:
    train_small(store, tmp_path, steps=2, checkpoint_every=2)
    path = tmp_path / "checkpoints" / "checkpoint-2" / "model.safetensors"
    state = load_file(path)
    save_file({f"_orig_mod.{key}": tensor for key, tensor in state.items()}, path)
    with pytest.raises(ColdstillError, match=r"its last checkpoint lacks \d+ tensors \(") as error:
        train_small(store, tmp_path, steps=4, checkpoint_every=2)
    assert "\n" not in str(error.value)


def test_a_nan_loss_ends_the_run_in_one_line(
    store: StoreReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It names the sequences at fault, and keeps the last checkpoint and the lines before it."""
    order = store.order(11, 0)
    bad = int(order[4 * 4 + 1])  # in the first half of the fifth step
    monkeypatch.setattr(StoreDataset, "__getitems__", spoiled(poison=bad))
    settings: dict[str, Any] = {"steps": 8, "checkpoint_every": 2, "micro_batch_tokens": 2 * LENGTH}
    for _ in range(2):  # and again after resuming
        with pytest.raises(ColdstillError) as error:
            train_small(store, tmp_path, **settings)
        ids = store.read(order[4 * 4 : 4 * 4 + 2]).sequences.ids.tolist()
        kept = tmp_path / "checkpoints" / "checkpoint-4"
        assert str(error.value) == (
            "train-student test: step 5: the loss is nan, in a batch with the sequences "
            f"{ids[0]}, {ids[1]}; the step was not applied, {kept} is kept; train under a new name "
            "with a lower learning_rate, or check these sequences for errors"
        )
        assert last_whole_checkpoint(tmp_path / "checkpoints") == kept
        assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4]


def test_a_step_with_an_infinite_or_nan_gradient_is_not_taken(
    store: StoreReader, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"learning_rate": 1e30, "gradient_clip": 0.0, "warmup": 0.0}
    with pytest.raises(ColdstillError) as error:
        train_small(store, tmp_path, steps=5, **settings, trainer={"optim": "sgd"})
    message = (
        r"train-student test: step 2: the (loss|norm of the gradient) is (nan|inf), in a batch "
        r"with the sequences (\d+, ){3}\d+; the step was not applied, "
        r"no checkpoint was written yet; .*"
    )
    assert re.fullmatch(message, str(error.value))
    assert [line["step"] for line in read_metrics(tmp_path)] == [1]


@pytest.mark.parametrize("workers", [0, 2])
def test_every_sequence_is_seen_once_per_epoch_in_shuffled_order(
    workers: int, store: StoreReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    learn = StoreTrainer.compute_loss

    def watched(trainer: StoreTrainer, model: Any, inputs: Any, **options: Any) -> Any:
        seen.extend(inputs.sequence_ids)
        return learn(trainer, model, inputs, **options)

    monkeypatch.setattr(StoreTrainer, "compute_loss", watched)
    loader = {"dataloader_num_workers": workers}
    train_small(store, tmp_path / "a", steps=12, micro_batch_tokens=2 * LENGTH, trainer=loader)
    assert len(store) % 4
    assert seen == [*store.order(11, 0), *store.order(11, 1), *store.order(11, 2)][: 12 * 4]
    epochs = [seen[: len(store)], seen[len(store) : 2 * len(store)]]
    for epoch in epochs:
        assert sorted(epoch) == list(range(len(store)))
        assert epoch != sorted(epoch)
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_mask_gives_the_training_without_it_also_in_layers_with_a_window(
    checkpointing: bool, store: StoreReader, tmp_path: Path
) -> None:
    found = []
    for isolation in ("positions", "mask"):
        model = make_model("gemma3_text", VOCABULARY, sliding_window=6,
                           layer_types=["sliding_attention", "full_attention"])  # fmt: skip
        job = small_job(store, tmp_path / isolation, steps=2, learning_rate=1e-3,
                        gradient_checkpointing=checkpointing,
                        trainer={"dataloader_num_workers": 1})  # fmt: skip
        head = connect_head(model, VOCABULARY)
        train(replace(job, head=head, isolation=isolation), silent)
        found.append([line[name] for line in lines(job.folder) for name in ("kl", "grad_norm")])
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def test_an_error_in_a_reading_process_is_one_line_too(
    store: StoreReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(dataset: StoreDataset, indices: list[int]) -> Any:
        raise DamageError("shards/00001.arrow: damaged: run coldstill store repair")

    monkeypatch.setattr(StoreDataset, "__getitems__", damaged)
    with pytest.raises(DamageError) as error:
        train_small(store, tmp_path, steps=1, trainer={"dataloader_num_workers": 1})
    assert str(error.value) == "shards/00001.arrow: damaged: run coldstill store repair"


@pytest.mark.slow
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


@pytest.mark.slow
def test_targets_without_a_head_have_no_head_metrics(
    corpus: SmallCorpus, saved_teacher: Path, tmp_path: Path
) -> None:
    store = capture_store(corpus, saved_teacher, tmp_path / "logits", Capture(head=0, tail=12))
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
