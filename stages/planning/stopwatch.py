"""How long something takes on a processor, without what is done in between."""

from __future__ import annotations

import time
from contextlib import ExitStack

import torch


class Stopwatch:
    """A stopwatch that knows accelerators: they are still busy when they seem done."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._passed = device, 0.0
        self._since = self._now()

    def seconds(self) -> float:
        """Since it was made, without what it was stopped for."""
        return self._passed + self._now() - self._since

    def stopped(self) -> ExitStack:
        """Do not count what happens inside."""
        self._passed = self.seconds()
        held = ExitStack()
        held.callback(self._go_on)
        return held

    def _go_on(self) -> None:
        self._since = self._now()

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()
