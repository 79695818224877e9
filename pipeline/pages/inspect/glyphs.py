"""Drawing with characters: block characters if the terminal has them, otherwise ASCII."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...units import display_width

if TYPE_CHECKING:
    from collections.abc import Sequence

COLUMNS = 100
"""Width of all text in columns."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Glyphs:
    """The characters of one way to draw."""

    bars: str
    """Bars from empty to full."""
    space: str
    newline: str
    tab: str
    quote: str
    """Around a token."""
    rule: str
    times: str
    mark: str
    """Before the actual next token."""

    def visible(self, text: str) -> str:
        """Return a token with visible blanks and line ends."""
        marks = {" ": self.space, "\n": self.newline, "\t": self.tab}
        text = "".join(marks.get(letter, letter) for letter in text)
        if self is ASCII:
            text = text.encode("ascii", "backslashreplace").decode()
        return f"{self.quote}{text}{self.quote}"


BLOCKS = Glyphs(
    bars=" \u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588",
    space="\u00b7",
    newline="\u21b5",
    tab="\u21e5",
    quote="",
    rule="\u2500",
    times="\u00d7",
    mark="\u25b8",
)
ASCII = Glyphs(
    bars=" .:#", space=" ", newline="\\n", tab="\\t", quote='"', rule="-", times="x", mark="=>"
)


def glyphs_for(encoding: str | None) -> Glyphs:
    """Return the characters that an output with this encoding can show."""
    try:
        (BLOCKS.bars + BLOCKS.space + BLOCKS.newline + BLOCKS.tab).encode(encoding or "ascii")
    except (UnicodeError, LookupError):
        return ASCII
    return BLOCKS


def histogram(counts: Sequence[int], glyphs: Glyphs, *, height: int, width: int = 2) -> list[str]:
    """Return lines of equal width, the top line first; each bar is `width` columns wide.

    A count above 0 is always visible.
    """
    steps = len(glyphs.bars) - 1
    most = max(1, *counts) if counts else 1
    levels = [-(-count * height * steps // most) for count in counts]
    return [
        "".join(glyphs.bars[min(steps, max(0, n - row * steps))] * width for n in levels)
        for row in reversed(range(height))
    ]


def cell(text: str, width: int) -> str:
    """Return text padded or clipped to a width."""
    text = clip(text, width)
    return text + " " * (width - display_width(text))


def clip(text: str, width: int) -> str:
    """Return text of at most this width; three dots stand for the rest."""
    if display_width(text) <= width:
        return text
    kept = ""
    for letter in text:
        if display_width(kept + letter) > width - 3:
            break
        kept += letter
    return kept + "..."


def flow(items: Sequence[str], indent: str, first: str = "") -> list[str]:
    """Return items two blanks apart in lines of `COLUMNS`; `first` is before the first item."""
    lines: list[str] = []
    line = first or indent
    for item in items:
        gap = "" if line in (first, indent) else "  "
        if gap and display_width(line + gap + item) > COLUMNS:
            lines.append(line)
            line, gap = indent, ""
        line += gap + item
    return [*lines, line]
