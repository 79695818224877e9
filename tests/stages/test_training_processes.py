"""Training that is killed, stopped, resumed or shared gives the steps of one process."""

from __future__ import annotations

import os
import random
import signal
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from coldstill.data.errors import ColdstillError
from coldstill.stages.training.checkpoints import last_whole_checkpoint
from small_runs import LENGTH
from small_trainings import lines, read_metrics
from training_child import Task, finish, run, start, weights

if TYPE_CHECKING:
    from pathlib import Path

    from coldstill.data.store.reader import StoreReader
    from small_trainings import Weights


def expect_bit_for_bit(ours: Task, theirs: Task) -> None:
    """Of two trainings, the first one still to be ended."""
    found, expected = run(ours), run(theirs)
    assert lines(ours.folder) == lines(theirs.folder)
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "family"), [(0, "llama"), (2, "gpt2")])
def test_a_training_killed_at_any_moment_resumes_bit_for_bit(
    workers: int, family: str, store: StoreReader, tmp_path: Path
) -> None:
    """Most of the time goes into checkpoints, so some are cut short; gpt2 draws its dropout."""
    steps = 26
    assert steps * 4 > 4 * len(store)  # into a fifth epoch
    settings: dict[str, Any] = {"steps": steps, "checkpoint_every": 2, "log_every": 3}
    settings["trainer"] = {"dataloader_num_workers": workers}
    killed = Task(
        store=str(store.place),
        folder=tmp_path / "killed",
        settings=settings,
        family=family,
        pause=0.02,
    )
    moments, found = random.Random(5), set()
    # the system waits for reading processes, which look for their parent every five seconds
    kills = 2 if workers else 5
    for _ in range(kills):
        before = last_whole_checkpoint(killed.folder / "checkpoints")
        (child,) = start(killed)
        while last_whole_checkpoint(killed.folder / "checkpoints") == before:
            assert child.is_alive()
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.05))
        os.kill(child.pid, signal.SIGKILL)
        child.join(60)
        assert child.exitcode == -signal.SIGKILL
        found.add(last_whole_checkpoint(killed.folder / "checkpoints"))
    assert len(found) == kills
    straight = Task(
        store=killed.store,
        folder=tmp_path / "straight",
        settings=settings | {"trainer": {}},
        family=family,
    )
    expect_bit_for_bit(killed, straight)


@pytest.mark.slow
@pytest.mark.parametrize("log_every", [1, 7])
def test_a_training_stopped_by_a_signal_saves_and_resumes_bit_for_bit(
    log_every: int, store: StoreReader, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"steps": 20, "log_every": log_every}
    task = Task(store=str(store.place), folder=tmp_path / "stopped", settings=settings, pause=0.05)
    (child,) = start(task)
    metrics = task.folder / "metrics.jsonl"
    while not metrics.exists():
        assert child.is_alive()
        time.sleep(0.005)
    time.sleep(0.1)
    os.kill(child.pid, signal.SIGTERM)
    finish([child])
    assert (task.folder / "error-0").read_text() == "stopped"
    checkpoint = last_whole_checkpoint(task.folder / "checkpoints")
    assert checkpoint is not None
    step = int(checkpoint.name.rpartition("-")[2])
    assert 1 < step < 20
    assert {line["step"] for line in read_metrics(task.folder)} == {
        1, *range(log_every, step + 1, log_every)
    }  # fmt: skip
    straight = Task(store=task.store, folder=tmp_path / "straight", settings=settings)
    expect_bit_for_bit(task, straight)


@pytest.mark.slow
def test_a_checkpoint_without_its_position_is_refused(store: StoreReader, tmp_path: Path) -> None:
    task = Task(store=str(store.place), folder=tmp_path, settings={"steps": 1})
    run(task)
    whole = tmp_path / "checkpoints" / "checkpoint-1" / "whole.json"
    whole.write_text('{"step": 1}')
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ColdstillError) as error:
        run(task)
    assert str(error.value) == (
        f"{whole}: {{'step': 1}} does not hold the position in the order of sequences; "
        "delete the checkpoint to resume from an earlier one"
    )
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
def test_a_finished_training_called_again_takes_no_steps(
    store: StoreReader, tmp_path: Path
) -> None:
    task = Task(store=str(store.place), folder=tmp_path, settings={"steps": 3})
    ended = run(task)
    metrics = (tmp_path / "metrics.jsonl").read_bytes()
    again = run(task)
    assert (tmp_path / "metrics.jsonl").read_bytes() == metrics
    for name, weight in ended.items():
        assert torch.equal(again[name], weight), name


