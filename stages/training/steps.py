"""Shares of a training in whole steps. Loads no torch, for plans."""

from __future__ import annotations

import math


def step_count(share: float, steps: int) -> int:
    """Steps in a share of all steps, rounded up except for rounding errors of the product."""
    return math.ceil(share * steps - 1e-9)
