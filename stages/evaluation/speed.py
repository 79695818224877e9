"""Speed of a forward pass, measured in the same way for teacher and students."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..models.device import describe_machine, peak_memory
from ..models.isolation import model_inputs

if TYPE_CHECKING:
    from ...data.schema import Sequences
    from ..models.isolation import Isolation
    from ..models.output_head import OutputHead

_REPEATS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardSpeed:
    """Speed of a forward pass with logits: the median of several passes after a warm-up.

    A slow model runs fewer passes, down to one without a warm-up.
    """

    tokens_per_second: float
    peak_memory_bytes: int
    """Peak memory beyond what was in use before; the weights do not count."""
    batch_tokens: int
    machine: str


@torch.no_grad()
def forward_speed(
    head: OutputHead, sequences: Sequences, isolation: Isolation, limit: float = math.inf
) -> ForwardSpeed:
    """Time the model on the given sequences. Padding counts as tokens, because it is computed too.

    limit  seconds after which no further pass starts
    """
    device = head.model.device
    inputs = model_inputs(sequences, isolation, head.model.dtype)
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    count = inputs["input_ids"].numel()
    seconds: list[float] = []
    with peak_memory(device) as memory:
        while len(seconds) <= _REPEATS and sum(seconds) < limit:
            started = time.perf_counter()
            _forward(head, inputs)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - started)
    return ForwardSpeed(
        tokens_per_second=round(count / statistics.median(seconds[1:] or seconds), 1),
        peak_memory_bytes=memory.bytes,
        batch_tokens=count,
        machine=describe_machine(),
    )


def _forward(head: OutputHead, inputs: dict[str, torch.Tensor]) -> None:
    hidden_MD = head.hidden(inputs).flatten(0, 1)
    buffer = head.buffer(len(hidden_MD), hidden_MD.device)
    for start in range(0, len(hidden_MD), len(buffer)):
        head.logits(hidden_MD[start : start + len(buffer)], buffer)
