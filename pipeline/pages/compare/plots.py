"""The plots of a comparison: what is drawn, in which unit, and what has to be left out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...results.columns import CACHED_BYTES
from ..charts import Axis, Bars, Chart, Level, Series
from .plot import Panel, Plot, left_out, looks, students_of
from .trade_off import LOSS, PARAMETERS, against, point, told
from .training_plots import learning_curves, objectives

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ...results.columns import Row
    from ...results.curves import Curve

_FEW = 20
"""Positions that a bin of calibration needs to be drawn."""


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


def loss_against_size(rows: Sequence[Row]) -> Plot:
    """Held-out loss over parameters, teachers included."""
    return Plot(
        title="Loss against size",
        caption="Mean -log q(next token) in nats on held-out text, over the number of parameters, "
        "embeddings included. The star is the teacher.",
        panels=(Panel(chart=against(rows, PARAMETERS, LOSS)),),
    )


def loss_against_bytes(rows: Sequence[Row]) -> Plot:
    """Held-out loss over what was cached; the teachers' own losses are lines to compare with."""
    series = tuple(
        point(row, value, LOSS, rows, f"{value:.1f} bytes a position")
        for row in students_of(rows)
        if (value := row.get(CACHED_BYTES)) is not None
    )
    teachers = [row for row in rows if row["role"] == "teacher"]
    alike: dict[float, list[str]] = {}
    for row in teachers:
        alike.setdefault(row["loss"], []).append(row["name"])
    levels = tuple(Level(", ".join(names), loss) for loss, names in alike.items())
    chart = Chart(
        label=f"Held-out loss in nats against bytes cached a position. {told(series)}",
        x=Axis("bytes cached a position", scale="auto"),
        y=Axis("held-out loss, nats"),
        series=series,
        levels=levels,
    )
    missing = [row["name"] for row in students_of(rows) if row.get(CACHED_BYTES) is None]
    caption = (
        "Mean -log q(next token) in nats on held-out text, over the bytes that the stores a "
        "student was trained from take a supervised position, tokens included. 0 where it listens "
        "to no teacher. The dashed line is the teacher's own loss."
    )
    why = "the size of their store was not recorded, or the store was gone when they were evaluated"
    return Plot(
        title="Loss against bytes cached",
        caption=caption + left_out(missing, why),
        panels=(Panel(chart=chart),) if series else (),
    )


def calibration(rows: Sequence[Row]) -> Plot:
    """A reliability diagram for each student, beside its teacher's."""
    known = [row for row in students_of(rows) if row.get("calibration")]
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
    missing = [row["name"] for row in students_of(rows) if row not in known]
    caption = (
        "How often the most probable token is right (accuracy), over the probability it is given "
        "(confidence), in bins of equal width. On the diagonal a model is as sure as it should be, "
        "below it surer. Bars: the share of held-out positions in each bin, the tallest a quarter "
        "of the picture. Grey: the teacher. ECE is the mean distance from the diagonal, by share. "
        f"Of bins with fewer than {_FEW} positions, or a hundredth of all if that is less, the "
        "accuracy says little; it counts in the ECE and is not drawn."
    )
    why = "figures of an older version; coldstill evaluate measures them anew"
    return Plot(title="Calibration", caption=caption + left_out(missing, why), panels=tuple(panels))


def _reliability(row: Row, look: Mapping[str, int | None]) -> Series:
    bins = _certain_bins(row)
    return Series(
        name=row["name"],
        points=tuple((one["confidence"], one["accuracy"]) for one in bins),
        look=look[row["name"]],
        line=True,
        marks=row["role"] != "teacher",
        notes=tuple(
            f"{row['name']}: confidence {one['confidence']:.1%}, accuracy {one['accuracy']:.1%}, "
            f"{one['count']:,} positions"
            for one in bins
        ),
    )


def _certain_bins(row: Row) -> list[dict[str, Any]]:
    """The bins that hold enough positions for their accuracy to say something."""
    bins: list[dict[str, Any]] = row["calibration"]
    few = min(_FEW, sum(one["count"] for one in bins) / 100)
    return [one for one in bins if one["count"] and one["count"] >= few]


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
