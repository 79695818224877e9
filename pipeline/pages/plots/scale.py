"""The range of an axis, and where a value lies on it in pixels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...results.names import visible

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .chart import Axis

_LARGEST, _SMALLEST = 1e300, 1e-300
"""Beyond these the arithmetic of an axis overflows."""
_PAD = 0.06
"""Share of the span that is left free on both sides."""
_FORMATS = {"plain": None, "short": "~s", "percent": "~%"}
_TICK = {"width": 80, "height": 40}
"""Pixels that a tick needs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """A linear or logarithmic axis from `low` to `high` over `pixels`."""

    axis: Axis
    low: float
    high: float
    log: bool
    pixels: float
    upwards: bool
    """Whether values grow from the bottom to the top."""

    def place(self, value: float) -> float:
        """The place of a value in pixels."""
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        share = (value - low) / (high - low)
        return self.pixels * (1 - share if self.upwards else share)

    def encoding(self, field: str) -> dict[str, Any]:
        """The Vega-Lite encoding of a field on this axis."""
        side = "height" if self.upwards else "width"
        axis = {
            "title": visible(self.axis.title),
            "format": _FORMATS[self.axis.form],
            # d3 writes 0 with the letter of its neighbours
            "labelExpr": "datum.value === 0 && datum.label.length === 2 ? "
            "replace(datum.label, /[kMGT]/, '') : datum.label",
            "tickCount": max(2, int(self.pixels / _TICK[side])),
        }
        kind = "log" if self.log else "linear"
        return {
            "field": field,
            "type": "quantitative",
            "scale": {"type": kind, "domain": [self.low, self.high], "nice": False, "zero": False},
            "axis": axis,
        }


def drawable(value: float | None) -> float | None:
    """The value if it is a finite number of moderate size, or None."""
    if value is None or not math.isfinite(value) or abs(value) > _LARGEST:
        return None
    return 0.0 if abs(value) < _SMALLEST else float(value)


def scale_of(axis: Axis, values: Sequence[float], pixels: float, *, upwards: bool = False) -> Scale:
    """The scale of an axis that shows these drawable values."""
    known = [*values, *(end for end in (axis.low, axis.high) if end is not None)] or [0.0, 1.0]
    least, most = min(known), max(known)
    log = axis.scale == "auto" and least > 0 and most >= 10 * least
    low, high = _padded(least, most, log)
    low = low if axis.low is None else axis.low
    high = high if axis.high is None or axis.high <= low else axis.high
    return Scale(axis=axis, low=low, high=high, log=log, pixels=pixels, upwards=upwards)


def _padded(least: float, most: float, log: bool) -> tuple[float, float]:
    if log:
        factor = max(1.25, 10 ** (_PAD * (math.log10(most) - math.log10(least))))
        return max(least / factor, _SMALLEST), min(most * factor, _LARGEST)
    span = most - least
    # values that differ only in their last digits are one value
    if span <= 1e-12 * max(abs(least), abs(most)):
        free = 0.1 * abs(least) or 1.0
        return least - free, most + free
    return least - _PAD * span, most + _PAD * span
