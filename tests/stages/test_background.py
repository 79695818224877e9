"""No task is lost, no call hangs, and an error stops the run."""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from typing import TYPE_CHECKING

import pytest
from coldstill.stages.capture.shards import Background, ahead

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence


def do(background: Background, tasks: Sequence[Callable[[], object]]) -> None:
    """Submit all tasks and wait."""
    with background:
        for task in tasks:
            background.submit(task)


def append_after(done: list[int], number: int, seconds: float = 0.0) -> None:
    time.sleep(seconds)
    done.append(number)


@pytest.mark.parametrize("workers", [1, 3])
def test_all_tasks_are_done_when_the_context_is_left(workers: int) -> None:
    done: list[int] = []
    do(Background(workers), [functools.partial(append_after, done, i) for i in range(50)])
    assert sorted(done) == list(range(50))


@pytest.mark.parametrize("workers", [1, 3])
def test_a_failed_task_stops_the_run_with_its_error(workers: int) -> None:
    started: list[int] = []

    def task(i: int) -> None:
        started.append(i)
        if i == 3:
            raise ValueError("the disk is gone")

    tasks = [functools.partial(task, i) for i in range(1000)]
    with pytest.raises(ValueError, match="the disk is gone"):
        do(Background(workers), tasks)
    assert len(started) < 20


def test_an_error_in_the_last_task_or_with_a_full_queue_is_raised() -> None:
    gate = threading.Event()

    def task() -> None:
        gate.wait()
        raise OSError("late")

    for count in (1, 12):
        gate.clear()
        threading.Timer(0.05, gate.set).start()
        with pytest.raises(OSError, match="late"):
            do(Background(1, waiting=1), [task] * count)


def test_the_queue_is_bounded() -> None:
    gate, submitted = threading.Event(), []

    def fill() -> None:
        with Background(1, waiting=2) as background:
            for i in range(10):
                background.submit(gate.wait)
                submitted.append(i)

    filler = threading.Thread(target=fill)
    filler.start()
    time.sleep(0.2)
    assert len(submitted) == 3  # one running, two waiting
    gate.set()
    filler.join()
    assert len(submitted) == 10


def test_submitted_tasks_are_finished_after_an_interruption() -> None:
    done: list[int] = []

    def interrupted() -> None:
        with Background(1) as background:
            for i in range(3):
                background.submit(functools.partial(append_after, done, i, 0.05))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert done == [0, 1, 2]


def counting(made: list[int], count: int) -> Iterator[int]:
    for i in range(count):
        made.append(i)
        yield i


def test_items_are_made_ahead_and_come_in_order() -> None:
    made: list[int] = []
    taken = []
    for i in ahead(counting(made, 10), depth=2):
        taken.append(i)
        if i == 0:
            time.sleep(0.1)
            assert len(made) == 3  # two ahead
    assert taken == list(range(10))


def test_an_error_in_making_an_item_is_raised_after_the_items_before_it() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise OSError("unreadable")

    taken: list[int] = []
    with pytest.raises(OSError, match="unreadable"):
        taken.extend(ahead(items()))
    assert taken == [1]


def test_closing_early_stops_the_thread() -> None:
    made: list[int] = []
    with contextlib.closing(ahead(counting(made, 10**9), depth=1)) as items:
        assert next(items) == 0
    assert not [t for t in threading.enumerate() if t.name.startswith("coldstill ahead")]
    assert len(made) < 5
