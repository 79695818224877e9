"""SIGTERM is answered at once, or at a moment of the worker's choice; never lost."""

from __future__ import annotations

import os
import signal
import threading

import pytest
from coldstill.data.errors import ColdstillError, StoppedError
from coldstill.stages.interruption import Interruption


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_it_is_answered_at_once() -> None:
    interruption, worked = Interruption(), []

    def work() -> None:
        with interruption.listening():
            terminate()
            worked.append("on")

    with pytest.raises(StoppedError):
        work()
    assert interruption.asked
    assert worked == []


def test_postponed_it_waits_for_the_end_of_the_work() -> None:
    interruption, worked = Interruption(), []

    def work() -> None:
        with interruption.listening(), interruption.postponed():
            worked.append(interruption.asked)
            terminate()
            worked.append(interruption.asked)

    with pytest.raises(StoppedError):
        work()
    assert worked == [False, True]


def test_an_error_of_the_work_is_told_rather_than_the_stop() -> None:
    interruption = Interruption()

    def work() -> None:
        with interruption.listening(), interruption.postponed():
            terminate()
            raise ColdstillError("the disk is full")

    with pytest.raises(ColdstillError, match="the disk is full"):
        work()


def test_what_was_listening_before_listens_again() -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        with Interruption().listening():
            pass
        terminate()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [signal.SIGTERM]


def test_it_is_no_ordinary_error() -> None:
    assert not issubclass(StoppedError, Exception)


def test_in_another_thread_nothing_is_changed() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen: list[object] = []

    def work() -> None:
        with Interruption().listening():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]
