"""What a capture can support: the terms and the check that losses share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from ....data.schema import Capture

Support = Literal["exact", "unbiased", "a lower bound", "biased"]
"""How the loss computed from a capture relates to the loss on the whole distribution."""


def refuse_temperature(capture: Capture, temperature: float) -> str | None:
    """The reason why a capture gives no target at this temperature, or None."""
    if capture.head == 0 and capture.tail == 0:
        return "the store kept neither head nor tail, so there is no distribution to match"
    if temperature != 1.0 and temperature not in capture.temperatures:
        kept = ", ".join(str(t) for t in (1.0, *capture.temperatures))
        return (
            f"temperature {temperature} was not captured (captured: {kept}); use one of these, "
            f"or capture again with logits.temperatures = [{temperature}]"
        )
    return None
