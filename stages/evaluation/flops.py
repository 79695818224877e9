"""Floating point operations per token."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

_SHORT = 16


@torch.no_grad()
def flops_per_token(model: Any, length: int) -> int:
    """Floating point operations per token of a forward pass over `length` tokens, with logits.

    A multiply-add counts as two operations. torch counts the matrix products that the model
    computes, so no family needs its own formula. Attention counts both halves, also the one that
    the causal mask removes, as in kernels that do not skip blocks.

    Every product grows linearly or quadratically with the length. So three short sequences give the
    count for any length, without the attention matrices of a long sequence in memory.
    """
    lengths = [_SHORT, 2 * _SHORT, 3 * _SHORT]
    if length <= lengths[-1]:
        return _counted(model, length) // length
    one, two, three = (_counted(model, short) for short in lengths)
    # quadratic through three equidistant points (Newton's forward differences)
    steps = Fraction(length, _SHORT) - 1
    total = one + steps * (two - one) + steps * (steps - 1) / 2 * (three - 2 * two + one)
    return int(total) // length


def _counted(model: Any, length: int) -> int:
    tokens = torch.zeros((1, length), dtype=torch.long, device=model.device)
    # fused kernels hide their matrix products from the counter
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(input_ids=tokens, use_cache=False)
    return int(counter.get_total_flops())
