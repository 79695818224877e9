"""Stops a stage cleanly on SIGTERM, which a machine sends before it shuts down."""

from __future__ import annotations

import contextlib
import signal
import threading
from typing import TYPE_CHECKING, Any

from ..data.errors import StoppedError

if TYPE_CHECKING:
    from collections.abc import Iterator


class Interruption:
    """Handles SIGTERM inside `listening`.

    The signal raises `StoppedError` at once. Inside `postponed` it only sets `asked`, which the
    stage checks when it can stop.
    """

    def __init__(self) -> None:
        self.asked = False
        self._postponed = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signal; outside the main thread signals do not arrive and nothing changes."""
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
        """Only record the signal; the end of the context raises `StoppedError`."""
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
