"""The plots that only a report has: what quality costs, and how sure the teacher was."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Literal

from ....data.store.statistics import ENTROPY_BIN_WIDTH
from ..charts import Axis, Bars, Chart
from ..compare.plot import Panel, Plot, left_out, students_of
from ..compare.trade_off import DISK, KL, LATENCY, LOSS, MEMORY, PARAMETERS, against

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ...results.columns import Row
    from ..compare.trade_off import Cost, Quality

_PACKED_ALIKE = 1.05
"""Bytes a parameter, the most over the least: up to here size on disk tells what parameters do."""


def trade_offs(rows: Sequence[Row]) -> list[Plot]:
    """Quality over everything that a model costs and that was measured: loss, then KL."""
    size = (PARAMETERS,) if _packed_alike(rows) else (PARAMETERS, DISK)
    costs = [*size, LATENCY, MEMORY]
    drawn = [cost for cost in costs if _students_known(rows, cost)]
    first = "Further down is better, further left is cheaper. The star is the teacher."
    if any(row["role"] == "export" for row in rows):
        first += " An outline is an export, joined to the student it was made of."
    notes = [_note(rows, cost) for cost in costs]
    caption = " ".join(part for part in (first, *notes) if part)
    loss = _plot(rows, drawn, LOSS, caption)
    kl = "The same for the mean KL from the teacher, whose own is 0."
    return [loss, _plot(rows, drawn, KL, kl)]


def _plot(rows: Sequence[Row], costs: Sequence[Cost], quality: Quality, caption: str) -> Plot:
    *others, last = [cost.name for cost in costs]
    title = f"{quality.name} against {', '.join(others)}{' and ' if others else ''}{last}"
    panels = tuple(
        Panel(name=_capital(cost.name), chart=_compact(against(rows, cost, quality)))
        for cost in costs
    )
    exports = any(one.joined_to for panel in panels for one in panel.chart.series)
    return Plot(title=title, caption=caption, panels=panels, columns=_columns(len(panels), exports))


def _columns(panels: int, exports: bool) -> Literal[2, 3, 4]:
    """Many points need room for their names."""
    if exports:
        return 2
    return 3 if panels < 4 else 4


def _compact(chart: Chart) -> Chart:
    """With few ticks' worth of title: the picture is small. Where a point has no room for its name,
    the section says it once for all pictures."""
    return dataclasses.replace(chart, y=dataclasses.replace(chart.y, title="nats"), names="room")


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _students_known(rows: Sequence[Row], cost: Cost) -> bool:
    return any(cost.value(row) is not None for row in students_of(rows))


def _packed_alike(rows: Sequence[Row]) -> bool:
    """Whether all models take as many bytes a parameter."""
    widths = [
        row["bytes"] / row["parameters"] for row in rows if row["bytes"] and row["parameters"]
    ]
    return not widths or max(widths) <= _PACKED_ALIKE * min(widths)


def _note(rows: Sequence[Row], cost: Cost) -> str:
    """What a reader must know of one cost: who is missing, and whether machines differ."""
    if not _students_known(rows, cost):
        return f"{_capital(cost.name)} was not measured; coldstill evaluate does it."
    missing = [row["name"] for row in cost.rows(rows) if cost.value(row) is None]
    said = left_out(missing, f"{cost.name} not measured").strip()
    known = [row for row in cost.rows(rows) if cost.value(row) is not None]
    machines = {row.get("machine") for row in known}
    if cost.of_machine and len(machines) > 1:
        said += f" {_capital(cost.name)} is of different machines, so it does not compare."
    return said.strip()


def entropies(record: Mapping[str, Any]) -> Plot:
    """How many positions the teacher was how sure at."""
    counts, starts = (
        record["histograms"]["entropy"]["positions"],
        record["histograms"]["entropy"]["from"],
    )
    used = max((place for place, count in enumerate(counts) if count), default=0) + 1
    open_end = " The last bar holds all above." if used == len(counts) else ""
    chart = _histogram(
        counts[:used],
        [*starts[:used], starts[used - 1] + ENTROPY_BIN_WIDTH],
        Axis("entropy, nats", low=0.0),
        f"The teacher's entropy at all positions, mean {record['teacher_entropy']:.2f} nats.",
    )
    caption = (
        "Share of positions by the entropy of the teacher's distribution, on average "
        f"{record['teacher_entropy']:.2f} nats: 0 where only one token can come next, 0.69 at a "
        f"toss-up of two.{open_end}"
    )
    return Plot(title="How sure the teacher was", caption=caption, panels=(Panel(chart=chart),))


def covered_mass(record: Mapping[str, Any]) -> Plot:
    """How much of the teacher's probability the head holds."""
    counts, starts = (
        record["histograms"]["head_mass"]["positions"],
        record["histograms"]["head_mass"]["from"],
    )
    head = record["capture"]["head"]
    chart = _histogram(
        counts,
        [*starts, 1.0],
        Axis("probability inside the head", form="percent", low=0.0, high=1.0),
        f"Probability inside a head of {head}, mean {record['head_mass']:.1%}.",
    )
    caption = (
        f"Share of positions by the probability that the {head} most probable tokens hold, on "
        f"average {record['head_mass']:.1%}. The rest is in the samples and in the exact mass of "
        "the tail."
    )
    return Plot(title="What the head covers", caption=caption, panels=(Panel(chart=chart),))


def _histogram(counts: Sequence[int], edges: Sequence[float], x: Axis, label: str) -> Chart:
    shares = tuple(count / max(1, sum(counts)) for count in counts)
    most = max(shares, default=0.0) or 1.0
    return Chart(
        label=label,
        x=x,
        y=Axis("share of positions", form="percent", low=0.0, high=most),
        series=(),
        bars=Bars(edges=tuple(edges), shares=shares, height=1.0),
        names="none",
    )
