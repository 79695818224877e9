"""One teacher in slices over several processes: the first decides, the others keep step.

Every forward pass needs all of them, on the same batch. The first one reads, selects and writes;
the others compute their slices of the layers and forget the result.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import distributed

from ..ranks import rank

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ...data.schema import Sequences
    from .teacher import Teacher


def follows(teacher: Teacher) -> bool:
    """Whether this process only keeps step with another."""
    return teacher.lockstep and rank() > 0


def lead(teacher: Teacher, sequences: Sequences | None) -> None:
    """Tell the others what comes next; None for nothing more. Nothing happens without others."""
    if teacher.lockstep:
        distributed.broadcast_object_list([sequences], src=0)


def follow(teacher: Teacher, inputs_of: Callable[[Sequences], Mapping[str, torch.Tensor]]) -> None:
    """Keep step until the first process has nothing more.

    inputs_of  what the model's forward takes of some sequences, on the host
    """
    while (sequences := _next()) is not None:
        inputs = inputs_of(sequences)
        with torch.no_grad():
            teacher.head.hidden({n: t.to(teacher.head.input_device) for n, t in inputs.items()})


def _next() -> Sequences | None:
    received: list[Any] = [None]
    distributed.broadcast_object_list(received, src=0)
    sequences: Sequences | None = received[0]
    return sequences
