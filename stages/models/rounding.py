"""Whether the states of a model differ by rounding alone.

A forward pass of another shape may run other kernels, which round otherwise. At some positions a
real model amplifies rounding a thousand times, so no fixed limit holds for all. Where states differ
by more than usual, the model is run again with embeddings that are changed by about their rounding.
What this changes at a position, other kernels may change, too.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROUNDING = 1e-4
"""Usual difference between batches of different shapes, relative to the norm of a position."""
HALF_ROUNDING = 5e-2
"""Usual difference in half precision, relative to the largest number of a document; of logits,
relative to the norm of a position."""
NOISE = 4
"""Factor by which a real difference exceeds the measured effect of rounding."""


def agree(
    found_TD: torch.Tensor,
    wanted_TD: torch.Tensor,
    model: Any,
    again: Callable[[], torch.Tensor],
    *,
    logits: bool = False,
) -> bool:
    """Whether states differ by rounding alone.

    again   computes `wanted_TD` once more. It is called if the states differ by more than usual.
    logits  whether they are logits. Then each position is compared by its own size, and a constant
            shift does not count
    """
    if torch.equal(found_TD, wanted_TD):
        return True
    exact = model.dtype == torch.float32
    usual = ROUNDING if exact else HALF_ROUNDING

    def distances(states_TD: torch.Tensor) -> torch.Tensor:
        pair = [states_TD, wanted_TD]
        if logits:
            pair = [each - each.mean(1, keepdim=True) for each in pair]
        return _distances(*pair, by_position=exact or logits)

    found_T = distances(found_TD)
    if bool((found_T <= usual).all()):
        return True
    with _rounded_otherwise(model):
        noise_T = distances(again())
    # a model that amplifies rounding everywhere cannot be tested
    tested = (noise_T <= usual).double().mean() >= 0.5
    return bool(tested and (found_T <= (NOISE * noise_T).clamp(min=usual)).all())


def relative_distance(found_TD: torch.Tensor, wanted_TD: torch.Tensor) -> float:
    """Distance at the position that differs most, relative to the norm of that position."""
    if torch.equal(found_TD, wanted_TD):
        return 0.0
    return float(_distances(found_TD, wanted_TD, by_position=True).max())


def _distances(
    found_TD: torch.Tensor, wanted_TD: torch.Tensor, *, by_position: bool
) -> torch.Tensor:
    """[T] how far states differ, relative to the position or to the whole document."""
    difference_TD = found_TD - wanted_TD
    if by_position:
        norm = torch.linalg.vector_norm
        distance_T, size = norm(difference_TD, dim=1), norm(wanted_TD, dim=1)
    else:
        distance_T, size = difference_TD.abs().amax(1), wanted_TD.abs().max()
    shares_T: torch.Tensor = distance_T / size.clamp(min=torch.finfo(torch.float32).tiny)
    return shares_T


@contextlib.contextmanager
def _rounded_otherwise(model: Any) -> Iterator[None]:
    """Change the embeddings of tokens by about their rounding, always in the same way."""
    random = torch.Generator().manual_seed(0)
    share = torch.finfo(model.dtype).eps

    def change(module: Any, arguments: Any, embedded: torch.Tensor) -> torch.Tensor:
        return embedded * (1 + share * torch.randn(embedded.shape, generator=random)).to(embedded)

    try:
        embedding = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        embedding = None
    if embedding is None:  # nothing shows what the model amplifies
        yield
        return
    handle = embedding.register_forward_hook(change)
    try:
        yield
    finally:
        handle.remove()
