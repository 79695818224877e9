"""How much arithmetic a token costs."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

_SHORT = 16


@torch.no_grad()
def flops_per_token(model: Any, length: int) -> int:
    """Floating point operations of a forward pass over a sequence of `length` tokens, logits
    included, per token; a multiplication with its addition counts as two.

    Counted by torch in the products of matrices that are really made, so nothing is assumed of the
    family. Attention counts whole, also the half that the causal mask throws away, as kernels
    without block skipping compute it.

    Every product grows with the length or with its square, so three short sequences tell it of any
    length, without whole attention matrices of a long one in memory.
    """
    lengths = [_SHORT, 2 * _SHORT, 3 * _SHORT]
    if length <= lengths[-1]:
        return _counted(model, length) // length
    one, two, three = (_counted(model, short) for short in lengths)
    # through three points at equal distances (Newton's forward differences)
    steps = Fraction(length, _SHORT) - 1
    total = one + steps * (two - one) + steps * (steps - 1) / 2 * (three - 2 * two + one)
    return int(total) // length


def _counted(model: Any, length: int) -> int:
    tokens = torch.zeros((1, length), dtype=torch.long, device=model.device)
    # the fused kernels hide their products; this one does not
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(input_ids=tokens, use_cache=False)
    return int(counter.get_total_flops())
