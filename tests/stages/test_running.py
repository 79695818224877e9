"""Background work, interruptions and errors of libraries: nothing is lost, nothing hangs."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import signal
import threading
import time
from contextlib import nullcontext
from typing import TYPE_CHECKING

import pytest
from coldstill.data.errors import ColdstillError, StoppedError
from coldstill.stages.capture.shards import Background, ahead
from coldstill.stages.interruption import Interruption
from coldstill.stages.libraries import asking

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


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("postponed", [False, True])
def test_the_signal_stops_at_once_or_at_the_end_of_postponed_work(postponed: bool) -> None:
    interruption, seen = Interruption(), list[bool]()

    def work() -> None:
        with interruption.listening(), interruption.postponed() if postponed else nullcontext():
            terminate()
            seen.append(interruption.asked)

    with pytest.raises(StoppedError):
        work()
    assert interruption.asked
    assert seen == [True] * postponed
    assert not issubclass(StoppedError, Exception)


def test_an_error_of_the_work_is_reported_instead_of_the_stop() -> None:
    interruption = Interruption()

    def work() -> None:
        with interruption.listening(), interruption.postponed():
            terminate()
            raise ColdstillError("the disk is full")

    with pytest.raises(ColdstillError, match="the disk is full"):
        work()


def test_the_previous_handler_is_restored() -> None:
    received: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        with Interruption().listening():
            pass
        terminate()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert received == [signal.SIGTERM]


def test_another_thread_changes_no_handler() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen: list[object] = []

    def work() -> None:
        with Interruption().listening():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("bad head\nsecond line"), "bad head"),
        (KeyError("falcon"), "KeyError: 'falcon'"),
        (ImportError("install it"), "install it"),
        (AttributeError("  "), "AttributeError"),
        (TypeError("x" * 500), "x" * 196 + " ..."),
        (TypeError("some words, " * 50), "some words, " * 15 + "some words ..."),
        (TypeError("x" * 200 + "."), "x" * 200),
    ],
)
def test_any_exception_of_a_library_becomes_one_line(error: Exception, line: str) -> None:
    with (
        pytest.raises(ColdstillError) as caught,
        asking("peft", "wrap the model", where="students.a.lora", remedy="leave lora out"),
    ):
        raise error
    assert str(caught.value) == (
        f"students.a.lora: peft cannot wrap the model: {line}; leave lora out"
    )
    assert caught.value.__cause__ is error


@pytest.mark.parametrize(
    "error", [ColdstillError("a: b"), MemoryError(), OSError(errno.ENOSPC, "no space")]
)
def test_our_errors_memory_errors_and_a_full_disk_pass_through(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, asking("peft", "wrap", where="x"):
        raise error
    assert caught.value is error
