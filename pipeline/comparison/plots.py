"""The plots of a comparison: what is drawn, in which unit, and what has to be left out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..charts import Axis, Bars, Chart, Level, Series, short
from ..compare import CACHED_BYTES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ..compare import Row
    from .curves import Curve

_BEGINNING = 0.1
"""Share of a training whose steep fall may be cut off, so that the rest can be told apart."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One picture of a plot."""

    name: str = ""
    detail: str = ""
    chart: Chart


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """One section of the page."""

    title: str
    caption: str
    panels: tuple[Panel, ...]
    """One, or a small one for each model; none where nothing is known."""


def looks(rows: Sequence[Row]) -> dict[str, int | None]:
    """Each model's colour and mark, the same in every plot; None for teachers."""
    students = [row["name"] for row in rows if row["role"] != "teacher"]
    numbers: dict[str, int | None] = {name: number for number, name in enumerate(students)}
    return {row["name"]: numbers.get(row["name"]) for row in rows}


def make_plots(rows: Sequence[Row], curves: Mapping[str, Curve]) -> list[Plot]:
    """All plots, in the order of the page."""
    shown = {row["name"]: curves[row["name"]] for row in rows if row["name"] in curves}
    return [
        learning_curves(rows, shown),
        loss_against_size(rows),
        loss_against_bytes(rows),
        calibration(rows),
        objectives(rows, shown),
    ]


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
    missing = [row["name"] for row in _students(rows) if row["name"] not in drawn]
    caption += _left_out(missing, "no such loss in their metrics, trained by an older version")
    axes = (Axis("trained tokens", form="short", low=0.0), Axis("loss on labels, nats", high=top))
    told = "; ".join(f"{name}: {_course(one.label_loss)}" for name, one in drawn.items())
    chart = Chart(label=f"Learning curves, in nats. {told}", x=axes[0], y=axes[1], series=series)
    return Plot(
        title="Learning curves",
        caption=caption,
        panels=(Panel(chart=chart),) if series else (),
    )


def loss_against_size(rows: Sequence[Row]) -> Plot:
    """Held-out loss over parameters, teachers included."""
    series = tuple(
        _point(row, row["parameters"], looks(rows), f"{row['parameters']:,} parameters")
        for row in rows
    )
    chart = Chart(
        label=f"Held-out loss in nats against parameters. {_told(series)}",
        x=Axis("parameters", scale="auto", form="short"),
        y=Axis("held-out loss, nats"),
        series=series,
    )
    return Plot(
        title="Loss against size",
        caption="Mean -log q(next token) in nats on held-out text, over the number of parameters, "
        "embeddings included. The star is the teacher.",
        panels=(Panel(chart=chart),),
    )


def loss_against_bytes(rows: Sequence[Row]) -> Plot:
    """Held-out loss over what was cached; the teachers' own losses are lines to compare with."""
    known = [row for row in _students(rows) if row.get(CACHED_BYTES) is not None]
    series = tuple(
        _point(row, row[CACHED_BYTES], looks(rows), f"{row[CACHED_BYTES]:.1f} bytes a position")
        for row in known
    )
    teachers = [row for row in rows if row["role"] == "teacher"]
    levels = tuple(Level(row["name"], row["loss"]) for row in teachers)
    none_is_free = all(row[CACHED_BYTES] > 0 for row in known)
    chart = Chart(
        label=f"Held-out loss in nats against bytes cached a position. {_told(series)}",
        x=Axis("bytes cached a position", scale="auto", low=None if none_is_free else 0.0),
        y=Axis("held-out loss, nats"),
        series=series,
        levels=levels,
    )
    missing = [row["name"] for row in _students(rows) if row.get(CACHED_BYTES) is None]
    caption = (
        "Mean -log q(next token) in nats on held-out text, over the bytes that the stores a "
        "student was trained from take a supervised position, tokens included. 0 where it listens "
        "to no teacher. The dashed line is the teacher's own loss."
    )
    why = "the size of their store was not recorded, or the store was gone when they were evaluated"
    return Plot(
        title="Loss against bytes cached",
        caption=caption + _left_out(missing, why),
        panels=(Panel(chart=chart),) if series else (),
    )


