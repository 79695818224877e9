"""Shows what the stages report: bars on a terminal, lines elsewhere, and notes on both."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from ...stages.ranks import rank
from ..units import duration, rate

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from ...stages.report import Report


INTERVALS = (10.0, 30.0, 60.0)
"""Seconds until the first line of a stage, until the next one, and between later ones."""
BRIEF = 2.0
"""Seconds until a step without counts gets a line; most such steps of a small model are shorter."""
AT_WORK = "at work"
"""Name of the time between two named steps."""
_BEAT = 0.25
"""Seconds between two checks by the thread."""


@dataclass(slots=True)
class _Phase:
    stage: str
    started: float
    doing: str = ""
    """Current step without counts."""
    counts: bool = False
    since: float = 0.0
    """Time when `doing` began."""
    announced: bool = False
    """Whether a line for `doing` was written."""
    part: str = ""
    unit: str = ""
    first: int = 0
    """First value of `done`."""
    done: int = 0
    total: int = 0
    figures: dict[str, float] = field(default_factory=dict)
    lines: int = 0
    """Number of lines that were due since the start."""
    last: float = 0.0
    """Time of the last line."""

    @property
    def name(self) -> str:
        return f"{self.stage}, {self.part}" if self.part else self.stage

    @property
    def is_complete(self) -> bool:
        return self.counts and 0 < self.total <= self.done

    def is_due(self, now: float) -> bool:
        return now - self.last >= INTERVALS[min(self.lines, len(INTERVALS) - 1)]


class Lines:
    """Writes lines about reports; `begin` starts a thread that also writes between reports."""

    def __init__(
        self, write: Callable[[str], None], command: str, clock: Callable[[], float]
    ) -> None:
        """Start without a report.

        write    writes one line
        command  name in lines until a stage reports; if empty, nothing is written until then
        clock    time in seconds
        """
        self._write, self._clock = write, clock
        self._phase = _between(command, clock())
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def begin(self) -> None:
        """Start to write lines between reports, until `close`."""
        self._thread = threading.Thread(target=self._beat, name="progress", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()

    def take(self, report: Report) -> None:
        """Handle one report that is not a note, and write the line that is due."""
        with self._lock:
            phase, now = self._phase, self._clock()
            same = phase.counts and report.stage == phase.stage
            if report.doing and same and not phase.is_complete:
                phase.doing, phase.since, phase.announced = report.doing, now, False
            elif report.doing:
                self._end(now)
                self._phase = _Phase(report.stage, now, report.doing, since=now, last=now)
            elif same and report.done >= phase.done:
                self._go_on(phase, report, now)
            else:
                self._end(now)
                self._start(report, now)
            self._look(now)

    def note(self, stage: str, sentence: str) -> None:
        """Write a note of a stage; it ends the stage's current step without counts."""
        with self._lock:
            phase, now = self._phase, self._clock()
            between_steps = phase.counts and phase.total and not phase.is_complete
            if stage == phase.stage and phase.doing and not between_steps:
                self._end(now)
                self._phase = _between(stage, now)
            self._write(sentence)

    def tick(self) -> None:
        """Write the line that is due now."""
        with self._lock:
            self._look(self._clock())

    def _beat(self) -> None:
        # a log that cannot be written does not end the work
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
        """Write the duration of a finished stage, if it had lines."""
        if not phase.is_complete:
            return
        if phase.lines:
            self._write(_state(phase, now, ended=True))
        phase.doing, phase.since, phase.announced = AT_WORK, now, True
        phase.lines, phase.last = 0, now

    def _end(self, now: float) -> None:
        """Write the duration of a stage without a total, if it had lines."""
        phase = self._phase
        if not phase.lines or phase.total or phase.doing == AT_WORK:
            return
        if phase.counts:
            self._write(_state(phase, now, ended=True))
        else:
            self._write(f"{phase.name}: {phase.doing}: took {duration(now - phase.since)}")

    def _look(self, now: float) -> None:
        phase = self._phase
        if phase.doing and not phase.announced and now - phase.since >= BRIEF:
            phase.announced = True
            self._write(f"{phase.name}: {phase.doing}")
        if phase.is_due(now) and phase.stage:
            phase.lines, phase.last = phase.lines + 1, now
            self._write(_state(phase, now))


def _between(stage: str, now: float) -> _Phase:
    """Return the phase between two steps."""
    return _Phase(stage, now, AT_WORK, since=now, announced=True, last=now)


def _state(phase: _Phase, now: float, *, ended: bool = False) -> str:
    """Return the line about a phase."""
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


class Progress:
    """A reporter; leaving its context ends the bar or the lines."""

    def __init__(self, command: str = "", clock: Callable[[], float] = time.monotonic) -> None:
        """Choose bars or lines; only the first of several processes shows them.

        command  name in lines until a stage reports
        clock    time in seconds, for lines
        """
        # taken now, since stderr can be redirected later to silence a library
        self._stream = sys.stderr
        self._first = rank() == 0
        self._notes: set[str] = set()
        self._drawn: Bars | Lines | None = None
        if self._first:
            on_terminal = self._stream.isatty()
            self._drawn = Bars(self._stream) if on_terminal else Lines(self._write, command, clock)

    def __enter__(self) -> Progress:
        if isinstance(self._drawn, Lines):
            self._drawn.begin()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._drawn is not None:
            self._drawn.close()

    def __call__(self, report: Report) -> None:
        """Show one report."""
        if not report.note:
            if self._drawn is not None:
                self._drawn.take(report)
        elif self._first or report.warning:
            sentence = f"{report.stage}: {'warning: ' if report.warning else ''}{report.note}"
            self._note(report.stage, sentence)

    def _note(self, stage: str, sentence: str) -> None:
        if isinstance(self._drawn, Bars):
            self._drawn.close()
        # a step repeats notes of the steps that it needs
        if sentence in self._notes:
            return
        self._notes.add(sentence)
        if isinstance(self._drawn, Lines):
            self._drawn.note(stage, sentence)
        else:
            self._write(sentence)

    def _write(self, line: str) -> None:
        self._stream.write(line + "\n")
        self._stream.flush()


class Bars:
    """One bar at a time, on a terminal."""

    def __init__(self, stream: Any) -> None:
        """Start without a bar."""
        self._stream = stream
        self._stage = ""
        self.bar: Any = None

    def take(self, report: Report) -> None:
        """Show one report that is not a note."""
        counts = self.bar is not None and self.bar.unit
        if report.doing:
            if not (counts and report.stage == self._stage and self.bar.n != self.bar.total):
                self._begin(report, desc=f"{report.stage}: {report.doing}", bar_format="{desc}")
            return
        if not counts or report.stage != self._stage or report.done < self.bar.n:
            self._begin(
                report,
                desc=report.stage,
                total=report.total or None,
                initial=max(0, report.done - report.step),
                unit=" " + report.unit,
                unit_scale=True,
                mininterval=0.2,
            )
        shown = {name: f"{value:,.4g}" for name, value in report.figures.items()}
        if shown or report.part:
            figures = ", ".join(f"{name}={value}" for name, value in shown.items())
            self.bar.set_postfix_str(report.part or figures, refresh=False)
        self.bar.total = report.total or None  # other processes can take over a part
        self.bar.update(report.done - self.bar.n)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def _begin(self, report: Report, **looks: Any) -> None:
        self.close()
        self._stage = report.stage
        uncounted = bool(report.doing)  # removed when the next step begins
        looks = {"unit": "", "leave": not uncounted, "dynamic_ncols": True, **looks}
        self.bar = tqdm(file=self._stream, **looks)
