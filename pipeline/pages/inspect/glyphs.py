"""Drawing with characters: blocks where the terminal has them, plain ASCII where it does not."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

COLUMNS = 100
"""No line is wider."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Glyphs:
    """One way to draw."""

    bars: str
    """From nothing to a full cell."""
    space: str
    newline: str
    tab: str
    quote: str
    """Around a token."""
    rule: str
    times: str
    mark: str
    """Before the token that came next."""

    def visible(self, text: str) -> str:
        """A token with its blanks and line ends seen."""
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
    """The glyphs that an output can carry."""
    try:
        (BLOCKS.bars + BLOCKS.space + BLOCKS.newline + BLOCKS.tab).encode(encoding or "ascii")
    except (UnicodeError, LookupError):
        return ASCII
    return BLOCKS


def histogram(counts: Sequence[int], glyphs: Glyphs, *, height: int, width: int = 2) -> list[str]:
    """Lines of equal width, the topmost first; `width` columns a bar.

    Whatever counts anything is seen.
    """
    steps = len(glyphs.bars) - 1
    most = max(1, *counts) if counts else 1
    levels = [-(-count * height * steps // most) for count in counts]
    return [
        "".join(glyphs.bars[min(steps, max(0, n - row * steps))] * width for n in levels)
        for row in reversed(range(height))
    ]


def cell(text: str, width: int) -> str:
    """Text in a column of that width: filled up, or clipped."""
    text = clip(text, width)
    return text + " " * (width - display_width(text))


def clip(text: str, width: int) -> str:
    """Text of at most that width; what is cut off is three dots."""
    if display_width(text) <= width:
        return text
    kept = ""
    for letter in text:
        if display_width(kept + letter) > width - 3:
            break
        kept += letter
    return kept + "..."


def display_width(text: str) -> int:
    """How many columns of a terminal a text takes: wide characters two, combining ones none."""
    return sum(_columns(letter) for letter in text)


def _columns(letter: str) -> int:
    if unicodedata.combining(letter) or unicodedata.category(letter) in ("Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(letter) in "WF" else 1


def flow(items: Sequence[str], indent: str, first: str = "") -> list[str]:
    """Items two blanks apart, in as many lines as they need; `first` stands before the first."""
    lines: list[str] = []
    line = first or indent
    for item in items:
        gap = "" if line in (first, indent) else "  "
        if gap and display_width(line + gap + item) > COLUMNS:
            lines.append(line)
            line, gap = indent, ""
        line += gap + item
    return [*lines, line]
