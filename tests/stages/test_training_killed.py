"""Training that is killed and goes on: bit for bit what it would have been."""

from __future__ import annotations

import os
import random
import signal
import time
from typing import TYPE_CHECKING, Any

import pytest
import torch
from coldstill.data.errors import ColdstillError
from coldstill.stages.training.checkpoints import last_whole_checkpoint
from coldstill.stages.training.metrics import read_metrics
from small_runs import LENGTH
from small_trainings import lines
from training_child import Task, finish, run, start

if TYPE_CHECKING:
    from pathlib import Path

    from coldstill.data.store.reader import StoreReader


def expect_bit_for_bit(ours: Task, theirs: Task) -> None:
    """Of two trainings, the first one still to be ended."""
    found, expected = run(ours), run(theirs)
    assert lines(ours.folder) == lines(theirs.folder)
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name


@pytest.mark.parametrize(("workers", "family"), [(0, "llama"), (2, "gpt2")])
def test_killed_at_any_moment_it_goes_on_bit_for_bit(
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


@pytest.mark.parametrize("log_every", [1, 7])
def test_asked_to_stop_it_saves_and_goes_on_bit_for_bit(
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
    assert (task.folder / "said-0").read_text() == "stopped"
    checkpoint = last_whole_checkpoint(task.folder / "checkpoints")
    assert checkpoint is not None
    step = int(checkpoint.name.rpartition("-")[2])
    assert 1 < step < 20
    assert {line["step"] for line in read_metrics(task.folder)} == {
        1, *range(log_every, step + 1, log_every)
    }  # fmt: skip
    straight = Task(store=task.store, folder=tmp_path / "straight", settings=settings)
    expect_bit_for_bit(task, straight)


def test_incomplete_checkpoints_never_replace_complete_ones(
    store: StoreReader, tmp_path: Path
) -> None:
    task = Task(
        store=str(store.place), folder=tmp_path, settings={"steps": 2, "checkpoint_every": 2}
    )
    run(task)
    checkpoints = tmp_path / "checkpoints"
    for step in (7, 8, 9):
        (checkpoints / f"checkpoint-{step}").mkdir()
    run(Task(store=task.store, folder=tmp_path, settings={"steps": 4, "checkpoint_every": 2}))
    names = {path.name for path in checkpoints.iterdir()}
    assert names == {"checkpoint-2", "checkpoint-4"}


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


def test_a_training_that_had_only_to_be_saved_is_not_trained_on(
    store: StoreReader, tmp_path: Path
) -> None:
    task = Task(store=str(store.place), folder=tmp_path, settings={"steps": 3})
    ended = run(task)
    metrics = (tmp_path / "metrics.jsonl").read_bytes()
    again = run(task)
    assert (tmp_path / "metrics.jsonl").read_bytes() == metrics
    for name, weight in ended.items():
        assert torch.equal(again[name], weight), name


def test_a_step_may_be_longer_than_an_epoch(store: StoreReader, tmp_path: Path) -> None:
    settings = {"steps": 2, "batch_tokens": 2 * len(store) * LENGTH}
    run(Task(store=str(store.place), folder=tmp_path, settings=settings))
    assert [line["epoch"] for line in read_metrics(tmp_path)] == [2.0, 4.0]
