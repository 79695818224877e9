"""Where names go: how wide a text is, and places in which none covers another."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

SIZE = 12
"""Of all text, in pixels."""
_NARROW, _BROAD = frozenset("fijlrtI.,:;'|!()[]/- "), frozenset("mwMW@%&")
_DOTS = "\u2026"


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle on the picture."""

    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: Box) -> float:
        """The area that both cover."""
        wide = min(self.right, other.right) - max(self.left, other.left)
        tall = min(self.bottom, other.bottom) - max(self.top, other.top)
        return wide * tall if wide > 0 and tall > 0 else 0.0

    def inside(self, other: Box) -> bool:
        """Whether all of it lies in the other."""
        return (
            self.left >= other.left
            and self.right <= other.right
            and self.top >= other.top
            and self.bottom <= other.bottom
        )


@dataclass(frozen=True, slots=True)
class Placed:
    """A name beside its point."""

    text: str
    x: float
    y: float
    """Of the baseline."""
    anchor: str
    far: bool
    """Whether a thin line should lead to it."""


def text_width(text: str) -> float:
    """About so many pixels in any sans-serif face, rather more than fewer."""
    return sum(_width(letter) for letter in text) * SIZE


def _width(letter: str) -> float:
    if letter in _NARROW:
        return 0.36
    if letter in _BROAD or unicodedata.east_asian_width(letter) in "WF":
        return 1.0
    return 0.72 if letter.isupper() else 0.6


def clipped(text: str, width: float) -> str:
    """The text, or as much of its ends as fits: of RUN/NAME both say something."""
    if text_width(text) <= width:
        return text
    kept = len(text)
    while kept > 2:
        kept -= 1
        tail = -(-kept // 2)
        short = text[: kept - tail] + _DOTS + text[-tail:]
        if text_width(short) <= width:
            return short
    return text[:1] + _DOTS


def spread(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places moved apart to be `gap` from one another, between `low` and `high`, in their order.

    Where there is no room for that they are spread evenly.
    """
    count = len(places)
    if not count:
        return []
    gap = min(gap, (high - low) / max(1, count - 1))
    order = sorted(range(count), key=lambda i: places[i])
    moved: list[float] = []
    for rank, i in enumerate(order):
        least = moved[-1] + gap if moved else low
        # never so low that those behind it have no room left
        moved.append(min(max(places[i], least), high - gap * (count - 1 - rank)))
    found = dict(zip(order, moved, strict=True))
    return [found[i] for i in range(count)]


def beside_points(
    names: Sequence[str],
    points: Sequence[tuple[float, float]],
    frame: Box,
    taken: Sequence[Box] = (),
    radius: float = 6.0,
) -> list[Placed | None]:
    """A place for every name beside its point, the first ones first; None where there is no room.

    frame  what no name may leave
    taken  what no name may cover, besides points and other names
    """
    marks = [Box(x - radius, y - radius, x + radius, y + radius) for x, y in points]
    placed: list[Placed | None] = []
    covered = list(taken)
    for i, (name, (x, y)) in enumerate(zip(names, points, strict=True)):
        others = [*covered, *(mark for j, mark in enumerate(marks) if j != i)]
        found = _free_place(name, x, y, frame, others)
        placed.append(None if found is None else found[0])
        if found is not None:
            covered.append(found[1])
    return placed


def _free_place(
    name: str, x: float, y: float, frame: Box, others: Sequence[Box]
) -> tuple[Placed, Box] | None:
    wide = text_width(name)
    for distance in (9.0, 18.0, 30.0, 44.0):
        for across, down in (
            (1, 0), (-1, 0), (0, -1), (0, 1), (1, -1), (1, 1), (-1, -1), (-1, 1),
        ):  # fmt: skip
            diagonal = 0.75 if across and down else 1.0
            middle_x, middle_y = x + across * distance * diagonal, y + down * distance * diagonal
            left = middle_x - (0.5 - 0.5 * across) * wide
            box = Box(left, middle_y - 0.55 * SIZE, left + wide, middle_y + 0.55 * SIZE)
            if box.inside(frame) and not any(box.overlap(other) for other in others):
                anchor = {1: "start", 0: "middle", -1: "end"}[across]
                far = distance > 18.0
                return Placed(name, middle_x, middle_y + 0.35 * SIZE, anchor, far), box
    return None
