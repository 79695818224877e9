"""Training in one or several child processes that tests start, kill and wait for.

One alone may be run in the tests' own process too; what is compared is then the number of processes
and nothing else.
"""

from __future__ import annotations

import gc
import os
import socket
import time
from dataclasses import dataclass, field, replace
from pathlib import Path  # noqa: TC003  # a child reads the fields' types
from typing import TYPE_CHECKING, Any

import capture_child
import torch
import transformers.models.gpt2.modeling_gpt2  # loaded once, not by each child
import transformers.models.llama.modeling_llama
import transformers.models.llama.tokenization_llama  # noqa: F401  # likewise
from coldstill.data.errors import ColdstillError, StoppedError
from coldstill.data.store.reader import open_store
from coldstill.stages.config import QuantizeConfig
from coldstill.stages.training.feed import StoreDataset
from coldstill.stages.training.loop import train
from small_trainings import Weights, small_job, spoiled, weights_of

if TYPE_CHECKING:
    from coldstill.stages.report import Report

capture_child.PROCESSES.set_forkserver_preload(["training_child", "capture_child"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What is trained."""

    store: str
    """The folder of the store."""
    folder: Path
    family: str = "llama"
    tied: bool = True
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings of `TrainConfig`."""
    pause: float = 0.0
    """Seconds to sleep after each step, so that a signal arrives during training."""
    poison: int | None = None
    """A sequence whose targets are NaN."""
    damaged: int | None = None
    """A sequence that cannot be read."""
    shards: bool = False
    """Whether the weights are sharded over the processes."""
    few_bits: bool = False
    """Whether layers round their weights to 8 bits."""


def run(task: Task) -> Weights:
    """Train as one of the processes that the environment names; returns the weights."""
    if task.poison is not None or task.damaged is not None:
        read = spoiled(task.poison, task.damaged)
        StoreDataset.__getitems__ = read  # type: ignore[method-assign]  # only in this process
    store = open_store(task.store)
    job = small_job(store, task.folder, family=task.family, tied=task.tied, **task.settings)
    model = job.head.model
    if task.few_bits:
        from coldstill.stages.students.few_bits import round_layers

        config = QuantizeConfig(scheme="int8")
        rounding = round_layers(model, config, job.config.steps, "students.test")
        job = replace(job, callbacks=(rounding,))
    own_class, own_hooks = type(model), _hooks(model)

    def report(report: Report) -> None:
        if report.total:
            time.sleep(task.pause)
            # asked for is not granted: accelerate may keep quiet about it
            assert all(
                hasattr(weight, "full_tensor") is task.shards for weight in model.parameters()
            )

    train(job, report)
    assert type(model) is own_class
    assert "forward" not in vars(model)
    assert not model.training
    assert _hooks(model) == own_hooks
    with torch.no_grad():
        assert model(torch.zeros(1, 4, dtype=torch.long)).logits.isfinite().all()
    return weights_of(job)


def _hooks(model: Any) -> list[int]:
    return [
        len(hooks)
        for module in model.modules()
        for name, hooks in vars(module).items()
        if "_hooks" in name and hasattr(hooks, "values")
    ]


def _in_child(task: Task, rank: int, world: int, port: int) -> None:
    together = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "MASTER_PORT": port}
    if world > 1:
        os.environ |= {name: str(value) for name, value in together.items()}
        os.environ["MASTER_ADDR"] = "127.0.0.1"
    torch.set_num_threads(1)
    gc.freeze()  # what was imported is no garbage; looking through it would take most of the time
    task.folder.mkdir(parents=True, exist_ok=True)
    error_file = task.folder / f"error-{rank}"
    try:
        torch.save(run(task), task.folder / f"weights-{rank}.pt")
    except ColdstillError as error:
        error_file.write_text(str(error), encoding="utf-8")
    except StoppedError:
        error_file.write_text("stopped", encoding="utf-8")


def start(task: Task, world: int = 1) -> list[Any]:
    """Start children that train together."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(world):
        child = capture_child.PROCESSES.Process(
            target=_in_child, args=(task, rank, world, port), daemon=False
        )
        with capture_child.found_by_the_server():
            child.start()
        children.append(child)
    return children


def finish(children: list[Any], seconds: float = 120.0) -> None:
    """Wait for children and expect them to succeed."""
    for child in children:
        child.join(seconds)
    assert [child.exitcode for child in children] == [0] * len(children)


def weights(folder: Path, rank: int = 0) -> Weights:
    """The final weights of a child's model."""
    found: Weights = torch.load(folder / f"weights-{rank}.pt", weights_only=True)
    return found
