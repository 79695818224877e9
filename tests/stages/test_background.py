"""No task is lost, no call hangs, and an error stops the run."""

from __future__ import annotations

import functools
import threading
import time
from typing import TYPE_CHECKING

import pytest
from coldstill.stages.capture.background import Ahead, Background

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence


def do(background: Background, tasks: Sequence[Callable[[], object]]) -> None:
    """Submit all tasks and wait."""
    with background:
        for task in tasks:
            background.submit(task)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_all_tasks_are_done_when_the_context_is_left(workers: int) -> None:
    done: list[int] = []
    do(Background(workers), [functools.partial(done.append, i) for i in range(50)])
    assert sorted(done) == list(range(50))


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_a_failed_task_stops_the_run_with_its_error(workers: int) -> None:
    begun: list[int] = []

    def task(i: int) -> None:
        begun.append(i)
        if i == 3:
            raise ValueError("the disk is gone")

    tasks = [functools.partial(task, i) for i in range(1000)]
    with pytest.raises(ValueError, match="the disk is gone"):
        do(Background(workers), tasks)
    assert len(begun) < 1000  # the rest was skipped


def test_an_error_in_the_last_task_is_not_lost() -> None:
    def task() -> None:
        time.sleep(0.05)
        raise OSError("late")

    with pytest.raises(OSError, match="late"):
        do(Background(1), [task])


def test_an_error_while_the_queue_is_full_does_not_hang() -> None:
    gate = threading.Event()

    def task() -> None:
        gate.wait()
        raise ValueError("it")

    threading.Timer(0.05, gate.set).start()
    with pytest.raises(ValueError, match="it"):
        do(Background(1, waiting=1), [task] * 12)


def test_the_queue_is_bounded() -> None:
    gate, began = threading.Event(), threading.Event()
    submitted = 0

    def fill() -> None:
        nonlocal submitted
        with Background(1, waiting=2) as background:
            for _ in range(10):
                background.submit(gate.wait)
                submitted += 1
                began.set()

    filler = threading.Thread(target=fill)
    filler.start()
    began.wait()
    time.sleep(0.2)
    assert submitted == 3  # one running, two waiting
    gate.set()
    filler.join()
    assert submitted == 10


def test_submitted_tasks_are_finished_after_an_interruption() -> None:
    done: list[int] = []

    def task(i: int) -> None:
        time.sleep(0.05)
        done.append(i)

    def interrupt() -> None:
        with Background(1) as background:
            for i in range(3):
                background.submit(functools.partial(task, i))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupt()
    assert done == [0, 1, 2]


def test_items_are_made_ahead_and_come_in_order() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for i in range(10):
            made.append(i)
            yield i

    taken = []
    with Ahead(items(), depth=2) as ahead:
        for i in ahead:
            taken.append(i)
            if i == 0:
                time.sleep(0.1)
                assert 2 <= len(made) <= 4  # some ahead, not all
    assert taken == list(range(10))


def test_an_error_in_making_an_item_is_raised() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise OSError("unreadable")

    taken: list[int] = []
    with pytest.raises(OSError, match="unreadable"), Ahead(items()) as ahead:
        taken.extend(ahead)
    assert taken == [1]
    with Ahead(items()) as ahead:
        assert next(iter(ahead)) == 1


def test_leaving_early_ends_the_thread() -> None:
    def items() -> Iterator[int]:
        i = 0
        while True:
            yield (i := i + 1)

    with Ahead(items(), depth=1) as ahead:
        assert next(iter(ahead)) == 1
    assert not ahead._thread.is_alive()
