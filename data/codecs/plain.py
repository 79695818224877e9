"""Columns of int32 ids and float32 log-probabilities, exact and readable by other tools."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ..columns import (
    expect_column,
    expect_list,
    from_positions,
    from_sequences,
    list_offsets,
    to_positions,
    to_sequences,
)
from ..ragged import Ragged
from ..schema import Block, Capture, Tail, Targets, target_shapes

if TYPE_CHECKING:
    from ..columns import Columns


@dataclass(frozen=True, slots=True)
class PlainCodec:
    """Stores every number as it was captured."""

    name: ClassVar[str] = "plain"
    compress: ClassVar[bool] = False
    rounding: ClassVar[float] = 0.0

    @classmethod
    def fitting(cls, *, vocabulary: int, capture: Capture, **settings: Any) -> PlainCodec:
        return cls(**settings)

    def learned(self, block: Block) -> PlainCodec:
        return self

    def maximum_error(self, capture: Capture) -> float:
        return 0.0

    def encode(self, block: Block) -> Columns:
        """One column per field. A field of width 0 (K = 0, R = 0, no temperatures) has none."""
        targets, positions = block.targets, block.sequences.positions
        arrays = {name: getattr(targets, name) for name in target_shapes(block.capture, 0)}
        wide = {name: array for name, array in arrays.items() if 0 not in array.shape[1:]}
        columns = from_sequences(block.sequences) | from_positions(wide, positions)
        if block.capture.tail:
            tail, borders = targets.tail, targets.tail.offsets[positions.offsets]
            columns["tail_sizes"] = Ragged(tail.lengths.astype(np.int32), positions.offsets)
            columns["tail_ids"] = Ragged(tail.ids, borders)
            columns["tail_counts"] = Ragged(tail.counts.astype(np.int32), borders)
            if tail.logprobs is not None:
                columns["tail_logprobs"] = Ragged(tail.logprobs, borders)
        return columns

    def rounds_as(self, other: object) -> bool:
        return self == other

    def recode(self, columns: Columns, capture: Capture, other: object) -> Columns:
        return columns

    def decode(self, columns: Columns, capture: Capture) -> Block:
        """The block as views of the columns: no copy is made."""
        sequences = to_sequences(columns)
        positions = sequences.positions
        arrays = to_positions(columns, positions)
        shapes = target_shapes(capture, len(positions.values))
        dense = {name: expect_column(arrays, name, *shape) for name, shape in shapes.items()}
        tail = Tail.empty(len(positions.values), logprobs=capture.keeps_tail_logprobs)
        if capture.tail:
            shape = (len(positions.values),)
            sizes = expect_column(arrays, "tail_sizes", shape, np.int32)
            lists: dict[str, Any] = {"tail_ids": np.int32, "tail_counts": np.int32}
            if capture.keeps_tail_logprobs:
                lists["tail_logprobs"] = np.float32
            offsets = list_offsets(sizes)
            ids, counts, *logprobs = (
                expect_list(columns, name, offsets[positions.offsets], dtype)
                for name, dtype in lists.items()
            )
            known = logprobs[0] if logprobs else None
            tail = Tail(ids=ids, counts=counts, logprobs=known, offsets=offsets)
            tail.expect_draws(capture.tail)
        return Block(sequences=sequences, targets=Targets(**dense, tail=tail), capture=capture)
