"""From values to places, and the round values that an axis names."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from .figure import Axis

_LARGEST, _SMALLEST = 1e300, 1e-300
"""Beyond these the arithmetic of axes overflows."""
_PAD = 0.06
"""Share of the span that is left free on both sides."""
_SUFFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """Where values lie between two places in pixels."""

    low: float
    high: float
    log: bool
    start: float
    end: float
    ticks: tuple[tuple[float, str], ...]
    """Value and text of each."""

    def place(self, value: float) -> float:
        """In pixels, also for a value outside."""
        low, high = self.low, self.high
        if self.log:
            low, high = math.log10(low), math.log10(high)
            value = math.log10(value) if value > 0 else low - 10 * (high - low)
        return self.start + (self.end - self.start) * ((value - low) / (high - low))


def drawable(value: float | None) -> float | None:
    """The value, if it can be drawn: a finite number of at most 1e300."""
    if value is None or not math.isfinite(value) or abs(value) > _LARGEST:
        return None
    return 0.0 if abs(value) < _SMALLEST else float(value)


def make_scale(
    axis: Axis, values: Iterable[float], start: float, end: float, spacing: float
) -> Scale:
    """An axis over these drawable values, from one place in pixels to another.

    spacing  pixels that a tick needs
    """
    known = [*values, *(end for end in (axis.low, axis.high) if end is not None)] or [0.0, 1.0]
    least, most = min(known), max(known)
    log = axis.scale != "linear" and least > 0 and (axis.scale == "log" or most >= 10 * least)
    low, high = _padded(least, most, log)
    low = low if axis.low is None else axis.low
    high = high if axis.high is None or axis.high <= low else axis.high
    count = max(2, int(abs(end - start) / spacing))
    ticks = log_ticks(low, high, count) if log else linear_ticks(low, high, count)
    if least >= 0:  # what is never negative needs no negative tick for its free edge
        ticks = [tick for tick in ticks if tick >= 0]
    texts = tick_texts(ticks, axis.form)
    named = tuple(zip(ticks, texts, strict=True))
    return Scale(low=low, high=high, log=log, start=start, end=end, ticks=named)


def _padded(least: float, most: float, log: bool) -> tuple[float, float]:
    if log:
        factor = max(1.25, 10 ** (_PAD * (math.log10(most) - math.log10(least))))
        return max(least / factor, _SMALLEST), min(most * factor, _LARGEST)
    span = most - least
    # values that differ by less than their own digits are one value
    if span <= 1e-12 * max(abs(least), abs(most)):
        free = 0.1 * abs(least) or 1.0
        return least - free, most + free
    return least - _PAD * span, most + _PAD * span


def linear_ticks(low: float, high: float, count: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten from `low` to `high`, about `count` at most."""
    rough = (high - low) / count
    power = math.floor(math.log10(rough))
    # a step more than the 1.0, 2.0 and 5.0 that fit: rounding must not make one tick too many
    factor = next(f for f in (1, 2, 5, 10) if f * 10.0**power >= rough * (1 - 1e-9))
    first = math.ceil(_steps(low, factor, power) - 1e-9)
    last = math.floor(_steps(high, factor, power) + 1e-9)
    return [_multiple(i * factor, power) for i in range(first, last + 1)]


def _steps(value: float, factor: int, power: int) -> float:
    return value / 10.0**power / factor


def _multiple(count: int, power: int) -> float:
    """`count * 10**power`, as near as a number can be: 0.3 and not 0.30000000000000004."""
    return float(f"{count}e{power}")


def log_ticks(low: float, high: float, count: int) -> list[float]:
    """Powers of ten, with round values between them where there is room."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    inside = [power for power in range(first, last + 1) if low <= 10.0**power <= high]
    if len(inside) > count:
        every = -(-len(inside) // count)
        return [10.0**power for power in inside if power % every == 0]
    for factors in ((1, 2, 3, 4, 5, 6, 7, 8, 9), (1, 2, 5), (1, 3)):
        found = [_multiple(f, p) for p in range(first, last + 1) for f in factors]
        found = [tick for tick in found if low <= tick <= high]
        if 2 <= len(found) <= count:
            return found
    powers = [10.0**power for power in inside]
    return powers if len(powers) > 1 else linear_ticks(low, high, count)


def tick_texts(ticks: Sequence[float], form: str) -> list[str]:
    """Each as short as it can be without two of them reading alike."""
    if form == "percent":
        return [f"{text}%" for text in _plain([100 * tick for tick in ticks])]
    if form == "short":
        texts = [short(tick) for tick in ticks]
        if len(set(texts)) == len(texts):
            return texts
    return _plain(ticks)


def short(value: float) -> str:
    """Three digits and a letter: 926k, 1.5M."""
    for unit, letter in _SUFFIXES:
        # 999,600 is 1M, not 1000k
        if unit <= abs(value) * 1.0005 and abs(value) < 1000 * _SUFFIXES[0][0]:
            return f"{value / unit:.3g}{letter}"
    return f"{value:.3g}"


def _plain(ticks: Sequence[float]) -> list[str]:
    if not ticks:
        return []
    largest = max(abs(tick) for tick in ticks)
    smallest = min((abs(tick) for tick in ticks if tick), default=1.0)
    if largest >= 1e9 or smallest < 1e-5:
        return [f"{tick:.10g}" for tick in ticks]
    if largest >= 1e4 * smallest:  # decades: each with its own digits
        return [f"{tick:,.10g}" for tick in ticks]
    digits = max(_decimals(tick) for tick in ticks)
    return [f"{tick:,.{digits}f}" for tick in ticks]


def _decimals(tick: float) -> int:
    """How many it has, of at most ten digits."""
    shown = f"{tick:.10g}"
    return len(shown.partition(".")[2]) if "e" not in shown else 0
