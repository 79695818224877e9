"""How series are told apart: by colour, and by mark and dashes where colours come round again."""

from __future__ import annotations

import math

from .markup import Markup, element, number

COLOURS = 6
"""`--c0` to `--c5` of the style: apart from one another for colour-blind eyes too, in both themes.
What is more than that has other marks and other dashes."""
_DASHES = (None, "7 3.5", "2 2.5", "9 3 2 3")
_REFERENCE = "reference"


def look_class(look: int | None) -> str:
    """The class that gives a series its colour."""
    return _REFERENCE if look is None else f"c{look % COLOURS}"


def dashes(look: int | None) -> str | None:
    """The pattern of its line."""
    return "4 3" if look is None else _DASHES[look // COLOURS % len(_DASHES)]


def mark(
    look: int | None, x: float, y: float, radius: float = 4.5, hollow: int | None = None
) -> Markup:
    """Its mark at a place.

    hollow  the number of another mark, of which only the outline is drawn; larger, so that it is
            seen around a full one
    """
    if hollow is not None:
        return _shape(hollow % COLOURS, x, y, radius * 1.3, "mark hollow")
    if look is None:
        return _polygon(x, y, radius * 1.35, 10, "mark", inner=0.5)
    # another shape with each colour, and again another when the colour comes round
    return _shape((look + look // COLOURS) % COLOURS, x, y, radius, "mark")


def _shape(shape: int, x: float, y: float, radius: float, kind: str) -> Markup:
    if shape == 0:
        return element("circle", cls=kind, cx=x, cy=y, r=radius)
    corners, turn, grow = ((4, 45, 1.25), (4, 0, 1.3), (3, 0, 1.4), (3, 180, 1.4), (5, 0, 1.2))[
        shape - 1
    ]
    return _polygon(x, y, radius * grow, corners, kind, turn)


def _polygon(
    x: float,
    y: float,
    radius: float,
    corners: int,
    kind: str,
    turn: float = 0.0,
    inner: float = 1.0,
) -> Markup:
    """Regular, the first corner upwards; every second one nearer to the middle for a star."""
    places = []
    for corner in range(corners):
        angle = math.radians(turn + 360 * corner / corners - 90)
        away = radius * (inner if corner % 2 and inner < 1 else 1.0)
        places.append(f"{number(x + away * math.cos(angle))},{number(y + away * math.sin(angle))}")
    return element("polygon", cls=kind, points=" ".join(places))


def swatch(
    look: int | None, x: float, y: float, *, line: bool, marks: bool, hollow: int | None = None
) -> Markup:
    """A sample of a series for a legend, 22 pixels wide, around the height `y`."""
    parts = []
    if line:
        dash = dashes(look)
        parts.append(
            element("line", cls="line", x1=x, x2=x + 22, y1=y, y2=y, stroke_dasharray=dash)
        )
    if marks or not line:
        parts.append(mark(look, x + 11, y, hollow=hollow))
    return element("g", *parts, cls=look_class(look))
