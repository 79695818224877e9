"""Selects targets from a teacher's logits: an exact head, an unbiased tail, the mass outside.

Everything is computed in fp32 over the whole real vocabulary. The vocabulary is processed in blocks
of 128. The largest K entries lie in the K blocks with the largest maxima, and a tail sample is
found by its block first, so that neither needs a sort or a running sum over the vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..targets.tensors import TailTensors, TargetTensors

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ...data.schema import Capture

_BLOCK = 128
_LOST = -69.0
"""Log of the tail mass (1e-30) below which its entries have lost precision to underflow."""
_CACHE_ELEMENTS = 1 << 19
"""Logits that a CPU processes at a time: 2 MB stay in its cache, which made the selection ten times
faster than over a whole chunk."""


@torch.no_grad()
def select(
    logits_MV: torch.Tensor, labels_M: torch.Tensor, uniform_M: torch.Tensor, capture: Capture
) -> Iterator[TargetTensors]:
    """The targets at M positions, in order, in one or several parts.

    logits_MV  fp32, real vocabulary only; not changed
    labels_M   int64, the token that follows in the corpus
    uniform_M  float64 in [0, 1), one random number per position (`data.order.uniform`)
    """
    rows = len(logits_MV)
    if logits_MV.device.type == "cpu":
        rows = max(1, _CACHE_ELEMENTS // logits_MV.shape[1])
    for start in range(0, max(1, len(logits_MV)), max(1, rows)):  # no row gives one empty part
        part = slice(start, start + rows)
        yield _select(logits_MV[part], labels_M[part], uniform_M[part], capture)


def _select(
    logits_MV: torch.Tensor, labels_M: torch.Tensor, uniform_M: torch.Tensor, capture: Capture
) -> TargetTensors:
    vocabulary = logits_MV.shape[1]
    logits_MNB = _in_blocks(logits_MV)
    maxima_MN = logits_MNB.amax(2)
    top_M = maxima_MN.amax(1)
    # relative to the largest logit, so that sums neither overflow nor lose precision
    logits_MNB -= top_M[:, None, None]
    maxima_MN -= top_M[:, None]
    shifted = logits_MNB.flatten(1)
    head_logits, head_ids = _largest(logits_MNB, maxima_MN, capture.head)

    # softmax is one fused pass and faster than exp; its value at the largest logit gives the
    # normaliser, log sum exp(shifted)
    probs = shifted.softmax(1)
    log_sum_M = -probs.amax(1).log()
    dots_M = torch.linalg.vecdot(probs[:, :vocabulary], shifted[:, :vocabulary])
    probs.scatter_(1, head_ids, 0.0)  # keeps the probabilities outside the head
    probs_MNB = probs.view_as(logits_MNB)
    mass_MN = probs_MNB.sum(2)
    log_tail_M = mass_MN.sum(1).log()
    lost = torch.nonzero(log_tail_M < _LOST)[:, 0]
    if len(lost) and capture.head < vocabulary:
        # too small for fp32 relative to the largest probability: computed on its own scale
        outside = shifted[lost].scatter(1, head_ids[lost], -torch.inf)
        log_tail_M[lost] = outside.logsumexp(1) - log_sum_M[lost]
        probs_MNB[lost] = outside.softmax(1).view_as(probs_MNB[lost])
        mass_MN[lost] = probs_MNB[lost].sum(2)

    tail_MR = _systematic(probs_MNB, mass_MN, uniform_M, capture.tail)
    logprobs_MR = None
    if capture.keeps_tail_logprobs:
        logprobs_MR = shifted.gather(1, tail_MR) - log_sum_M[:, None]
    label_logits_M = shifted.gather(1, labels_M[:, None])[:, 0]
    return TargetTensors(
        labels=labels_M,
        head_ids=head_ids,
        head_logprobs=head_logits - log_sum_M[:, None],
        log_tail=log_tail_M.clamp_(max=0.0),
        tail=TailTensors.from_draws(tail_MR, logprobs_MR),
        label_logprob=label_logits_M - log_sum_M,
        entropy=(log_sum_M - dots_M).clamp_(min=0.0),
        log_norm=_log_norms(shifted, log_sum_M, capture.temperatures),
        capture=capture,
    )


def _in_blocks(logits_MV: torch.Tensor) -> torch.Tensor:
    """[M, N, B] a copy, with -inf where the last block exceeds the vocabulary."""
    count, vocabulary = logits_MV.shape
    blocks = -(-vocabulary // _BLOCK)
    padded = logits_MV.new_empty(count, blocks * _BLOCK)
    padded[:, :vocabulary] = logits_MV
    padded[:, vocabulary:] = -torch.inf
    return padded.view(count, blocks, _BLOCK)


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
    values, places = candidates.flatten(1).topk(k, 1)
    ids = winners.gather(1, places // width) * width + places % width
    return values, ids


def _systematic(
    weights_MNB: torch.Tensor, block_mass_MN: torch.Tensor, uniform_M: torch.Tensor, r: int
) -> torch.Tensor:
    """[M, R] ids drawn by systematic sampling: equally spaced points with one random shift.

    The points `(u + j) / R` of the cumulative distribution outside the head draw every id with its
    exact expected count, and with less variance than independent draws. Running sums are in
    float64, since fp32 sums over a large vocabulary would be biased.
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
    """The first index with mass whose running sum exceeds each point.

    Rounding can put a point at the very end. It then belongs to the last index with mass, so that a
    token of the head, whose weight is zero, is never drawn.
    """
    last = mass.shape[1] - 1 - (mass > 0).flip(1).to(torch.uint8).argmax(1, keepdim=True)
    found = torch.searchsorted(ends.contiguous(), points.contiguous(), right=True)
    return torch.minimum(found, last)


def _log_norms(
    shifted: torch.Tensor, log_sum_M: torch.Tensor, temperatures: Sequence[float]
) -> torch.Tensor:
    """[M, C] `logsumexp(log p / T)`, from logits minus their maximum."""
    if not temperatures:
        return shifted.new_zeros(len(shifted), 0)
    norms = [(shifted / t).logsumexp(1) - log_sum_M / t for t in temperatures]
    return torch.stack(norms, 1)
