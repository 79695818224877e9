"""What quality costs: models as points, a figure of quality over a figure of cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...results.columns import short_name, speed_of
from ...units import size
from ..charts import Axis, Chart, Series
from .plot import looks, outlines

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ...results.columns import Row


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """How good a model is: less is better."""

    key: str
    name: str
    axis: Axis


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What a model takes."""

    name: str
    value: Callable[[Row], float | None]
    """None where it was not measured."""
    told: Callable[[float], str]
    axis: Axis
    of_machine: bool = False
    """Whether figures of different machines differ."""
    of_exports: bool = True
    """Whether an export's may be another than its student's."""

    def rows(self, rows: Sequence[Row]) -> list[Row]:
        """The models that have a figure of their own."""
        return [row for row in rows if self.of_exports or row["role"] != "export"]


LOSS = Quality(key="loss", name="Held-out loss", axis=Axis("held-out loss, nats"))
KL = Quality(key="kl", name="KL", axis=Axis("KL from the teacher, nats"))


def _figure(key: str) -> Callable[[Row], float | None]:
    return lambda row: row.get(key)


def _measured(key: str) -> Callable[[Row], float | None]:
    """A figure of which 0 says that it was too little to be measured."""
    return lambda row: row.get(key) or None


def _milliseconds(row: Row) -> float | None:
    seconds = speed_of(row).get("token_seconds")
    return 1000 * seconds if seconds else None


def _memory(row: Row) -> float | None:
    return speed_of(row).get("memory_bytes") or None


PARAMETERS = Cost(
    name="parameters",
    value=_figure("parameters"),
    told=lambda value: f"{value:,.0f} parameters",
    axis=Axis("parameters", scale="auto", form="short"),
    of_exports=False,
)
DISK = Cost(
    name="size on disk",
    value=_measured("bytes"),
    told=size,
    axis=Axis("bytes of the weights", scale="auto", form="short"),
)
LATENCY = Cost(
    name="time per token",
    value=_milliseconds,
    told=lambda value: f"{value:.2f} ms a token",
    axis=Axis("ms a token, one text at a time", scale="auto"),
    of_machine=True,
)
MEMORY = Cost(
    name="peak memory",
    value=_memory,
    told=size,
    axis=Axis("bytes at most, weights included", scale="auto", form="short"),
    of_machine=True,
)


def against(rows: Sequence[Row], cost: Cost, quality: Quality) -> Chart:
    """A point for each model of which both are known; those of exports are joined to their
    student's."""
    series = tuple(
        point(row, value, quality, rows, cost.told(value))
        for row in cost.rows(rows)
        if (value := cost.value(row)) is not None
    )
    return Chart(
        label=f"{quality.name} in nats against {cost.name}. {told(series)}",
        x=cost.axis,
        y=quality.axis,
        series=series,
    )


def point(row: Row, x: float, quality: Quality, rows: Sequence[Row], what: str) -> Series:
    """One model at `x` on the horizontal axis, and what is said of it.

    rows  all models, whose looks are told apart
    what  that place in words
    """
    name, height = row["name"], row[quality.key]
    note = f"{name}: {what}, {quality.name.removeprefix('Held-out ')} {height:z.4f}"
    return Series(
        name=name,
        points=((x, height),),
        look=looks(rows)[name],
        notes=(note,),
        label=short_name(row),
        hollow=outlines(rows)[name],
        joined_to=row.get("of", ""),
    )


def told(series: Sequence[Series]) -> str:
    """All that is said of these points, for those who do not see them."""
    return "; ".join(note for one in series for note in one.notes)
