"""Colours, marks and dashes that tell models apart. Colours repeat after six, the pairs later."""

from __future__ import annotations

import math

COLOURS = 6
"""Colours in `plots.css`; they stay apart for colour-blind readers in both themes."""
_DASHES = ((), (7, 3.5), (2, 2.5), (9, 3, 2, 3))
_REFERENCE = "var(--chart-soft)"


def _polygon(corners: int, turn: float = 0.0, inner: float = 1.0, radius: float = 1.0) -> str:
    """SVG path of a regular polygon around 0; `inner` < 1 makes a star of it."""
    places = []
    for corner in range(corners):
        angle = math.radians(turn + 360 * corner / corners - 90)
        away = radius * (inner if corner % 2 and inner < 1 else 1.0)
        places.append(f"{away * math.cos(angle):.3f},{away * math.sin(angle):.3f}")
    return f"M{'L'.join(places)}Z"


_MARKS = (
    "M-.9,0A.9,.9,0,1,1,.9,0A.9,.9,0,1,1,-.9,0Z",
    _polygon(4, 45, radius=1.15),
    _polygon(4, radius=1.25),
    _polygon(3, radius=1.3),
    _polygon(3, 180, radius=1.3),
    _polygon(5, radius=1.1),
)
_STAR = _polygon(10, inner=0.5, radius=1.3)


def colour(look: int | None) -> str:
    """CSS colour of a series."""
    return _REFERENCE if look is None else f"var(--c{look % COLOURS})"


def dashes(look: int | None) -> tuple[float, ...]:
    """Dash pattern of a line; empty for a solid line."""
    return (4, 3) if look is None else _DASHES[look // COLOURS % len(_DASHES)]


def mark(look: int | None, hollow: int | None = None) -> str:
    """SVG path of a mark, about 2 units wide; `hollow` names another outline to use instead."""
    if hollow is not None:
        return _MARKS[hollow % len(_MARKS)]
    # each round of colours uses the next mark, so that no pair comes twice
    return _STAR if look is None else _MARKS[(look + look // COLOURS) % len(_MARKS)]
