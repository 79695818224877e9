"""Columns of int32 ids and float32 log-probabilities, exact and readable by other tools."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

from ..schema import (
    Block,
    Capture,
    Targets,
    expect_column,
    from_positions,
    from_sequences,
    target_shapes,
    to_positions,
    to_sequences,
)

if TYPE_CHECKING:
    from ..schema import Columns


@dataclass(frozen=True, slots=True)
class PlainCodec:
    """Stores every number as it was captured."""

    name: ClassVar[str] = "plain"
    compress: ClassVar[bool] = False
    rounding: ClassVar[float] = 0.0

    @classmethod
    def fitting(cls, *, vocabulary: int, capture: Capture, **settings: Any) -> PlainCodec:
        return cls(**settings)

    def maximum_error(self, capture: Capture) -> float:
        return 0.0

    def encode(self, block: Block) -> Columns:
        """One column per field. A field of width 0 (K = 0, R = 0, no temperatures) has none."""
        arrays = {f.name: getattr(block.targets, f.name) for f in fields(block.targets)}
        wide = {n: a for n, a in arrays.items() if a is not None and 0 not in a.shape[1:]}
        return from_sequences(block.sequences) | from_positions(wide, block.sequences.positions)

    def decode(self, columns: Columns, capture: Capture) -> Block:
        """The block as views of the columns: no copy is made."""
        sequences = to_sequences(columns)
        arrays = to_positions(columns, sequences.positions)
        shapes = target_shapes(capture, len(sequences.positions.values))
        targets = Targets(
            **{name: expect_column(arrays, name, *shape) for name, shape in shapes.items()}
        )
        return Block(sequences=sequences, targets=targets, capture=capture)
