"""The order in which a student sees a store: a pure function of seed, epoch and sizes.

Training can therefore resume in the middle of an epoch from two integers.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray

WINDOW = 8
"""Shards that are shuffled together: enough to break up their order, few enough to stay in the page
cache, or in the local cache of a remote store."""
MIXED_BLOCKS = 16
"""Blocks whose sequences are shuffled together. Each block is read and decoded once per epoch, and
only these blocks must be in memory."""


def epoch_windows(
    seed: int,
    epoch: int,
    sequences: int,
    shard_sequences: int,
    block_sequences: int,
    *,
    window: int = WINDOW,
    seen: int = 0,
) -> Iterator[NDArray[np.int64]]:
    """Every sequence exactly once, a window of shards at a time: shards are shuffled, then the
    blocks of a window, then the sequences of a few blocks.

    In memory are one window and the shuffled shards (8 bytes each), so an epoch may have any number
    of sequences.

    sequences        N, sequences of the store
    shard_sequences  sequences of a shard; the last shard may hold fewer
    block_sequences  sequences of a block; the last block of a shard may hold fewer
    window           shards that are shuffled together
    seen             sequences at the start of the order that are left out. Their windows are made
                     and dropped, because each one continues the random numbers of the one before.
    """
    random = np.random.Generator(np.random.PCG64([seed, epoch]))
    shards = random.permutation(-(-sequences // shard_sequences))
    within_B = np.arange(0, shard_sequences, block_sequences)
    for start in range(0, len(shards), window):
        first_W1 = shards[start : start + window, None] * shard_sequences
        end_W1 = np.minimum(first_W1 + shard_sequences, sequences)
        first_WB = first_W1 + within_B
        size_WB = np.minimum(first_WB + block_sequences, end_W1) - first_WB
        exists_WB = size_WB > 0
        mixed = random.permutation(np.count_nonzero(exists_WB))
        firsts, sizes = first_WB[exists_WB][mixed], size_WB[exists_WB][mixed]
        ends = np.cumsum(sizes)
        order = np.repeat(firsts - (ends - sizes), sizes) + np.arange(ends[-1])
        borders = [0, *ends[MIXED_BLOCKS - 1 : -1 : MIXED_BLOCKS].tolist(), len(order)]
        for one, next_one in itertools.pairwise(borders):
            random.shuffle(order[one:next_one])
        if seen < len(order):
            yield order[seen:]
        seen = max(0, seen - len(order))


def epoch_order(
    seed: int,
    epoch: int,
    sequences: int,
    shard_sequences: int,
    block_sequences: int,
    *,
    window: int = WINDOW,
) -> NDArray[np.int64]:
    """[N] all of `epoch_windows` in one array, 8 bytes a sequence."""
    windows = epoch_windows(seed, epoch, sequences, shard_sequences, block_sequences, window=window)
    return joined(windows)


def joined(parts: Iterable[NDArray[np.int64]]) -> NDArray[np.int64]:
    """All parts in one array."""
    return np.concatenate([np.zeros(0, np.int64), *parts])


def regrouped(parts: Iterable[NDArray[np.int64]], size: int) -> Iterator[NDArray[np.int64]]:
    """The same numbers in the same order, `size` at a time; the last part may hold fewer."""
    waiting, count = [np.zeros(0, np.int64)], 0
    for part in parts:
        waiting.append(part)
        count += len(part)
        if count < size:
            continue
        whole = np.concatenate(waiting)
        full = count - count % size
        yield from (whole[start : start + size] for start in range(0, full, size))
        waiting, count = [whole[full:]], count - full
    if count:
        yield np.concatenate(waiting)


def uniform(seed: int, ids: NDArray[np.int64], positions: NDArray[np.int32]) -> NDArray[np.float64]:
    """[M] one number in [0, 1), a function of seed, sequence id and position only.

    The generator is counter-based (the finalizer of SplitMix64, applied once per input), so that
    samples do not depend on batch size, order or number of workers.
    """
    with np.errstate(over="ignore"):
        state = _mix(np.full(len(ids), seed & (2**64 - 1), dtype=np.uint64))
        state = _mix(state ^ ids.astype(np.uint64))
        state = _mix(state ^ positions.astype(np.uint64))
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    state = state + np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def systematic(
    rows: NDArray[np.int64],
    weights: NDArray[np.float64],
    uniform_D: NDArray[np.float64],
    draws: int | NDArray[np.int64],
) -> NDArray[np.int64]:
    """How often each entry is drawn by equally spaced points with one random shift a position.

    rows     the position of each entry, not decreasing; every position has some
    weights  at least one is above 0 at each position
    draws    points of each position, or [D] their numbers
    """
    count = len(uniform_D)
    draws_D = np.broadcast_to(np.asarray(draws, np.int64), count)
    totals = np.bincount(rows, weights, minlength=count)
    before = np.cumsum(weights) - weights
    firsts = np.searchsorted(rows, np.arange(count))
    ends = before + weights - before[firsts][rows]
    shares = ends / np.maximum(totals, 1e-300)[rows] * draws_D[rows]
    # the points are shift, shift + 1, ...: those below the end of an entry
    below = np.ceil(shares - uniform_D[rows]).astype(np.int64).clip(0, draws_D[rows])
    lasts = np.append(firsts[1:], len(rows))[:count] - 1
    below[lasts] = draws_D  # rounding must not lose the last point
    drawn = np.diff(below, prepend=0)
    drawn[firsts] = below[firsts]
    return drawn.clip(min=0)
