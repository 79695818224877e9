"""Ordinary columns of int32 ids and float32 log-probabilities: any tool reads them, exactly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ..columns import expect_column, from_positions, from_sequences, to_positions, to_sequences
from ..schema import Block, Capture, Targets

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..columns import Columns


@dataclass(frozen=True, slots=True)
class PlainCodec:
    """Every number as it was captured."""

    name: ClassVar[str] = "plain"
    compress: ClassVar[bool] = False
    rounding: ClassVar[float] = 0.0

    @classmethod
    def fitting(cls, *, vocabulary: int, capture: Capture, **settings: Any) -> PlainCodec:
        """It has no settings and takes every capture."""
        return cls(**settings)

    def maximum_error(self, capture: Capture) -> float:
        """It is exact."""
        return 0.0

    def encode(self, block: Block) -> Columns:
        """One column a field; a field without width (k = 0, r = 0, no temperatures) has none."""
        targets = block.targets
        arrays = {
            "head_ids": targets.head_ids,
            "head_logprobs": targets.head_logprobs,
            "log_tail": targets.log_tail,
            "tail_ids": targets.tail_ids,
            "tail_logprobs": targets.tail_logprobs,
            "label_logprob": targets.label_logprob,
            "entropy": targets.entropy,
            "log_norm": targets.log_norm,
        }
        wide = {n: a for n, a in arrays.items() if a is not None and 0 not in a.shape[1:]}
        return from_sequences(block.sequences) | from_positions(wide, block.sequences.positions)

    def decode(self, columns: Mapping[str, Any], capture: Capture) -> Block:
        """Views of the columns, nothing copied."""
        sequences = to_sequences(columns)
        arrays = to_positions(columns, sequences.positions)
        count = len(sequences.positions.values)

        def column(name: str, width: int | None, dtype: type[np.generic]) -> Any:
            shape = (count,) if width is None else (count, width)
            return expect_column(arrays, name, shape, dtype)

        keeps_logprobs = capture.keeps_tail_logprobs
        targets = Targets(
            head_ids=column("head_ids", capture.head, np.int32),
            head_logprobs=column("head_logprobs", capture.head, np.float32),
            log_tail=column("log_tail", None, np.float32),
            tail_ids=column("tail_ids", capture.tail, np.int32),
            tail_logprobs=(
                column("tail_logprobs", capture.tail, np.float32) if keeps_logprobs else None
            ),
            label_logprob=column("label_logprob", None, np.float32),
            entropy=column("entropy", None, np.float32),
            log_norm=column("log_norm", len(capture.temperatures), np.float32),
        )
        return Block(sequences=sequences, targets=targets, capture=capture)
