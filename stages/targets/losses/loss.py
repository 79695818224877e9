"""What every loss has: a name, the captures that it refuses, and the plain formula of its value."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, Literal

if TYPE_CHECKING:
    import torch

    from ....data.schema import Capture
    from ..tensors import TargetTensors

Support = Literal["exact", "unbiased", "a lower bound", "biased", "on the head only"]
"""How the loss computed from a capture relates to the loss on the whole distribution."""


class Loss(ABC):
    """A function of the student's distribution and the teacher's targets."""

    __slots__ = ()
    name: ClassVar[str]
    needs_targets: ClassVar[bool] = True
    """Whether the loss reads the teacher's targets."""
    inside_chunks: ClassVar[bool] = False
    """Whether it counts inside a chunk (`data/schema.py`), where the record estimates the teacher's
    distribution. Other losses are 0 there."""
    beside_text: ClassVar[bool] = False
    """Whether it is of branches (`data/branches.py`) and not of the positions of the text."""
    needs_mass: ClassVar[bool] = True
    """Whether the loss needs the mass outside the head."""

    def refuse(self, capture: Capture, temperature: float) -> str | None:
        """The reason why this capture cannot support the loss at this temperature, or None."""
        if capture.head == 0 and capture.tail == 0:
            return "the store kept neither head nor tail, so there is no distribution to match"
        if not capture.mass:
            if not self.needs_mass:  # ratios on the head are exact at every temperature
                return None
            return (
                "the store was imported without the mass outside the head, so what the teacher "
                "thinks of other tokens is not known; use kl, which then compares the head only"
            )
        return self.refuse_temperature(capture, temperature)

    def refuse_temperature(self, capture: Capture, temperature: float) -> str | None:
        """The reason why a temperature is refused, or None if it was captured."""
        if temperature != 1.0 and temperature not in capture.temperatures:
            if capture.chunks:
                return (
                    f"temperature {temperature} is not known in a student's own tokens, in which "
                    "probabilities that meet add up at temperature 1 only; set temperature = 1, or "
                    "take a student with the teacher's tokens"
                )
            kept = ", ".join(str(t) for t in (1.0, *capture.temperatures))
            return (
                f"temperature {temperature} was not captured (captured: {kept}); use one of these, "
                f"or capture again with logits.temperatures = [{temperature}]"
            )
        return None

    @abstractmethod
    def support(self, capture: Capture, temperature: float, vocabulary: int) -> Support:
        """How the loss from this capture relates to the loss on the whole distribution of
        `vocabulary` tokens. Only for captures that are not refused."""

    @abstractmethod
    def value(
        self, logprobs_MV: torch.Tensor, target: TargetTensors, temperature: float
    ) -> torch.Tensor:
        """[M] the loss in nats at each supervised position.

        logprobs_MV  the student's dense log-probabilities at `temperature`
        target       the teacher's targets at the same positions
        temperature  a captured temperature, or 1
        """
