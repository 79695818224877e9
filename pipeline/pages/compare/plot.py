"""The sections with plots that pages consist of, and how models look in them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ...results.figures import students_of
from ..plots.drawing import draw

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ...results.figures import ModelFigures
    from ..plots.chart import Chart
    from ..plots.drawing import Picture

_WIDE, _HALF, _PHONE = (1040, 380), (544, 330), (352, 270)
"""Sizes in pixels. Each picture is drawn for its place: a scaled one has letters of other sizes."""


@dataclass(frozen=True, slots=True)
class LegendEntry:
    """One line of a legend."""

    name: str
    look: int | None
    hollow: int | None = None
    line: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One picture of a plot."""

    name: str = ""
    detail: str = ""
    chart: Chart

    def drawn(self, size: tuple[int, int]) -> Picture:
        """The picture in a size, in pixels."""
        return draw(dataclasses.replace(self.chart, width=size[0], height=size[1]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """One section of a page."""

    title: str
    caption: str
    panels: tuple[Panel, ...]
    """One picture, or several small ones side by side; empty where nothing is known."""
    columns: Literal[2, 3] = 3
    """Pictures in a row on a wide screen."""

    @property
    def lines(self) -> bool:
        """Whether its series are lines."""
        return any(one.line for panel in self.panels for one in panel.chart.series)

    @property
    def half(self) -> bool:
        """Whether it takes half of the page's width."""
        return len(self.panels) == 1 and not self.lines

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Sizes of its pictures for a wide screen and for a phone; one if they are the same."""
        if len(self.panels) == 1:
            return (_WIDE if self.lines else _HALF), _PHONE
        return (_HALF, _PHONE) if self.columns == 2 else (_PHONE,)

    @property
    def legend(self) -> list[LegendEntry]:
        """Models by their colour, then formats of exports by their outline.

        Empty if every picture names all its series.
        """
        if all(panel.drawn(size).complete for panel in self.panels for size in self.sizes):
            return []
        series = {one.name: one for panel in self.panels for one in panel.chart.series}
        models = [one for one in series.values() if one.hollow is None]
        formats = {one.label: one for one in series.values() if one.hollow is not None}
        return [
            *(LegendEntry(one.name, one.look, None, not one.marks) for one in models),
            *(LegendEntry(name, None, one.hollow) for name, one in formats.items()),
        ]


def looks(rows: Sequence[ModelFigures]) -> dict[str, int | None]:
    """Each model's colour and mark, the same in every plot; an export has its student's.

    None for teachers.
    """
    numbers = {row.name: number for number, row in enumerate(students_of(rows))}
    return {row.name: numbers.get(row.of or row.name) for row in rows}


def outlines(rows: Sequence[ModelFigures]) -> dict[str, int | None]:
    """The number of each export's outline, one for each format; None for other models."""
    formats = sorted({row.short_name for row in rows if row.is_export})
    return {row.name: formats.index(row.short_name) if row.is_export else None for row in rows}


def left_out(names: Sequence[str], why: str) -> str:
    """A sentence for a caption about the models that are not drawn."""
    return f" Left out: {', '.join(names)} ({why})." if names else ""
