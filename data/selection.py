"""Selects targets from whole distributions, in numpy: an exact head, an unbiased tail, the rest.

The same definitions as stage one's selection, in float64 and one row at a time: for programs that
hand over a distribution, and for sources that hold one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .schema import Tail, Targets

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .schema import Capture


def select(
    logprobs_MV: NDArray[Any],
    labels_M: NDArray[Any],
    uniform_M: NDArray[np.float64],
    capture: Capture,
) -> Targets:
    """The targets at M positions.

    logprobs_MV  log-probabilities over the vocabulary; -inf for tokens that cannot come. They are
                 normalised first
    labels_M     the token that follows
    uniform_M    one number in [0, 1) per position, the shift of its samples (`data.order.uniform`)

    Systematic sampling: the points (u + j) / R of the running sum outside the head draw every token
    with its exact expected count. A label of probability 0 gets the smallest one of its row.
    """
    rows = [
        _row(logprobs_V.astype(np.float64), int(label), float(shift), capture)
        for logprobs_V, label, shift in zip(logprobs_MV, labels_M, uniform_M, strict=True)
    ]
    count, columns = len(rows), list(zip(*rows, strict=True))
    if not count:
        columns = [()] * 7
    ids, logprobs, log_tail, drawn, label, entropy, norms = columns
    ids_MK = np.array(ids, np.int32).reshape(count, capture.head)
    drawn_MR = np.array(drawn, np.int64).reshape(count, capture.tail)
    known_MR = None
    if capture.keeps_tail_logprobs:
        total_M = [_log_sum(row.astype(np.float64)) for row in logprobs_MV]
        taken = np.take_along_axis(np.asarray(logprobs_MV), drawn_MR, 1).astype(np.float64)
        known_MR = (taken - np.array(total_M).reshape(-1, 1)).astype(np.float32)
    return Targets(
        head_ids=ids_MK,
        head_logprobs=np.array(logprobs, np.float32).reshape(count, capture.head),
        log_tail=np.array(log_tail, np.float32).reshape(count),
        tail=Tail.from_draws(drawn_MR.astype(np.int32), known_MR),
        label_logprob=np.array(label, np.float32).reshape(count),
        entropy=np.array(entropy, np.float32).reshape(count),
        log_norm=np.array(norms, np.float32).reshape(count, len(capture.temperatures)),
    )


def _row(logp_V: NDArray[np.float64], label: int, shift: float, capture: Capture) -> tuple[Any, ...]:
    """Head ids and log-probabilities, log mass outside, samples, label, entropy, norms."""
    logp_V = logp_V - _log_sum(logp_V)
    k = capture.head
    head = np.zeros(0, np.int64)
    if k:
        head = np.argpartition(-logp_V, min(k, len(logp_V)) - 1)[:k]
        head = head[np.lexsort((head, -logp_V[head]))]
    outside_V = logp_V.copy()
    outside_V[head] = -np.inf
    log_tail = _log_sum(outside_V) if k < len(logp_V) else -np.inf
    drawn = np.zeros(0, np.int64)
    if capture.tail:
        # on its own scale, so that a tiny mass keeps its digits
        ends_V = np.cumsum(np.exp(outside_V - log_tail))
        points = (shift + np.arange(capture.tail)) / capture.tail * ends_V[-1]
        last = np.flatnonzero(outside_V > -np.inf)[-1]
        drawn = np.minimum(np.searchsorted(ends_V, points, side="right"), last)
    positive = logp_V > -np.inf
    entropy = -float((np.exp(logp_V[positive]) * logp_V[positive]).sum())
    own = logp_V[label]
    if own == -np.inf:
        own = logp_V[positive].min()
    norms = [_log_sum(logp_V / temperature) for temperature in capture.temperatures]
    return head, logp_V[head], min(log_tail, 0.0), drawn, own, max(entropy, 0.0), norms


def _log_sum(values: NDArray[np.float64]) -> float:
    top = values.max()
    if top == -np.inf:
        return -np.inf
    return float(top + np.log(np.exp(values - top).sum()))
