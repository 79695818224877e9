"""Plots of how training went."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ..charts import Axis, Chart, Series, short
from .plot import Panel, Plot, left_out, looks, students_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from ...results.columns import Row
    from ...results.curves import Curve

_BEGINNING = 0.1
"""Share of a training whose steep fall may be cut off, so that the rest can be told apart."""


def learning_curves(rows: Sequence[Row], curves: Mapping[str, Curve]) -> Plot:
    """Loss on labels over trained tokens: one unit for every objective."""
    drawn = {name: one for name, one in curves.items() if one.label_loss}
    series = tuple(
        Series(name=name, points=one.label_loss, look=looks(rows)[name], line=True, marks=False)
        for name, one in drawn.items()
    )
    top = _top_after_the_beginning([one.label_loss for one in drawn.values()])
    caption = (
        "Mean -log q(next token) of the student in nats, over the tokens it was trained on (steps "
        "times tokens a step). It is measured on the training text, with every objective alike, so "
        f"these curves compare. {_averaged(drawn.values())}"
    )
    if top is not None:
        caption += (
            f" Of the first {_BEGINNING:.0%} of the training, what is higher than the rest is cut "
            "off."
        )
    missing = [row["name"] for row in students_of(rows) if row["name"] not in drawn]
    caption += left_out(missing, "no such loss in their metrics, trained by an older version")
    tokens = Axis("trained tokens", form="short", low=0.0, high=_last(drawn.values()))
    nats = Axis("loss on labels, nats", high=top)
    told = "; ".join(f"{name}: {_course(one.label_loss)}" for name, one in drawn.items())
    chart = Chart(label=f"Learning curves, in nats. {told}", x=tokens, y=nats, series=series)
    return Plot(
        title="Learning curves",
        caption=caption,
        panels=(Panel(chart=chart),) if series else (),
    )


def objectives(rows: Sequence[Row], curves: Mapping[str, Curve]) -> Plot:
    """What each student minimised, on axes of its own."""
    panels = []
    for name, one in curves.items():
        line = Series(
            name=name, points=one.objective, look=looks(rows)[name], line=True, marks=False
        )
        top = _top_after_the_beginning([one.objective])
        chart = Chart(
            label=f"Objective of {name} ({one.asked}): {_course(one.objective)}",
            x=Axis("trained tokens", form="short", low=0.0, high=_last([one])),
            y=Axis("objective", high=top),
            series=(line,),
            names="none",
        )
        panels.append(Panel(name=name, detail=one.asked, chart=chart))
    caption = (
        "What each student minimised, over trained tokens: the weighted sum of its losses, in nats "
        f"a position. Its axis is its own: objectives do not compare. {_averaged(curves.values())}"
        " A steep beginning is cut off as above."
    )
    missing = [row["name"] for row in students_of(rows) if row["name"] not in curves]
    return Plot(
        title="Each student's own objective",
        caption=caption + left_out(missing, "no metrics are there"),
        panels=tuple(panels),
    )


def _top_after_the_beginning(curves: Sequence[Any]) -> float | None:
    """Where the vertical axis ends, if the first steps would press all others together."""
    values = [y for points in curves for _, y in points if math.isfinite(y)]
    later = [
        y
        for points in curves
        for x, y in points
        if math.isfinite(y) and x >= _BEGINNING * points[-1][0]
    ]
    if not later:
        return None
    free = 0.1 * (max(later) - min(later))
    top = max(later) + free
    return top if free and max(values) - min(values) > 1.5 * (top - min(values)) else None


def _last(curves: Iterable[Curve]) -> float | None:
    """How many tokens the longest of these trainings took."""
    ends = [points[-1][0] for one in curves for points in (one.label_loss, one.objective) if points]
    return max((end for end in ends if end), default=None)


def _averaged(curves: Any) -> str:
    """How much was smoothed, without being asked."""
    most = max((one.lines for one in curves), default=1)
    each = "A point is the mean over all steps since the one before"
    if most == 1:
        return f"{each}, as metrics.jsonl has it; nothing is smoothed."
    return (
        f"A point is the plain mean of up to {most} neighbouring lines of metrics.jsonl, each of "
        "which counts once; nothing else is smoothed."
    )


def _course(points: Any) -> str:
    if not points:
        return "nothing"
    (_, first), (tokens, last) = points[0], points[-1]
    return f"from {first:.3f} to {last:.3f} after {short(tokens)} tokens"
