"""How much longer a step takes while it rounds weights (`quantize`). Loads no torch.

A forward pass rounds every weight once, so the cost is that of some more tokens in the pass.
Measured on a CPU (`tests/README.md`, "Few bits"); a card that multiplies faster than it reads
memory loses more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..training.steps import step_count

if TYPE_CHECKING:
    from ..config import QuantizeConfig

_TOKENS = {"int4": 80, "int8": 45, "int8-row": 20}
"""Tokens of a forward and backward pass that take as long as rounding all weights."""
_INPUTS = 0.06
"""Share of a pass that rounding the inputs of all layers takes (`-dynamic`)."""


@dataclass(frozen=True, slots=True)
class RoundedSteps:
    """The steps of a training, of which the last ones round."""

    first: int
    """Steps before rounding begins."""
    slowdown: float
    """Time of a step that rounds, relative to one that does not."""

    @classmethod
    def of(cls, config: QuantizeConfig | None, steps: int, tokens: int) -> RoundedSteps:
        """Those of a student.

        tokens  of a forward pass
        """
        if config is None:
            return cls(steps, 1.0)
        scheme = config.scheme.removesuffix("-dynamic")
        rounded = 1 + _TOKENS[scheme] / tokens + (_INPUTS if config.scheme != scheme else 0.0)
        return cls(step_count(config.start, steps), rounded)

    def plain(self, start: int, end: int) -> float:
        """Steps without rounding that take as long as those from `start` up to `end`."""
        rounded = max(0, end - max(start, self.first))
        return max(0, end - start) - rounded + rounded * self.slowdown
