"""Where values lie on an axis in pixels, and places for names: no name covers a point or a line."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...results.rows import visible
from ...units import display_width

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


SIZE = 12
"""Font size in pixels."""
_LETTER = 7.2
"""Pixels of a letter; a little more than the mean of a wide sans-serif font."""
_AROUND = ((1, 0), (-1, 0), (0, -1), (0, 1), (1, -1), (1, 1), (-1, -1), (-1, 1))
_OFFSETS = tuple((dx * far, dy * far) for far in (9.0, 18.0, 30.0) for dx, dy in _AROUND)
"""Pixels from a point to its name, in the order to try."""
_GAP = 14.0
"""Pixels between names one above the other."""


@dataclass(frozen=True, slots=True)
class Box:
    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: Box) -> bool:
        """Whether the two overlap."""
        across = min(self.right, other.right) - max(self.left, other.left)
        return across > 0 and min(self.bottom, other.bottom) > max(self.top, other.top)

    def inside(self, other: Box) -> bool:
        return (
            self.left >= other.left
            and self.right <= other.right
            and self.top >= other.top
            and self.bottom <= other.bottom
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Name:
    """A placed name; `x` and `y` are where its text is anchored, in pixels."""

    text: str
    x: float
    y: float
    align: str


def text_width(text: str) -> float:
    return _LETTER * display_width(text)


def clipped(text: str, width: float) -> str:
    """The text, cut in its middle if it is wider than `width` pixels: both ends carry meaning."""
    most = max(2, int(width / _LETTER))
    if display_width(text) <= most:
        return text
    tail = most // 2
    return f"{text[: most - tail - 1]}\u2026{text[-tail:]}"


def around(x: float, y: float, radius: float) -> Box:
    """The box of a mark."""
    return Box(x - radius, y - radius, x + radius, y + radius)


def spread(places: Sequence[float], low: float, high: float) -> list[float]:
    """Places moved apart between `low` and `high`, in their order; evenly where room is short."""
    gap = min(_GAP, (high - low) / max(1, len(places) - 1))
    order = sorted(range(len(places)), key=lambda i: places[i])
    downwards = _apart([places[i] - low for i in order], gap, high - low)
    upwards = _apart([high - places[i] for i in reversed(order)], gap, high - low)
    both = zip(order, downwards, reversed(upwards), strict=True)
    # the mean of the two keeps the gaps, and a crowd around its own middle
    moved = {i: (low + down + high - up) / 2 for i, down, up in both}
    return [moved[i] for i in range(len(places))]


def _apart(places: Sequence[float], gap: float, high: float) -> list[float]:
    """Ascending places between 0 and `high`, each moved only as far up as it must be."""
    found: list[float] = []
    for number, place in enumerate(places):
        least = found[-1] + gap if found else 0.0
        # never so high that those after it have no room left
        found.append(min(max(place, least), high - gap * (len(places) - 1 - number)))
    return found


def placed(
    names: Sequence[tuple[str, float, float]], frame: Box, taken: Sequence[Box]
) -> list[Name | None]:
    """A place for each name beside its point; None if there is no room.

    names  text and the place of its point, in pixels; the first ones are placed first
    frame  what no name may leave
    taken  what no name may cover, except the boxes around its own point
    """
    covered = list(taken)
    found: list[Name | None] = []
    for text, x, y in names:
        wide, half = text_width(text), 0.55 * SIZE
        others = [box for box in covered if not around(x, y, 0).inside(box)]
        found.append(None)
        for dx, dy in _OFFSETS:
            left = x + dx - (0 if dx > 0 else wide if dx < 0 else wide / 2)
            box = Box(left, y + dy - half, left + wide, y + dy + half)
            if box.inside(frame) and not any(box.meets(other) for other in others):
                align = "left" if dx > 0 else "right" if dx < 0 else "center"
                found[-1] = Name(text=text, x=x + dx, y=y + dy, align=align)
                covered.append(box)
                break
    return found
