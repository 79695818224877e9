"""The sections with plots that pages consist of, and how models look in them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ...results.figures import students_of
from ..plots.drawing import draw

if TYPE_CHECKING:
    from collections.abc import Sequence

    from markupsafe import Markup

    from ...results.figures import ModelFigures
    from ..plots.chart import Chart, Series

_WIDE, _HALF, _PHONE = (1040, 380), (544, 330), (352, 270)
"""Sizes in pixels. Each picture is drawn for its place: a scaled one has letters of other sizes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One picture of a plot."""

    name: str = ""
    detail: str = ""
    chart: Chart


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """One section of a page."""

    title: str
    caption: str
    panels: tuple[Panel, ...]
    """One picture, or several small ones side by side; empty where nothing is known."""
    columns: Literal[2, 3] = 3
    """Pictures in a row on a wide screen."""


@dataclass(frozen=True, slots=True)
class DrawnPicture:
    """One picture, for a wide screen and for a phone if that needs another one."""

    desk: Markup
    phone: Markup | None
    complete: bool
    """Whether both name all series."""


@dataclass(frozen=True, slots=True)
class DrawnPanel:
    """A drawn panel."""

    name: str
    detail: str
    picture: DrawnPicture


@dataclass(frozen=True, slots=True)
class LegendEntry:
    """One line of a legend."""

    name: str
    look: int | None
    hollow: int | None
    line: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A plot as a template shows it."""

    title: str
    caption: str
    panels: list[DrawnPanel]
    columns: int
    half: bool
    """Whether it takes half of the page's width."""
    legend: list[LegendEntry]


def drawn(plot: Plot) -> Section:
    """The plot with its pictures drawn, and a legend if any picture cannot name all its series."""
    alone = len(plot.panels) == 1
    lines = any(one.line for panel in plot.panels for one in panel.chart.series)
    size = _HALF if plot.columns == 2 else _PHONE
    if alone:
        size = _WIDE if lines else _HALF
    panels = [DrawnPanel(p.name, p.detail, _picture(p.chart, size)) for p in plot.panels]
    return Section(
        title=plot.title,
        caption=plot.caption,
        panels=panels,
        columns=plot.columns,
        half=alone and not lines,
        legend=[] if all(panel.picture.complete for panel in panels) else _legend(plot),
    )


def _picture(chart: Chart, size: tuple[int, int]) -> DrawnPicture:
    desk = draw(dataclasses.replace(chart, width=size[0], height=size[1]))
    if size == _PHONE:
        return DrawnPicture(desk.svg, None, desk.complete)
    phone = draw(dataclasses.replace(chart, width=_PHONE[0], height=_PHONE[1]))
    return DrawnPicture(desk.svg, phone.svg, desk.complete and phone.complete)


def _legend(plot: Plot) -> list[LegendEntry]:
    """Models by their colour, then formats of exports by their outline."""
    series = {one.name: one for panel in plot.panels for one in panel.chart.series}
    models = [one for one in series.values() if one.hollow is None]
    formats = {one.label: one for one in series.values() if one.hollow is not None}
    return [
        *(LegendEntry(one.name, one.look, None, _is_plain(one)) for one in models),
        *(LegendEntry(name, None, one.hollow, False) for name, one in formats.items()),
    ]


def _is_plain(series: Series) -> bool:
    return series.line and not series.marks


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
