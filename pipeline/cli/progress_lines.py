"""Progress without a terminal: whole lines, at the start of a stage and then ever more
rarely, so that a log of a batch system tells what goes on and stays short.

A thread writes them: a line is due although a stage says nothing for minutes, while a library
loads weights, say.
"""

from __future__ import annotations

import contextlib
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..units import duration, rate

if TYPE_CHECKING:
    from collections.abc import Callable

    from ...stages.report import Report

INTERVALS = (10.0, 30.0, 60.0)
"""Seconds from the start of a stage to its first line, to the next, and between all later ones."""
BRIEF = 2.0
"""Seconds that something uncounted takes before it is told: most such steps of a small model take
moments."""
AT_WORK = "at work"
"""What is told between two steps that say what they do."""
_BEAT = 0.25
"""Seconds between two looks of the thread."""


@dataclass(slots=True)
class _Phase:
    """What goes on now."""

    stage: str
    started: float
    doing: str = ""
    """What is not counted."""
    counts: bool = False
    since: float = 0.0
    """When `doing` began;"""
    told: bool = False
    """whether its beginning was told."""
    part: str = ""
    unit: str = ""
    first: int = 0
    """Of `done`: where it started."""
    done: int = 0
    total: int = 0
    figures: dict[str, float] = field(default_factory=dict)
    lines: int = 0
    """How many have been due since it started;"""
    last: float = 0.0
    """when the last one was."""

    @property
    def name(self) -> str:
        return f"{self.stage}, {self.part}" if self.part else self.stage

    @property
    def is_complete(self) -> bool:
        return self.counts and 0 < self.total <= self.done

    def is_due(self, now: float) -> bool:
        return now - self.last >= INTERVALS[min(self.lines, len(INTERVALS) - 1)]


class Lines:
    """Writes lines about reports; `begin` starts the thread that also writes between them."""

    def __init__(
        self, write: Callable[[str], None], command: str, clock: Callable[[], float]
    ) -> None:
        """Begin with nothing reported.

        write    one whole line
        command  what lines are about until a stage reports; nothing is written until then if empty
        clock    seconds
        """
        self._write, self._clock = write, clock
        self._phase = _between(command, clock())
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def begin(self) -> None:
        """Also write while nothing is reported, until `close`."""
        self._thread = threading.Thread(target=self._beat, name="progress", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Write no more."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()

    def take(self, report: Report) -> None:
        """Take one report that is not a note, and write what is due."""
        with self._lock:
            phase, now = self._phase, self._clock()
            same = phase.counts and report.stage == phase.stage
            if report.doing and same and not phase.is_complete:
                phase.doing, phase.since, phase.told = report.doing, now, False
            elif report.doing:
                self._end(now)
                self._phase = _Phase(report.stage, now, report.doing, since=now, last=now)
            elif same and report.done >= phase.done:
                self._go_on(phase, report, now)
            else:
                self._end(now)
                self._start(report, now)
            self._look(now)

    def say(self, stage: str, sentence: str) -> None:
        """Write a sentence of a stage; what that did until now, and did not count, has ended."""
        with self._lock:
            phase, now = self._phase, self._clock()
            between_steps = phase.counts and phase.total and not phase.is_complete
            if stage == phase.stage and phase.doing and not between_steps:
                self._end(now)
                self._phase = _between(stage, now)
            self._write(sentence)

    def tick(self) -> None:
        """Write what is due by now."""
        with self._lock:
            self._look(self._clock())

    def _beat(self) -> None:
        # a log that cannot be written must not end the work
        with contextlib.suppress(OSError, ValueError):
            while not self._ended.wait(_BEAT):
                self.tick()

    def _start(self, report: Report, now: float) -> None:
        first = max(0, report.done - report.step)
        phase = _Phase(report.stage, now, counts=True, first=first, last=now)
        self._phase = phase
        self._update(phase, report)
        where = f" at {first:,}" if first else (", 0" if report.total else "")
        amount = f" of {report.total:,} {report.unit}" if report.total else ""
        unit = f" {report.unit}" if first and not amount else ""
        self._write(f"{phase.name}: starts{where}{amount}{unit}")
        self._complete(phase, now)

    def _go_on(self, phase: _Phase, report: Report, now: float) -> None:
        finished, another = phase.is_complete, report.part != phase.part
        self._update(phase, report)
        if another and report.part:
            self._write(_state(phase, now))
        elif not finished:
            self._complete(phase, now)

    def _update(self, phase: _Phase, report: Report) -> None:
        phase.doing, phase.part, phase.unit = "", report.part, report.unit
        phase.done, phase.total = report.done, report.total
        phase.figures = report.figures

    def _complete(self, phase: _Phase, now: float) -> None:
        """Of a stage that has come to its end: how long it took, if lines told of it."""
        if not phase.is_complete:
            return
        if phase.lines:
            self._write(_state(phase, now, ended=True))
        phase.doing, phase.since, phase.told = AT_WORK, now, True
        phase.lines, phase.last = 0, now

    def _end(self, now: float) -> None:
        """Of what has no total, if lines told of it: how long it took."""
        phase = self._phase
        if not phase.lines or phase.total or phase.doing == AT_WORK:
            return
        if phase.counts:
            self._write(_state(phase, now, ended=True))
        else:
            self._write(f"{phase.name}: {phase.doing}: took {duration(now - phase.since)}")

    def _look(self, now: float) -> None:
        phase = self._phase
        if phase.doing and not phase.told and now - phase.since >= BRIEF:
            phase.told = True
            self._write(f"{phase.name}: {phase.doing}")
        if phase.is_due(now) and phase.stage:
            phase.lines, phase.last = phase.lines + 1, now
            self._write(_state(phase, now))


def _between(stage: str, now: float) -> _Phase:
    """After one thing and before the next."""
    return _Phase(stage, now, AT_WORK, since=now, told=True, last=now)


def _state(phase: _Phase, now: float, *, ended: bool = False) -> str:
    """Where it is now, as one line."""
    spent = now - phase.started
    if phase.doing and (phase.is_complete or not phase.counts):
        return f"{phase.name}: {phase.doing}, {duration(now - phase.since)} so far"
    total = f" of {phase.total:,}" if phase.total else ""
    parts = [f"{phase.done:,}{total} {phase.unit}"]
    speed = (phase.done - phase.first) / spent if spent > 0 else 0.0
    if ended:
        parts[0] += f" in {duration(spent)}"
    if speed > 0:
        parts.append(f"{rate(speed)} {phase.unit}/s")
    else:
        parts.append(f"{duration(spent)} so far")
    if speed > 0 and phase.total > phase.done:
        parts.append(f"{duration((phase.total - phase.done) / speed)} left")
    parts += [f"{name} {value:,.4g}" for name, value in phase.figures.items()]
    if phase.doing and not ended:
        parts.append(f"{phase.doing} for {duration(now - phase.since)}")
    return f"{phase.name}: {', '.join(parts)}"