@pytest.mark.slow
def test_a_step_may_be_longer_than_an_epoch(store: StoreReader, tmp_path: Path) -> None:
    settings = {"steps": 2, "batch_tokens": 2 * len(store) * LENGTH}
    run(Task(store=str(store.place), folder=tmp_path, settings=settings))
    assert [line["epoch"] for line in read_metrics(tmp_path)] == [2.0, 4.0]


SGD: dict[str, Any] = {"optim": "sgd"}
"""Steps in proportion to the gradient, which AdamW would hide."""
FSDP: dict[str, Any] = {"fsdp": "full_shard"}


@pytest.fixture
def task(store: StoreReader, tmp_path: Path) -> Any:
    def make(name: str, **changes: Any) -> Task:
        settings = {
            "steps": 5, "batch_tokens": 8 * LENGTH, "learning_rate": 1.0, "schedule": "constant",
            "gradient_clip": 0.05, "trainer": SGD,
        } | changes.pop("settings", {})  # fmt: skip
        return Task(store=str(store.place), folder=tmp_path / name, settings=settings, **changes)

    return make


def expect_same(ours: Weights, theirs: Weights, tolerance: float = 1e-5) -> None:
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        error = float((ours[name] - weight).norm() / weight.norm())
        assert error < tolerance, name


def expect_same_lines(ours: Path, theirs: Path, tolerance: float = 1e-5) -> None:
    for one, other in zip(lines(ours), lines(theirs), strict=True):
        assert one == pytest.approx(other, rel=tolerance, abs=1e-9)


def test_halves_of_a_step_have_different_numbers_of_positions(store: StoreReader) -> None:
    """Halves of a step differ so much in positions that a mean of means would be seen."""
    order = store.order(11, 0)
    lengths = store.read(np.arange(len(store))).sequences.positions.lengths
    halves = lengths[order[:16]].reshape(4, 4).sum(1).reshape(2, 2)
    assert (halves.max(1) > 1.1 * halves.min(1)).all()
    assert len(store) % 8
    assert len(store) < 4 * 8  # five steps reach into the second epoch


@pytest.mark.slow
@pytest.mark.parametrize("micro", [4, 1])
def test_two_processes_take_the_steps_of_one(task: Any, micro: int) -> None:
    together = task("together", settings={"micro_batch_tokens": micro * LENGTH})
    children = start(together, 2)
    alone = task("alone")
    expected = run(alone)
    finish(children)
    for rank in range(2):
        expect_same(weights(together.folder, rank), expected)
    expect_same_lines(together.folder, alone.folder)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_sharded_weights_take_the_steps_of_whole_ones(task: Any, tied: bool) -> None:
    settings: dict[str, Any] = {"trainer": SGD | FSDP, "micro_batch_tokens": 2 * LENGTH}
    sharded = task("sharded", settings=settings, tied=tied, shards=True)
    children = start(sharded, 2)
    alone = task("alone", tied=tied)
    expected = run(alone)
    finish(children)
    for rank in range(2):
        expect_same(weights(sharded.folder, rank), expected)
    expect_same_lines(sharded.folder, alone.folder)


@pytest.mark.slow
@pytest.mark.parametrize("trainer", [SGD, SGD | FSDP], ids=["whole", "sharded"])
def test_two_processes_round_weights_as_one_does(task: Any, trainer: dict[str, Any]) -> None:
    """A difference in the last digit can round a weight to another level, which is a larger one."""
    pytest.importorskip("torchao")
    settings: dict[str, Any] = {"trainer": trainer, "micro_batch_tokens": 2 * LENGTH}
    shards = trainer is not SGD
    together = task("together", settings=settings, few_bits=True, shards=shards)
    children = start(together, 2)
    alone, exact = task("alone", few_bits=True), task("exact")
    expected = run(alone)
    finish(children)
    for rank in range(2):
        expect_same(weights(together.folder, rank), expected, 1e-4)
    expect_same_lines(together.folder, alone.folder, 1e-4)
    run(exact)
    with pytest.raises(AssertionError):
        expect_same_lines(exact.folder, alone.folder, 1e-4)


