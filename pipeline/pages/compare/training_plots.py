"""Plots of training: learning curves and objectives."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ...results.figures import students_of
from ...units import short
from ..plots.chart import Axis, Chart, Series
from .plot import Panel, Plot, left_out, looks

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from ...results.curves import Curve, Points
    from ...results.figures import ModelFigures

_BEGINNING = 0.1
"""Share of a training whose steep fall may be cut off, so that later differences are visible."""


def learning_curves(rows: Sequence[ModelFigures], curves: Mapping[str, Curve]) -> Plot:
    """Loss on labels against trained tokens, which compares between objectives."""
    drawn = {name: one for name, one in curves.items() if one.label_loss}
    series = tuple(
        Series(name=name, points=one.label_loss, look=looks(rows)[name], line=True, marks=False)
        for name, one in drawn.items()
    )
    top = _top_after_the_beginning([one.label_loss for one in drawn.values()])
    caption = (
        "Mean -log q(next token) of the student in nats, against the tokens it was trained on "
        "(steps times tokens a step). It is measured on the training text, in the same way for "
        f"every objective, so these curves compare. {_averaged(drawn.values())}"
    )
    if top is not None:
        caption += (
            f" In the first {_BEGINNING:.0%} of the training, values above the rest are cut off."
        )
    missing = [row.name for row in students_of(rows) if row.name not in drawn]
    caption += left_out(missing, "their metrics lack this loss, as an older version trained them")
    tokens = Axis("trained tokens", form="short", low=0.0, high=_last(drawn.values()))
    nats = Axis("loss on labels, nats", high=top)
    courses = "; ".join(f"{name}: {_course(one.label_loss)}" for name, one in drawn.items())
    chart = Chart(label=f"Learning curves, in nats. {courses}", x=tokens, y=nats, series=series)
    return Plot(
        title="Learning curves",
        caption=caption,
        panels=(Panel(chart=chart),) if series else (),
    )


def objectives(rows: Sequence[ModelFigures], curves: Mapping[str, Curve]) -> Plot:
    """The value that each student minimised, on its own axes."""
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
            named=False,
        )
        panels.append(Panel(name=name, detail=one.asked, chart=chart))
    caption = (
        "The value that each student minimised, against trained tokens: the weighted sum of its "
        "losses, in nats a position. Each plot has its own axis, as objectives do not compare. "
        f"{_averaged(curves.values())}"
        " A steep beginning is cut off as above."
    )
    missing = [row.name for row in students_of(rows) if row.name not in curves]
    return Plot(
        title="Each student's own objective",
        caption=caption + left_out(missing, "no metrics"),
        panels=tuple(panels),
    )


def _top_after_the_beginning(curves: Sequence[Points]) -> float | None:
    """End of the vertical axis if the first steps would hide the rest; None otherwise."""
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
    """Tokens of the longest of these trainings."""
    ends = [points[-1][0] for one in curves for points in (one.label_loss, one.objective) if points]
    return max((end for end in ends if end), default=None)


def _averaged(curves: Iterable[Curve]) -> str:
    """A sentence on how many lines of metrics a point is the mean of."""
    most = max((one.lines for one in curves), default=1)
    if most == 1:
        return (
            "A point is the mean over all steps since the previous one, as in metrics.jsonl; "
            "nothing is smoothed."
        )
    return (
        f"A point is the plain mean of up to {most} neighbouring lines of metrics.jsonl; nothing "
        "else is smoothed."
    )


def _course(points: Points) -> str:
    if not points:
        return "nothing"
    (_, first), (tokens, last) = points[0], points[-1]
    return f"from {first:.3f} to {last:.3f} after {short(tokens)} tokens"
