"""Quantities as text, and the width of text."""

from __future__ import annotations

import unicodedata

_SUFFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def size(count: float) -> str:
    """Bytes in a unit that fits: `1.2 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def duration(seconds: float) -> str:
    """Seconds in the two largest units: `45 s`, `1 min 56 s`, `2 h 5 min`, `3 d 4 h`."""
    whole = max(0, round(seconds))
    for unit, above, below, smaller in (
        (86400, "d", "h", 3600),
        (3600, "h", "min", 60),
        (60, "min", "s", 1),
    ):
        if whole >= unit:
            rest = whole % unit // smaller
            return f"{whole // unit} {above} {rest} {below}" if rest else f"{whole // unit} {above}"
    return f"{whole} s"


def rate(count: float) -> str:
    """Units a second: whole numbers from 100 on, three digits below."""
    return f"{count:,.0f}" if count >= 100 else f"{count:.3g}"


def short(value: float) -> str:
    """Three digits and a letter: 926k, 1.5M."""
    for unit, letter in _SUFFIXES:
        # 999,600 is 1M, not 1000k
        if unit <= abs(value) * 1.0005 and abs(value) < 1000 * _SUFFIXES[0][0]:
            return f"{value / unit:.3g}{letter}"
    return f"{value:.3g}"


def counted(count: int, noun: str) -> str:
    """A count with its noun: `1 file`, `1,200 files`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def display_width(text: str) -> int:
    """Return the columns that a text takes: two for wide characters, none for combining ones."""
    return sum(_columns(letter) for letter in text)


def _columns(letter: str) -> int:
    if unicodedata.combining(letter) or unicodedata.category(letter) in ("Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(letter) in "WF" else 1
