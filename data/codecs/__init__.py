"""How targets become columns. One file a codec, one line below.

A codec is a frozen dataclass: its fields are exactly what the manifest records about it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from .plain import PlainCodec

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from ..schema import Capture, Targets


class Codec(Protocol):
    """Turns targets into per-position arrays and back."""

    name: ClassVar[str]

    def encode(self, targets: Targets) -> dict[str, NDArray[Any]]:
        """Arrays whose first axis is the position, `[M, ...]`."""
        ...

    def decode(self, arrays: Mapping[str, NDArray[Any]], capture: Capture) -> Targets:
        """The targets; raises ValueError where the arrays do not fit the capture."""
        ...


CODECS: dict[str, type[Codec]] = {
    "plain": PlainCodec,
}