@pytest.mark.slow
def test_half_precision_leaves_targets_as_they_are_in_sharded_weights_too(task: Any) -> None:
    settings: dict[str, Any] = {"precision": "bf16", "learning_rate": 0.1, "steps": 2}
    sharded = task("sharded", settings=settings | {"trainer": SGD | FSDP}, shards=True)
    children = start(sharded, 2)
    alone = task("alone", settings=settings)
    run(alone)
    finish(children)
    for one, other in zip(lines(sharded.folder), lines(alone.folder), strict=True):
        # the teacher's targets are not rounded
        for name in ("teacher_entropy", "teacher_mass"):
            assert one[name] == pytest.approx(other[name], rel=1e-6), name
        assert one["loss"] == pytest.approx(other["loss"], rel=2e-2)


@pytest.mark.slow
@pytest.mark.parametrize("trainer", [{}, FSDP], ids=["whole", "sharded"])
def test_all_processes_stop_and_resume_if_one_gets_the_signal(
    task: Any, trainer: dict[str, Any]
) -> None:
    """In the middle of a line of metrics, whose sums the checkpoint keeps."""
    settings: dict[str, Any] = {"steps": 24, "log_every": 7, "learning_rate": 1e-2}
    settings |= {"trainer": trainer, "batch_tokens": 4 * LENGTH}
    shards = bool(trainer)
    stopped = task("stopped", settings=settings, pause=0.1, shards=shards)
    children = start(stopped, 2)
    metrics = stopped.folder / "metrics.jsonl"
    while not metrics.exists():
        assert all(child.is_alive() for child in children)
        time.sleep(0.01)
    os.kill(children[1].pid, signal.SIGTERM)
    finish(children)
    assert (stopped.folder / "error-0").read_text() == "stopped"
    assert (stopped.folder / "error-1").read_text() == "stopped"
    checkpoint = last_whole_checkpoint(stopped.folder / "checkpoints")
    assert checkpoint is not None
    step = int(checkpoint.name.rpartition("-")[2])
    assert 1 <= step < 24
    children = start(task("stopped", settings=settings, shards=shards), 2)
    straight = task("straight", settings=settings | {"trainer": {}})
    expected = run(straight)
    finish(children)
    expect_same(weights(stopped.folder), expected, 1e-4)
    expect_same_lines(stopped.folder, straight.folder, 1e-4)


@pytest.mark.slow
def test_one_process_resumes_what_two_have_started(task: Any) -> None:
    settings: dict[str, Any] = {"checkpoint_every": 3}
    finish(start(task("first", settings=settings | {"steps": 3}), 2))
    went_on, straight = task("first", settings=settings), task("straight")
    ours, theirs = run(went_on), run(straight)
    expect_same(ours, theirs)
    expect_same_lines(went_on.folder, straight.folder)


@pytest.mark.slow
def test_an_error_in_one_process_ends_all_in_one_line(task: Any, store: StoreReader) -> None:
    order = store.order(11, 0)
    second = order[8 + 4 : 8 + 8]  # of the second step, what the second process takes
    poisoned = task("poisoned", poison=int(second[2]))
    finish(start(poisoned, 2))
    ids = store.read(second).sequences.ids.tolist()
    message = (poisoned.folder / "error-0").read_text()
    assert message.startswith(
        "train-student test: step 2: the loss is nan, in a batch with the sequences "
        f"{ids[0]}, {ids[1]}, {ids[2]}, {ids[3]}; the step was not applied, no checkpoint "
    )
    assert (poisoned.folder / "error-1").read_text() == "stopped"
    assert [line["step"] for line in read_metrics(poisoned.folder)] == [1]


@pytest.mark.slow
def test_all_processes_end_if_one_ends(task: Any, store: StoreReader) -> None:
    damaged = task("damaged", damaged=int(store.order(11, 0)[8 + 4]))
    finish(start(damaged, 2))
    assert (damaged.folder / "error-1").read_text() == "a damaged shard"
    assert (damaged.folder / "error-0").read_text() == (
        "train-student test: another of the 2 processes has ended, and this one cannot "
        "continue without it; see the error of that process, then run the command again"
    )
    assert [line["step"] for line in read_metrics(damaged.folder)] == [1]
