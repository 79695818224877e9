"""Sections of pages with plots, colours and marks of models, and plots of quality against cost."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, Literal

from ...results.figures import students_of
from ...units import size
from ..plots.chart import Axis, Chart, Series
from ..plots.drawing import draw

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ...results.figures import ModelFigures
    from ..plots.drawing import Picture


_WIDE, _HALF, _PHONE = (1040, 380), (544, 330), (352, 270)
"""Sizes in pixels. Each picture is drawn for its place: a scaled one has letters of other sizes."""


@dataclass(frozen=True, slots=True)
class LegendEntry:
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


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityFigure:
    """A figure of quality; less is better."""

    name: str
    value: Callable[[ModelFigures], float | None]
    """The figure of a model; None where it is not known."""
    axis: Axis


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """A figure of cost."""

    name: str
    value: Callable[[ModelFigures], float | None]
    """The figure of a model; None where it was not measured."""
    text: Callable[[float], str]
    """The figure as it is shown."""
    axis: Axis
    of_machine: bool = False
    """Whether it depends on the machine."""
    of_exports: bool = True
    """Whether it can differ between an export and its student."""

    def rows(self, rows: Sequence[ModelFigures]) -> list[ModelFigures]:
        """The models that have a figure of their own."""
        return [row for row in rows if self.of_exports or not row.is_export]


LOSS = QualityFigure(
    name="Held-out loss", value=attrgetter("loss"), axis=Axis("held-out loss, nats")
)  # fmt: skip
KL = QualityFigure(name="KL", value=attrgetter("kl"), axis=Axis("KL from the teacher, nats"))


def _milliseconds(row: ModelFigures) -> float | None:
    speed = row.speed()
    return 1000 * speed.token_seconds if speed and speed.token_seconds else None


def _memory(row: ModelFigures) -> float | None:
    speed = row.speed()
    return speed.memory_bytes or None if speed else None


PARAMETERS = Cost(
    name="parameters",
    value=attrgetter("parameters"),
    text=lambda value: f"{value:,.0f} parameters",
    axis=Axis("parameters", scale="auto", form="short"),
    of_exports=False,
)
DISK = Cost(
    name="size on disk",
    value=lambda row: row.bytes or None,
    text=size,
    axis=Axis("bytes of the weights", scale="auto", form="short"),
)
LATENCY = Cost(
    name="time per token",
    value=_milliseconds,
    text=lambda value: f"{value:.2f} ms a token",
    axis=Axis("ms a token, one text at once", scale="auto"),
    of_machine=True,
)
MEMORY = Cost(
    name="peak memory",
    value=_memory,
    text=size,
    axis=Axis("bytes, weights included", scale="auto", form="short"),
    of_machine=True,
)
CACHED = Cost(
    name="stored bytes per position",
    value=attrgetter("cached_bytes_per_position"),
    text=lambda value: f"{value:.1f} bytes a position",
    axis=Axis("stored bytes per position", scale="auto"),
    of_exports=False,
)


def against(
    shown: Sequence[ModelFigures], cost: Cost, quality: QualityFigure, rows: Sequence[ModelFigures]
) -> Chart:
    """A point for each shown model with both figures; exports are joined to their student.

    rows  all models of the page, which determine the looks
    """
    look, outline = looks(rows), outlines(rows)
    series = []
    for row in cost.rows(shown):
        x, y = cost.value(row), quality.value(row)
        if x is not None and y is not None:
            short = quality.name.removeprefix("Held-out ")
            series.append(
                Series(
                    name=row.name,
                    points=((x, y),),
                    look=look[row.name],
                    notes=(f"{row.name}: {cost.text(x)}, {short} {y:z.4f}",),
                    label=row.short_name,
                    hollow=outline[row.name],
                    joined_to=row.of or "",
                )
            )
    figures = "; ".join(note for one in series for note in one.notes)
    return Chart(
        label=f"{quality.name} in nats against {cost.name}. {figures}",
        x=cost.axis,
        y=quality.axis,
        series=tuple(series),
    )
