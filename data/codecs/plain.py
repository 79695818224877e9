"""Ordinary columns of int32 ids and float32 log-probabilities: any tool reads them, exactly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ..schema import Capture, Targets

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class PlainCodec:
    """Every number as it was captured."""

    name: ClassVar[str] = "plain"

    def encode(self, targets: Targets) -> dict[str, NDArray[Any]]:
        """One column a field; a field without width (k = 0, r = 0, no temperatures) has none."""
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
        return {n: a for n, a in arrays.items() if a is not None and 0 not in a.shape[1:]}

    def decode(self, arrays: Mapping[str, NDArray[Any]], capture: Capture) -> Targets:
        """Views of the columns, nothing copied."""
        count = len(arrays["log_tail"])

        def column(name: str, width: int | None, dtype: type[np.generic]) -> NDArray[Any]:
            shape = (count,) if width is None else (count, width)
            if width == 0:
                return np.zeros(shape, dtype)
            array = arrays.get(name)
            if array is None or array.shape != shape or array.dtype != dtype:
                found = "nothing" if array is None else f"{array.dtype} {array.shape}"
                raise ValueError(f"column '{name}' should be {dtype.__name__} {shape}: {found}")
            return array

        keeps_logprobs = capture.keeps_tail_logprobs
        return Targets(
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