def calibration(rows: Sequence[Row]) -> Plot:
    """A reliability diagram for each student, beside its teacher's."""
    known = [row for row in _students(rows) if row.get("calibration")]
    teachers = [row for row in rows if row["role"] == "teacher" and row.get("calibration")]
    panels = []
    for row in known:
        own = [one for one in teachers if one.get("heldout") == row.get("heldout")]
        series = (_reliability(row, looks(rows)), *(_reliability(o, looks(rows)) for o in own[:1]))
        ece = f"ECE {row['ece']:.1%}"
        counts = [one["count"] for one in row["calibration"]]
        chart = Chart(
            label=f"Calibration of {row['name']}: {ece}. {_worst_bin(row)}",
            x=Axis("confidence", form="percent", low=0.0, high=1.0),
            y=Axis("accuracy", form="percent", low=0.0, high=1.0),
            series=series,
            diagonal=True,
            bars=Bars(
                edges=tuple(i / len(counts) for i in range(len(counts) + 1)),
                shares=tuple(count / max(1, sum(counts)) for count in counts),
            ),
            names="none",
        )
        panels.append(Panel(name=row["name"], detail=ece, chart=chart))
    missing = [row["name"] for row in _students(rows) if row not in known]
    caption = (
        "How often the most probable token is right (accuracy), over the probability it is given "
        "(confidence), in bins of equal width. On the diagonal a model is as sure as it should be, "
        "below it surer. Bars: the share of held-out positions in each bin, the tallest a quarter "
        "of the picture. Grey: the teacher. ECE is the mean distance from the diagonal, by share."
    )
    why = "figures of an older version; coldstill evaluate measures them anew"
    return Plot(
        title="Calibration", caption=caption + _left_out(missing, why), panels=tuple(panels)
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
            x=Axis("trained tokens", form="short", low=0.0),
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
    missing = [row["name"] for row in _students(rows) if row["name"] not in curves]
    return Plot(
        title="Each student's own objective",
        caption=caption + _left_out(missing, "no metrics are there"),
        panels=tuple(panels),
    )


def _students(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["role"] != "teacher"]


def _point(row: Row, x: float, look: Mapping[str, int | None], what: str) -> Series:
    note = f"{row['name']}: {what}, loss {row['loss']:.4f}"
    return Series(
        name=row["name"], points=((x, row["loss"]),), look=look[row["name"]], notes=(note,)
    )


def _reliability(row: Row, look: Mapping[str, int | None]) -> Series:
    bins = row["calibration"]
    return Series(
        name=row["name"],
        points=tuple((one["confidence"], one["accuracy"]) for one in bins if one["count"]),
        look=look[row["name"]],
        line=True,
        marks=row["role"] != "teacher",
        notes=tuple(
            f"{row['name']}: confidence {one['confidence']:.1%}, accuracy {one['accuracy']:.1%}, "
            f"{one['count']:,} positions"
            for one in bins
            if one["count"]
        ),
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


def _told(series: Sequence[Series]) -> str:
    return "; ".join(note for one in series for note in one.notes)


def _worst_bin(row: Row) -> str:
    bins = [one for one in row["calibration"] if one["count"]]
    if not bins:
        return ""
    total = sum(one["count"] for one in bins)
    worst = max(bins, key=lambda b: abs(b["accuracy"] - b["confidence"]) * b["count"] / total)
    return (
        f"What adds most to it: at confidence {worst['confidence']:.0%} the accuracy is "
        f"{worst['accuracy']:.0%}."
    )


def _left_out(names: Sequence[str], why: str) -> str:
    return f" Left out: {', '.join(names)} ({why})." if names else ""
