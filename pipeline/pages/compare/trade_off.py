"""What quality costs: models as points, a figure of quality against a figure of cost."""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING

from ...units import size
from ..plots.chart import Axis, Chart, Series
from .plot import looks, outlines

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ...results.figures import ModelFigures


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """A figure of quality; less is better."""

    name: str
    value: Callable[[ModelFigures], float]
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


LOSS = Quality(
    name="Held-out loss", value=attrgetter("loss"), axis=Axis("held-out loss, nats")
)  # fmt: skip
KL = Quality(name="KL", value=attrgetter("kl"), axis=Axis("KL from the teacher, nats"))


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
    name="bytes cached a position",
    value=attrgetter("cached_bytes_per_position"),
    text=lambda value: f"{value:.1f} bytes a position",
    axis=Axis("bytes cached a position", scale="auto"),
    of_exports=False,
)


def against(
    shown: Sequence[ModelFigures], cost: Cost, quality: Quality, rows: Sequence[ModelFigures]
) -> Chart:
    """A point for each shown model with both figures; exports are joined to their student.

    rows  all models of the page, which determine the looks
    """
    look, outline = looks(rows), outlines(rows)
    series = []
    for row in cost.rows(shown):
        x, y = cost.value(row), quality.value(row)
        if x is not None:
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
