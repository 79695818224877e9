"""The plots of a report alone: quality against costs, and histograms of the teacher's record."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

from ....data.store.commit import ENTROPY_BIN_WIDTH
from ...results.figures import students_of
from ..compare.panels import (
    DISK,
    KL,
    LATENCY,
    LOSS,
    MEMORY,
    PARAMETERS,
    Panel,
    Plot,
    against,
    left_out,
)
from ..plots.chart import Axis, Bar, Chart

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ...results.facts import CaptureFacts
    from ...results.figures import ModelFigures
    from ..compare.panels import Cost, QualityFigure

_PACKED_ALIKE = 1.05
"""Ratio of bytes a parameter between models up to which size on disk needs no plot."""


def trade_offs(rows: Sequence[ModelFigures]) -> list[Plot]:
    """Loss, then KL, against every cost that was measured."""
    disk = [] if _packed_alike(rows) else [DISK]
    costs = [PARAMETERS, *disk, LATENCY, MEMORY]
    drawn = [cost for cost in costs if _students_known(rows, cost)]
    first = "Further down is better, further left is cheaper. The star is the teacher."
    if any(row.is_export for row in rows):
        first += " An outline is an export, joined to its student."
    notes = [_note(rows, cost) for cost in costs]
    caption = " ".join(part for part in (first, *notes) if part)
    loss = _plot(rows, drawn, LOSS, caption)
    kl = "The same for the mean KL from the teacher, whose own is 0."
    return [loss, _plot(rows, drawn, KL, kl)]


def _plot(
    rows: Sequence[ModelFigures], costs: Sequence[Cost], quality: QualityFigure, caption: str
) -> Plot:
    *others, last = [cost.name for cost in costs]
    title = f"{quality.name} against {', '.join(others)}{' and ' if others else ''}{last}"
    panels = []
    for cost in costs:
        chart = against(rows, cost, quality, rows)
        # a short title, as the section's title names the figure
        chart = dataclasses.replace(chart, y=dataclasses.replace(chart.y, title="nats"))
        panels.append(Panel(name=_capital(cost.name), chart=chart))
    exports = any(one.joined_to for panel in panels for one in panel.chart.series)
    # many points need room for their names; four plots are two by two
    columns: Literal[2, 3] = 2 if exports or len(panels) == 4 else 3
    return Plot(title=title, caption=caption, panels=tuple(panels), columns=columns)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _students_known(rows: Sequence[ModelFigures], cost: Cost) -> bool:
    return any(cost.value(row) is not None for row in students_of(rows))


def _packed_alike(rows: Sequence[ModelFigures]) -> bool:
    """Whether all models take as many bytes a parameter, so that their sizes tell nothing more."""
    widths = [row.bytes / row.parameters for row in rows if row.bytes and row.parameters]
    return not widths or max(widths) <= _PACKED_ALIKE * min(widths)


def _note(rows: Sequence[ModelFigures], cost: Cost) -> str:
    """The caption's part on one cost: models without it, and whether machines differ."""
    if not _students_known(rows, cost):
        return f"{_capital(cost.name)} was not measured; coldstill evaluate does it."
    missing = [row.name for row in cost.rows(rows) if cost.value(row) is None]
    note = left_out(missing, f"{cost.name} not measured")
    machines = {row.machine for row in cost.rows(rows) if cost.value(row) is not None}
    if cost.of_machine and len(machines) > 1:
        note += f" {_capital(cost.name)} is of different machines, so it does not compare."
    return note.strip()


def entropies(record: CaptureFacts) -> Plot:
    """Positions by the entropy of the teacher's distribution."""
    counts, starts = record.entropy_histogram.positions, record.entropy_histogram.starts
    used = max((place for place, count in enumerate(counts) if count), default=0) + 1
    open_end = " The last bar holds all above." if used == len(counts) else ""
    chart = _histogram(
        counts[:used],
        [*starts[:used], starts[used - 1] + ENTROPY_BIN_WIDTH],
        Axis("entropy, nats", low=0.0),
        f"The teacher's entropy at all positions, mean {record.teacher_entropy:.2f} nats.",
    )
    caption = (
        "Share of positions by the entropy of the teacher's distribution, on average "
        f"{record.teacher_entropy:.2f} nats: 0 where only one token can come next, 0.69 where two "
        f"are equally probable.{open_end}"
    )
    return Plot(title="Entropy of the teacher", caption=caption, panels=(Panel(chart=chart),))


def covered_mass(record: CaptureFacts) -> Plot:
    """Positions by the probability inside the head."""
    head = record.capture.head
    chart = _histogram(
        record.mass_histogram.positions,
        [*record.mass_histogram.starts, 1.0],
        Axis("probability inside the head", form="percent", low=0.0, high=1.0),
        f"Probability inside a head of {head}, mean {record.head_mass:.1%}.",
    )
    caption = (
        f"Share of positions by the probability of the {head} most probable tokens, on average "
        f"{record.head_mass:.1%}. The rest is in the samples and in the exact mass of the tail."
    )
    return Plot(title="Probability inside the head", caption=caption, panels=(Panel(chart=chart),))


def _histogram(counts: Sequence[int], edges: Sequence[float], x: Axis, label: str) -> Chart:
    shares = [count / max(1, sum(counts)) for count in counts]
    return Chart(
        label=label,
        x=x,
        y=Axis("share of positions", form="percent", low=0.0, high=max(shares, default=0.0) or 1.0),
        bars=tuple(
            Bar(start, end, share)
            for (start, end), share in zip(pairwise(edges), shares, strict=True)
        ),
        named=False,
    )
