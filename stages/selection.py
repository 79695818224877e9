"""From a teacher's logits to the record: an exact head, an unbiased tail, and what was left.

Everything is computed in fp32 over the whole real vocabulary. The vocabulary is looked at in
blocks of 128: the largest K entries lie in the K blocks with the largest maxima, and a tail sample
is found by its block first, so that neither needs a sort or a running sum over all of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..data.schema import Capture, Targets

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_BLOCK = 128
_CACHE_ELEMENTS = 1 << 19
"""On a CPU so many logits are worked on at a time: 2 MB stay in cache from one pass to the next,
which made the selection ten times faster than over a whole chunk."""


@dataclass(frozen=True, slots=True, eq=False)
class Selected:
    """`data.schema.Targets` of one chunk, still on the device."""

    head_ids: torch.Tensor
    head_logprobs: torch.Tensor
    log_tail: torch.Tensor
    tail_ids: torch.Tensor
    tail_logprobs: torch.Tensor | None
    label_logprob: torch.Tensor
    entropy: torch.Tensor
    log_norm: torch.Tensor


@torch.no_grad()
def select(
    logits_MV: torch.Tensor, labels_M: torch.Tensor, uniform_M: torch.Tensor, capture: Capture
) -> Iterator[Selected]:
    """The record at M positions, in order, in one or several parts.

    logits_MV  fp32, real vocabulary only; not changed
    labels_M   int64, the token that really came next
    uniform_M  float64 in [0, 1), one random number per position (`data.order.uniform`)
    """
    rows = len(logits_MV)
    if logits_MV.device.type == "cpu":
        rows = max(1, _CACHE_ELEMENTS // logits_MV.shape[1])
    for start in range(0, len(logits_MV), rows):
        part = slice(start, start + rows)
        yield _select(logits_MV[part], labels_M[part], uniform_M[part], capture)


def _select(
    logits_MV: torch.Tensor, labels_M: torch.Tensor, uniform_M: torch.Tensor, capture: Capture
) -> Selected:
    blocks_MNB = _in_blocks(logits_MV)
    maxima_MN = blocks_MNB.amax(2)
    top_M = maxima_MN.amax(1, keepdim=True)
    head_logits, head_ids = _largest(blocks_MNB, maxima_MN, capture.head)

    shifted_MV = logits_MV - top_M
    weights_MNB = torch.exp(blocks_MNB - top_M[:, :, None])
    flat = weights_MNB.view(len(logits_MV), -1)
    label_ids = labels_M[:, None]
    head_weights = flat.gather(1, head_ids)
    dots = torch.linalg.vecdot(flat[:, : logits_MV.shape[1]], shifted_MV)
    flat.scatter_(1, head_ids, 0.0)  # from here on the weights are those of the complement
    block_mass_MN = weights_MNB.sum(2)
    tail_M = block_mass_MN.sum(1)
    total_M = tail_M + head_weights.sum(1)
    log_total_M = total_M.log()
    log_norm_M = log_total_M + top_M[:, 0]

    tail_ids = _systematic(weights_MNB, block_mass_MN, uniform_M, capture.tail)
    log_tail = _log_tail(tail_M, log_total_M, logits_MV, head_ids, log_norm_M)
    tail_logprobs = (
        logits_MV.gather(1, tail_ids) - log_norm_M[:, None] if capture.keeps_tail_logprobs else None
    )
    return Selected(
        head_ids=head_ids,
        head_logprobs=head_logits - log_norm_M[:, None],
        log_tail=log_tail,
        tail_ids=tail_ids,
        tail_logprobs=tail_logprobs,
        label_logprob=(logits_MV.gather(1, label_ids)[:, 0] - log_norm_M),
        entropy=(log_total_M - dots / total_M).clamp_(min=0.0),
        log_norm=_log_norms(shifted_MV, log_total_M, capture.temperatures),
    )


def to_targets(parts: Sequence[Selected], capture: Capture) -> Targets:
    """Bring chunks to the host as one record."""

    def join(name: str, dtype: torch.dtype) -> torch.Tensor:
        return torch.cat([getattr(part, name) for part in parts]).to(dtype).cpu()

    def numbers(name: str) -> torch.Tensor:
        return join(name, torch.float32)

    return Targets(
        head_ids=join("head_ids", torch.int32).numpy(),
        head_logprobs=numbers("head_logprobs").numpy(),
        log_tail=numbers("log_tail").numpy(),
        tail_ids=join("tail_ids", torch.int32).numpy(),
        tail_logprobs=numbers("tail_logprobs").numpy() if capture.keeps_tail_logprobs else None,
        label_logprob=numbers("label_logprob").numpy(),
        entropy=numbers("entropy").numpy(),
        log_norm=numbers("log_norm").numpy(),
    )


def _in_blocks(logits_MV: torch.Tensor) -> torch.Tensor:
    """[M, N, B] with -inf where the last block reaches past the vocabulary."""
    count, vocabulary = logits_MV.shape
    missing = -vocabulary % _BLOCK
    padded = torch.nn.functional.pad(logits_MV, (0, missing), value=-torch.inf)
    return padded.view(count, -1, _BLOCK)


def _largest(
    blocks_MNB: torch.Tensor, maxima_MN: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """[M, K] the largest logits and their ids, largest first."""
    count, blocks, width = blocks_MNB.shape
    if k == 0:
        empty = blocks_MNB.new_zeros(count, 0)
        return empty, empty.long()
    chosen = min(k, blocks)
    winners = maxima_MN.topk(chosen, 1, sorted=False).indices
    candidates = blocks_MNB.gather(1, winners[:, :, None].expand(-1, -1, width))
    values, places = candidates.view(count, -1).topk(k, 1)
    ids = winners.gather(1, places // width) * width + places % width
    return values, ids


def _systematic(
    weights_MNB: torch.Tensor, block_mass_MN: torch.Tensor, uniform_M: torch.Tensor, r: int
) -> torch.Tensor:
    """[M, R] ids drawn by systematic sampling: equally spaced points under one random shift.

    Laying the complement's probabilities end to end and reading them off at `(u + j) / R` of the
    way draws every id with its exact expected count and less variance than independent draws.
    Running sums are in float64: over a large vocabulary fp32 ones would be biased.
    """
    count, _, width = weights_MNB.shape
    if r == 0:
        return weights_MNB.new_zeros(count, 0).long()
    ends_MN = block_mass_MN.double().cumsum(1)
    steps_R = torch.arange(r, device=uniform_M.device, dtype=torch.float64)
    points_MR = (uniform_M[:, None] + steps_R) / r * ends_MN[:, -1:]
    block_MR = _first_beyond(ends_MN, points_MR, block_mass_MN)
    before_MR = (ends_MN - block_mass_MN.double()).gather(1, block_MR)
    inside = weights_MNB.gather(1, block_MR[:, :, None].expand(-1, -1, width))
    ends_inside = inside.double().cumsum(2).flatten(0, 1)
    within = _first_beyond(
        ends_inside, (points_MR - before_MR).flatten()[:, None], inside.flatten(0, 1)
    )
    return block_MR * width + within.view(count, r)


def _first_beyond(ends: torch.Tensor, points: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
    """The first place whose running sum exceeds each point, and which has mass of its own.

    Rounding can put a point at the very end; it then belongs to the last place that has mass, so
    a token of the head (whose weight was set to zero) is never drawn.
    """
    last = mass.shape[1] - 1 - (mass > 0).flip(1).to(torch.uint8).argmax(1, keepdim=True)
    found = torch.searchsorted(ends.contiguous(), points.contiguous(), right=True)
    return torch.minimum(found, last)


def _log_tail(
    tail_M: torch.Tensor,
    log_total_M: torch.Tensor,
    logits_MV: torch.Tensor,
    head_ids: torch.Tensor,
    log_norm_M: torch.Tensor,
) -> torch.Tensor:
    """[M] log of the mass outside the head; -inf when the head is the whole vocabulary."""
    log_tail = tail_M.log() - log_total_M
    # a tail too small for fp32 next to the largest logit is summed again on its own scale
    lost = torch.nonzero(tail_M < 1e-30)[:, 0]
    if len(lost) and head_ids.shape[1] < logits_MV.shape[1]:
        outside = logits_MV[lost].scatter(1, head_ids[lost], -torch.inf)
        log_tail[lost] = outside.logsumexp(1) - log_norm_M[lost]
    return log_tail.clamp_(max=0.0)


def _log_norms(
    shifted_MV: torch.Tensor, log_total_M: torch.Tensor, temperatures: Sequence[float]
) -> torch.Tensor:
    """[M, C] `logsumexp(log p / T)`, from logits shifted by their maximum."""
    if not temperatures:
        return shifted_MV.new_zeros(len(shifted_MV), 0)
    norms = [(shifted_MV / t).logsumexp(1) - log_total_M / t for t in temperatures]
    return torch.stack(norms, 1)
