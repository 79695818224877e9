"""SIGTERM stops a stage at once or at the end of postponed work; it is never lost."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import nullcontext

import pytest
from coldstill.data.errors import ColdstillError, StoppedError
from coldstill.stages.interruption import Interruption


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
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        with Interruption().listening():
            pass
        terminate()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [signal.SIGTERM]


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
