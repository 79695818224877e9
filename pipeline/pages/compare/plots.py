"""The plots of a comparison: what is drawn, in which unit, and what has to be left out."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

from ...results.figures import students_of, teachers_of
from ...units import short
from ..plots.chart import Axis, Bar, Chart, Level, Series
from .panels import CACHED, LOSS, PARAMETERS, Panel, Plot, against, left_out, looks

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from ...results.curves import Curve, Points
    from ...results.figures import CalibrationBin, ModelFigures


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
        title="Learning curves", caption=caption, panels=(Panel(chart=chart),) if series else ()
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


_FEW = 20
"""Positions that a bin of calibration needs to be drawn."""


def make_plots(rows: Sequence[ModelFigures], curves: Mapping[str, Curve]) -> list[Plot]:
    shown = {row.name: curves[row.name] for row in rows if row.name in curves}
    return [
        learning_curves(rows, shown),
        loss_against_size(rows),
        loss_against_bytes(rows),
        calibration(rows),
        objectives(rows, shown),
    ]


def loss_against_size(rows: Sequence[ModelFigures]) -> Plot:
    """Held-out loss against parameters, teachers included."""
    return Plot(
        title="Loss against size",
        caption="Mean -log q(next token) in nats on held-out text, against the number of "
        "parameters, embeddings included. The star is the teacher.",
        panels=(Panel(chart=against(rows, PARAMETERS, LOSS, rows)),),
    )


def loss_against_bytes(rows: Sequence[ModelFigures]) -> Plot:
    """Held-out loss against stored bytes; the losses of the teachers are lines."""
    students = students_of(rows)
    chart = against(students, CACHED, LOSS, rows)
    alike: dict[float, list[str]] = {}
    for row in teachers_of(rows):
        if row.loss is not None:
            alike.setdefault(row.loss, []).append(row.name)
    levels = tuple(Level(", ".join(names), loss) for loss, names in alike.items())
    missing = [row.name for row in students if row.cached_bytes_per_position is None]
    caption = (
        "Mean -log q(next token) in nats on held-out text, against the bytes that each supervised "
        "position takes in the stores a student was trained from, tokens included. 0 where it "
        "learns from no teacher. The dashed line is the teacher's own loss."
    )
    why = "the size of their store was not recorded, or the store was gone when they were evaluated"
    return Plot(
        title="Loss against stored bytes",
        caption=caption + left_out(missing, why),
        panels=(Panel(chart=dataclasses.replace(chart, levels=levels)),) if chart.series else (),
    )


def calibration(rows: Sequence[ModelFigures]) -> Plot:
    """A reliability diagram for each student, beside its teacher's."""
    known = [row for row in students_of(rows) if row.calibration]
    teachers = [row for row in teachers_of(rows) if row.calibration]
    panels = []
    for row in known:
        own = [one for one in teachers if one.heldout == row.heldout]
        ece = f"ECE {row.ece:.1%}"
        chart = Chart(
            label=f"Calibration of {row.name}: {ece}. {_worst_bin(row)}",
            x=Axis("confidence", form="percent", low=0.0, high=1.0),
            y=Axis("accuracy", form="percent", low=0.0, high=1.0),
            series=tuple(_reliability(one, looks(rows)) for one in (row, *own[:1])),
            diagonal=True,
            bars=_bars([one.count for one in row.calibration]),
            named=False,
        )
        panels.append(Panel(name=row.name, detail=ece, chart=chart))
    missing = [row.name for row in students_of(rows) if row not in known]
    caption = (
        "How often the most probable token is right (accuracy), against its probability "
        "(confidence), in bins of equal width. On the diagonal a model is as sure as it should be, "
        "below it too sure. Bars: the share of held-out positions in each bin, the tallest a "
        "quarter of the picture. Grey: the teacher. ECE is the mean distance from the diagonal, "
        f"weighted by share. Bins with fewer than {_FEW} positions, or a hundredth of all if that "
        "is less, are too noisy to draw; they count in the ECE."
    )
    why = "figures of an older version; coldstill evaluate measures them again"
    return Plot(title="Calibration", caption=caption + left_out(missing, why), panels=tuple(panels))


def _bars(counts: Sequence[int]) -> tuple[Bar, ...]:
    """Shares of positions for each bin, the tallest a quarter of the picture."""
    most = max(counts, default=0) or 1
    return tuple(
        Bar(i / len(counts), (i + 1) / len(counts), 0.25 * count / most)
        for i, count in enumerate(counts)
    )


def _reliability(row: ModelFigures, look: Mapping[str, int | None]) -> Series:
    bins = _certain_bins(row)
    return Series(
        name=row.name,
        points=tuple((one.confidence, one.accuracy) for one in bins),
        look=look[row.name],
        line=True,
        marks=row.role != "teacher",
        notes=tuple(
            f"{row.name}: confidence {one.confidence:.1%}, accuracy {one.accuracy:.1%}, "
            f"{one.count:,} positions"
            for one in bins
        ),
    )


def _certain_bins(row: ModelFigures) -> list[CalibrationBin]:
    """The bins with enough positions for their accuracy to be drawn."""
    few = min(_FEW, sum(one.count for one in row.calibration) / 100)
    return [one for one in row.calibration if one.count and one.count >= few]


def _worst_bin(row: ModelFigures) -> str:
    """The bin that adds most to the calibration error, in words."""
    worst = max(
        (one for one in row.calibration if one.count),
        key=lambda one: one.count * one.distance,
        default=None,
    )
    if worst is None:
        return ""
    return (
        f"Largest contribution: at confidence {worst.confidence:.0%} the accuracy is "
        f"{worst.accuracy:.0%}."
    )
