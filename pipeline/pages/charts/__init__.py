"""Plots as SVG: frozen dataclasses in, a string out. Nothing is drawn by a script.

    from .charts import STYLE, Axis, Chart, Series, draw

    line = Series(name="small", points=((0, 3.2), (1, 2.8)), look=0, line=True, marks=False)
    draw(Chart(label="Loss by step", x=Axis("steps"), y=Axis("nats"), series=(line,)))

A page holds `STYLE` once; colours follow the reader's light or dark theme. Whatever a name holds,
it is text. A point with a coordinate that is None or no finite number is left out, and a line is
broken there.
"""

from __future__ import annotations

from .drawing import STYLE, draw, draw_named
from .figure import Axis, Bars, Chart, Level, Series
from .looks import swatch
from .markup import Markup, element, joined
from .scale import short

__all__ = [
    "STYLE", "Axis", "Bars", "Chart", "Level", "Markup", "Series", "draw", "draw_named",
    "element", "joined", "short", "swatch",
]  # fmt: skip
