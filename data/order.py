"""The order in which a student sees a store: a pure function of seed, epoch and sizes.

Training can therefore resume in the middle of an epoch from two integers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

WINDOW = 8
"""Shards that are shuffled together: enough to break up their order, few enough to stay in the page
cache, or in the local cache of a remote store."""
MIXED_BLOCKS = 16
"""Blocks whose sequences are shuffled together. Each block is read and decoded once per epoch, and
only these blocks must be in memory."""


def epoch_order(
    seed: int,
    epoch: int,
    sequences: int,
    shard_sequences: int,
    block_sequences: int,
    *,
    window: int = WINDOW,
) -> NDArray[np.int64]:
    """[N] every sequence exactly once: shards are shuffled, then the blocks of a window of shards,
    then the sequences of a few blocks.

    sequences        N, sequences of the store
    shard_sequences  sequences of a shard; the last shard may hold fewer
    block_sequences  sequences of a block; the last block of a shard may hold fewer
    window           shards that are shuffled together
    """
    random = np.random.Generator(np.random.PCG64([seed, epoch]))
    shards = random.permutation(-(-sequences // shard_sequences))
    order: list[NDArray[np.int64]] = []
    for start in range(0, len(shards), window):
        blocks = [
            np.arange(first, min(first + block_sequences, end))
            for shard in shards[start : start + window].tolist()
            for end in (min((shard + 1) * shard_sequences, sequences),)
            for first in range(shard * shard_sequences, end, block_sequences)
        ]
        mixed = [blocks[i] for i in random.permutation(len(blocks))]
        order.extend(
            random.permutation(np.concatenate(mixed[few : few + MIXED_BLOCKS]))
            for few in range(0, len(mixed), MIXED_BLOCKS)
        )
    return np.concatenate(order) if order else np.zeros(0, np.int64)


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
