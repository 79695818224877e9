"""What quality costs: models as points, a figure of quality over a figure of cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..charts import Axis, Chart, Series
from ..units import size
from .plot import looks
from .table import TOKEN_SECONDS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from .table import Row


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


LOSS = Quality(key="loss", name="Held-out loss", axis=Axis("held-out loss, nats"))
KL = Quality(key="kl", name="KL", axis=Axis("KL from the teacher, nats"))


def _figure(key: str) -> Callable[[Row], float | None]:
    return lambda row: row.get(key)


def _measured(key: str) -> Callable[[Row], float | None]:
    """A figure of which 0 says that it was too little to be measured."""
    return lambda row: row.get(key) or None


def _milliseconds(row: Row) -> float | None:
    seconds = row.get(TOKEN_SECONDS)
    return 1000 * seconds if seconds else None


PARAMETERS = Cost(
    name="parameters",
    value=_figure("parameters"),
    told=lambda value: f"{value:,.0f} parameters",
    axis=Axis("parameters", scale="auto", form="short"),
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
    value=_measured("peak_memory_bytes"),
    told=size,
    axis=Axis("bytes at most, weights not counted", scale="auto", form="short"),
    of_machine=True,
)


def against(rows: Sequence[Row], cost: Cost, quality: Quality) -> Chart:
    """A point for each model of which both are known."""
    series = tuple(
        point(row, value, quality, looks(rows), cost.told(value))
        for row in rows
        if (value := cost.value(row)) is not None
    )
    return Chart(
        label=f"{quality.name} in nats against {cost.name}. {told(series)}",
        x=cost.axis,
        y=quality.axis,
        series=series,
    )


def point(
    row: Row, x: float, quality: Quality, look: Mapping[str, int | None], what: str
) -> Series:
    """One model at `x` on the horizontal axis, and what is said of it.

    what  that place in words
    """
    height = row[quality.key]
    note = f"{row['name']}: {what}, {quality.name.removeprefix('Held-out ')} {height:.4f}"
    return Series(name=row["name"], points=((x, height),), look=look[row["name"]], notes=(note,))


def told(series: Sequence[Series]) -> str:
    """All that is said of these points, for those who do not see them."""
    return "; ".join(note for one in series for note in one.notes)
