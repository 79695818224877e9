"""How a block becomes columns. One file a codec, one line below.

A codec is a frozen dataclass: its fields are exactly what the manifest records about it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from .compact import CompactCodec
from .plain import PlainCodec

if TYPE_CHECKING:
    from ..columns import Columns
    from ..schema import Block, Capture


class Codec(Protocol):
    """Turns a block into the columns of a store and back."""

    name: ClassVar[str]
    compress: ClassVar[bool]
    """Whether its columns are meant to be compressed by the store, or mapped as they are."""
    rounding: ClassVar[float]
    """No log-probability of a label or a sample, nor an entropy, is further off, in nats."""

    @classmethod
    def fitting(cls, *, vocabulary: int, capture: Capture, **settings: Any) -> Codec:
        """The codec for a store of this capture; `settings` are what the recipe says of it.

        Raises
            TypeError, ValueError: a setting that it does not have or cannot take, or a vocabulary
                that it cannot hold
        """
        ...

    def maximum_error(self, capture: Capture) -> float:
        """No |sqrt(p stored) - sqrt(p captured)| of a head entry is larger, at temperature 1."""
        ...

    def encode(self, block: Block) -> Columns:
        """One row a sequence; everything of the block."""
        ...

    def decode(self, columns: Columns, capture: Capture) -> Block:
        """The block; raises ValueError or KeyError where the columns do not fit the capture."""
        ...


CODECS: dict[str, type[Codec]] = {
    "compact": CompactCodec,
    "plain": PlainCodec,
}
