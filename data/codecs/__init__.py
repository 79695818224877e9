"""Codecs: how a block becomes columns. One file per codec, one line per codec in `CODECS`.

A codec is a frozen dataclass. The manifest records exactly its fields.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from .compact import CompactCodec
from .plain import PlainCodec

if TYPE_CHECKING:
    from ..columns import Columns
    from ..schema import Block, Capture


class Codec(Protocol):
    """Converts a block to columns and back."""

    name: ClassVar[str]
    compress: ClassVar[bool]
    """Whether the format should compress the columns; otherwise they can be memory-mapped."""
    rounding: ClassVar[float]
    """Upper bound of the error of label and sample log-probabilities and of entropies, in nats."""

    @classmethod
    def fitting(cls, *, vocabulary: int, capture: Capture, **settings: Any) -> Codec:
        """The codec for a store with this capture; `settings` come from the recipe.

        Raises
            TypeError, ValueError: an unknown setting, a wrong value, or too large a vocabulary
        """
        ...

    def maximum_error(self, capture: Capture) -> float:
        """Upper bound of |sqrt(p stored) - sqrt(p captured)| over head entries at temperature 1."""
        ...

    def encode(self, block: Block) -> Columns:
        """The whole block as columns, one row per sequence."""
        ...

    def decode(self, columns: Columns, capture: Capture) -> Block:
        """The block. Raises ValueError or KeyError if the columns do not fit the capture."""
        ...


CODECS: dict[str, type[Codec]] = {
    "compact": CompactCodec,
    "plain": PlainCodec,
}
