"""A worker of stage one: holds a teacher, and captures the shards that the driver gives it."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Literal

from ....data.errors import ColdstillError
from .cluster import at_worker

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ....data.prepared import Split
    from ....stages.capture.plan import CapturePlan
    from ....stages.models.inputs import Isolation
    from ....stages.report import Report
    from ...recipe.work import Work
    from ..capture import CheckedTeacher

Ending = Literal["", "measure", "stop"]
"""How a worker ends a split: not yet; with the measurements of the teacher; at once."""
_TURN = 1.0
"""Most seconds until a worker answers."""
_LOOK = 0.1
"""Seconds between two looks for a new shard."""


@dataclass(slots=True)
class Turn:
    """What happened since the driver asked last."""

    reports: list[Report] = field(default_factory=list)
    committed: list[int] = field(default_factory=list)
    """Shards that are in the store now."""
    ended: bool = False
    """Whether the worker has left the split."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """What a worker knows of its teacher."""

    isolation: Isolation
    reports: list[Report]


class Worker:
    """One process. The driver calls its methods, one at a time; the capture runs on a thread."""

    def __init__(
        self,
        work: Work,
        folder: str,
        checked: CheckedTeacher,
        threads: int,
        *,
        other_engine: bool = False,
    ) -> None:
        """Keep what the driver knows; parameters as `at_worker` and `capture_base`."""
        self._sent, self._folder, self._checked, self._threads = work, folder, checked, threads
        self._other_engine = other_engine
        self._split: Split | None = None
        self._reports: queue.SimpleQueue[Report | int | BaseException | None] = queue.SimpleQueue()
        """Reports, numbers of committed shards, and last an error or None."""
        self._given: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._ending: Ending = ""

    def place(self) -> str:
        """The name of this machine; answered as soon as Ray has found a place for the worker."""
        return os.uname().nodename

    def load(self) -> Loaded:
        """Load the teacher.

        Raises
            ColdstillError: it cannot be loaded here, or it is not the driver's
        """
        from ..capture import capture_base, teacher_and_plans

        reports: list[Report] = []
        work = at_worker(self._sent, self._folder, reports.append, self._threads)
        base = capture_base(work, other_engine=self._other_engine)
        if base.checked != self._checked:
            raise ColdstillError(
                f"{work.teacher_model}: another teacher on {self.place()} than where the command "
                "was started; name a teacher that is the same on all machines"
            )
        self._teacher, plans = teacher_and_plans(work, base)
        self._plans = {plan.split: plan for plan in plans}
        return Loaded(isolation=self._teacher.isolation, reports=reports)

    def turn(self, split: Split, given: list[int], ending: Ending) -> Turn:
        """Capture more shards of a split; returns after a second, or earlier with news.

        Raises what the capture raised.
        """
        if self._split != split:
            self._split, self._ending = split, ""
            capture = partial(self._capture, self._plans[split])
            threading.Thread(target=capture, name="capture", daemon=True).start()
        for shard in given:
            self._given.put(shard)
        self._ending = ending
        found = Turn()
        with contextlib.suppress(queue.Empty):
            news = self._reports.get(timeout=_TURN)
            while True:
                if isinstance(news, BaseException):
                    raise news
                if news is None:
                    found.ended = True
                elif isinstance(news, int):
                    found.committed.append(news)
                else:
                    found.reports.append(news)
                news = self._reports.get_nowait()
        return found

    def _capture(self, plan: CapturePlan) -> None:
        from ....stages.teacher_logits import capture_split

        try:
            capture_split(
                plan,
                self._teacher,
                self._reports.put,
                stop=lambda: self._ending == "stop",
                source=self._shards(),
            )
            self._reports.put(None)
        except BaseException as error:
            self._reports.put(error)

    def _shards(self) -> Iterator[tuple[int, contextlib.ExitStack]]:
        """The shards that the driver gives, until it ends the split."""
        while not self._ending:
            with contextlib.suppress(queue.Empty):
                shard = self._given.get(timeout=_LOOK)
                committed = contextlib.ExitStack()
                committed.callback(self._reports.put, shard)
                yield shard, committed
