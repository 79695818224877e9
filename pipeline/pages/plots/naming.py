"""Places for names beside points: no name covers a point, a line or another name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...units import display_width

if TYPE_CHECKING:
    from collections.abc import Sequence

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
    """A rectangle in pixels."""

    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: Box) -> bool:
        """Whether the two overlap."""
        across = min(self.right, other.right) - max(self.left, other.left)
        return across > 0 and min(self.bottom, other.bottom) > max(self.top, other.top)

    def inside(self, other: Box) -> bool:
        """Whether the other box contains this one."""
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
    """Estimated width in pixels."""
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
