"""Shows what the stages report: bars on a terminal, lines elsewhere, and notes on both."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from ...stages.ranks import rank
from .progress_lines import Lines

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from ...stages.report import Report


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
            self._say(report.stage, sentence)

    def _say(self, stage: str, sentence: str) -> None:
        if isinstance(self._drawn, Bars):
            self._drawn.close()
        # a step repeats notes of the steps that it needs
        if sentence in self._notes:
            return
        self._notes.add(sentence)
        if isinstance(self._drawn, Lines):
            self._drawn.say(stage, sentence)
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
        """End the current bar, if any."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def _begin(self, report: Report, **looks: Any) -> None:
        self.close()
        self._stage = report.stage
        uncounted = bool(report.doing)  # removed when the next step begins
        looks = {"unit": "", "leave": not uncounted, "dynamic_ncols": True, **looks}
        self.bar = tqdm(file=self._stream, **looks)
