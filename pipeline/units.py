"""Quantities as people read them."""

from __future__ import annotations


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def duration(seconds: float) -> str:
    """A time for people, in its two largest units: `45 s`, `1 min 56 s`, `2 h 5 min`, `3 d 4 h`."""
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
    """Units a second for people: whole numbers, and three digits of a small one."""
    return f"{count:,.0f}" if count >= 100 else f"{count:.3g}"
