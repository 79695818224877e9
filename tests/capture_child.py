"""Captures in child processes that tests start, kill and wait for."""

from __future__ import annotations

import gc
import multiprocessing
import os
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers.models.llama.modeling_llama  # loaded once, not by each child
import transformers.models.llama.tokenization_llama  # noqa: F401  # likewise
from coldstill.stages.teacher_logits import capture_split
from small_runs import SmallCorpus, load_teacher, plan_capture

if TYPE_CHECKING:
    from collections.abc import Iterator

    from coldstill.data.schema import Capture
    from coldstill.stages.report import Report

PROCESSES: Any = multiprocessing.get_context("forkserver")
"""Each child is a copy of a process that has imported everything and done nothing yet."""
PROCESSES.set_forkserver_preload(["capture_child"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What a child captures."""

    corpus: SmallCorpus
    teacher: Path
    folder: Path
    capture: Capture
    changes: dict[str, Any] = field(default_factory=dict)
    """Changes of the capture plan."""
    pause: float = 0.0
    """Seconds to sleep after each batch, so that other processes get work."""


def run(task: Task, rank: int, world: int, ready: Any = None) -> None:
    """Capture what is missing, in the child, as one of `world` processes."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    gc.freeze()  # what was imported is no garbage; looking through it would take most of the time
    teacher = load_teacher(task.teacher)
    plan = plan_capture(task.corpus, task.teacher, task.folder, task.capture, **task.changes)

    def report(report: Report) -> None:
        if report.done:
            time.sleep(task.pause)

    if ready is not None:
        ready.wait(60)
    capture_split(plan, teacher, report)


def start(task: Task, rank: int = 0, world: int = 1, ready: Any = None) -> Any:
    """Start a child that captures."""
    child = PROCESSES.Process(target=run, args=(task, rank, world, ready), daemon=True)
    with found_by_the_server():
        child.start()
    return child


@contextmanager
def found_by_the_server() -> Iterator[None]:
    # the first child starts the server, which finds the modules of the tests in this variable only
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(Path(__file__).parent), before)))
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def finish(child: Any, seconds: float = 120.0) -> None:
    """Wait for a child and expect it to succeed."""
    child.join(seconds)
    assert child.exitcode == 0
