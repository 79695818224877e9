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

    logprobs_MV  log-probabilities over the vocabulary; -inf for tokens that cannot come. A sum
                 above 1 is normalised
    labels_M     the token that follows
    uniform_M    one number in [0, 1) per position, the shift of its samples (`data.order.uniform`)

    Systematic sampling: the points (u + j) / R of the running sum outside the head draw every token
    with its exact expected count. Tokens without probability share what is missing from 1,
    at least 1e-9, since a store holds no logarithm of 0.
    """
    rows = [
        _row(logprobs_V.astype(np.float64), int(label), float(shift), capture)
        for logprobs_V, label, shift in zip(logprobs_MV, labels_M, uniform_M, strict=True)
    ]
    count, columns = len(rows), list(zip(*rows, strict=True))
    if not count:
        columns = [()] * 8
    ids, logprobs, log_tail, drawn, known, label, entropy, norms = columns
    ids_MK = np.array(ids, np.int32).reshape(count, capture.head)
    drawn_MR = np.array(drawn, np.int64).reshape(count, capture.tail)
    known_MR = None
    if capture.keeps_tail_logprobs:
        known_MR = np.array(known, np.float32).reshape(count, capture.tail)
    return Targets(
        head_ids=ids_MK,
        head_logprobs=np.array(logprobs, np.float32).reshape(count, capture.head),
        log_tail=np.array(log_tail, np.float32).reshape(count),
        tail=Tail.from_draws(drawn_MR.astype(np.int32), known_MR),
        label_logprob=np.array(label, np.float32).reshape(count),
        entropy=np.array(entropy, np.float32).reshape(count),
        log_norm=np.array(norms, np.float32).reshape(count, len(capture.temperatures)),
    )


def _row(
    logp_V: NDArray[np.float64], label: int, shift: float, capture: Capture
) -> tuple[Any, ...]:
    """Head ids and log-probabilities, log mass outside, samples, label, entropy, norms."""
    logp_V = _positive(logp_V)
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
    entropy = -float((np.exp(logp_V) * logp_V).sum())
    norms = [_log_sum(logp_V / temperature) for temperature in capture.temperatures]
    found = head, logp_V[head], min(log_tail, 0.0), drawn, logp_V[drawn]
    return (*found, logp_V[label], max(entropy, 0.0), norms)


_SMALLEST, _MISSING = 1e-9, 0.01
"""Least and most mass of the tokens without probability together."""


def _positive(logp_V: NDArray[np.float64]) -> NDArray[np.float64]:
    """Log-probabilities that sum to 1, with no impossible token."""
    none = logp_V == -np.inf
    missing = 1.0 - np.exp(logp_V).sum()
    count = int(none.sum())
    if not count or missing < 0.0:
        logp_V = logp_V - _log_sum(logp_V)
    if count:
        # what rounding or a floor took away belongs to the tokens that lost it
        even = np.log(max(_SMALLEST, min(missing, _MISSING))) - np.log(count)
        logp_V = np.where(none, min(even, logp_V[~none].min()), logp_V)
        logp_V = logp_V - _log_sum(logp_V)  # they may not hold all that is missing
    return logp_V


def _log_sum(values: NDArray[np.float64]) -> float:
    top = values.max()
    if top == -np.inf:
        return -np.inf
    return float(top + np.log(np.exp(values - top).sum()))
