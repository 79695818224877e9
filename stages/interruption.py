"""A machine that is about to be taken away says so with SIGTERM: stop cleanly, losing little."""

from __future__ import annotations

import contextlib
import signal
import threading
from typing import TYPE_CHECKING, Any

from ..data.errors import StoppedError

if TYPE_CHECKING:
    from collections.abc import Iterator


class Interruption:
    """Listens for SIGTERM while its context is entered.

    It is answered at once, by `StoppedError`, except inside `postponed`, where whoever works asks
    for `asked` at moments of its own choice.
    """

    def __init__(self) -> None:
        """Listen to nothing yet."""
        self.asked = False
        self._postponed = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Answer the signal. Outside the main thread no signal arrives, and nothing is changed."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, self._answer)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    @contextlib.contextmanager
    def postponed(self) -> Iterator[None]:
        """Only take note of the signal; leaving the context answers it."""
        self._postponed = True
        try:
            yield
        finally:
            self._postponed = False
        if self.asked:
            raise StoppedError

    def _answer(self, number: int, frame: Any) -> None:
        self.asked = True
        if not self._postponed:
            raise StoppedError
