"""Draws what the stages report: bars on a terminal, sentences anywhere."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click
from tqdm import tqdm

from ..stages.ranks import rank

if TYPE_CHECKING:
    from types import TracebackType

    from ..stages.report import Report


class Progress:
    """A reporter: call it with reports; leaving the context closes the last bar."""

    def __init__(self) -> None:
        """Draw bars only where somebody watches; of several processes the first one speaks."""
        self._first = rank() == 0
        self._watched = sys.stderr.isatty() and self._first
        self._bar: Any = None
        self._stage = ""
        self._said: set[str] = set()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()

    def __call__(self, report: Report) -> None:
        """Draw one report."""
        if report.note and not (self._first or report.warning):
            return
        if report.note:
            self._close()
            self._say(f"{report.stage}: {'warning: ' if report.warning else ''}{report.note}")
        elif self._watched:
            self._advance(report)

    def _say(self, sentence: str) -> None:
        # steps that rest on one another tell the same: once is enough
        if sentence not in self._said:
            self._said.add(sentence)
            click.echo(sentence, err=True)

    def _advance(self, report: Report) -> None:
        if self._bar is None or self._stage != report.stage:
            self._close()
            self._stage = report.stage
            self._bar = tqdm(
                desc=report.stage,
                total=report.total or None,
                initial=max(0, report.done - report.step),
                unit=" " + report.unit,
                unit_scale=True,
                dynamic_ncols=True,
                mininterval=0.2,
            )
        if report.figures:
            shown = {name: f"{value:,.4g}" for name, value in report.figures.items()}
            self._bar.set_postfix(shown, refresh=False)
        self._bar.total = report.total or None  # other processes may take some of it
        self._bar.update(report.done - self._bar.n)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
