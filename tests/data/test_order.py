from __future__ import annotations

import itertools
import tracemalloc
from typing import TYPE_CHECKING

import numpy as np
import pytest
from coldstill.data.order import (
    MIXED_BLOCKS,
    WINDOW,
    epoch_order,
    epoch_windows,
    joined,
    regrouped,
    uniform,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

Grid = tuple["NDArray[np.int64]", "NDArray[np.int32]"]

SIZES = [(0, 1, 1), (0, 5, 2), (1, 1, 1), (1, 9, 4), (7, 7, 7), (8, 7, 3), (40, 1, 1), (97, 5, 2)]
SIZES += [(200, 16, 16), (200, 16, 5), (33, 100, 7), (33, 100, 200), (900, 64, 4)]


@pytest.mark.parametrize(("sequences", "shard", "block"), SIZES)
def test_an_epoch_visits_every_sequence_once_with_few_open_shards_and_blocks(
    sequences: int, shard: int, block: int
) -> None:
    for epoch, window in ((0, 1), (1, 3), (2, WINDOW)):
        order = epoch_order(5, epoch, sequences, shard, block, window=window)
        assert sorted(order.tolist()) == list(range(sequences))
        assert order.dtype == np.int64
        assert open_at_once(order // shard) <= window
        per_shard = -(-shard // block)
        assert open_at_once(order // shard * per_shard + order % shard // block) <= MIXED_BLOCKS


def open_at_once(part_N: NDArray[np.int64]) -> int:
    """How many parts have begun and not ended, at most, if each opens once and stays open."""
    spans = [np.flatnonzero(part_N == part)[[0, -1]] for part in np.unique(part_N)]
    places = range(len(part_N))
    return max((sum(first <= p <= last for first, last in spans) for p in places), default=0)


def test_shards_of_a_window_are_mixed_and_all_shards_are_shuffled() -> None:
    shard_N = epoch_order(0, 0, 64 * 16, 16, 4, window=4) // 16
    for start in range(0, len(shard_N), 64):
        assert len(set(shard_N[start : start + 64].tolist())) == 4
        assert (np.diff(shard_N[start : start + 64]) != 0).sum() > 24
    first_seen = list(dict.fromkeys(shard_N.tolist()))
    assert first_seen != sorted(first_seen)


def test_order_depends_only_on_seed_and_epoch() -> None:
    orders = {(s, e): tuple(epoch_order(s, e, 50, 8, 3)) for s in range(4) for e in range(4)}
    assert len(set(orders.values())) == len(orders)
    assert orders == {(s, e): tuple(epoch_order(s, e, 50, 8, 3)) for s, e in orders}


def whole_order(
    seed: int, epoch: int, sequences: int, shard: int, block: int, window: int
) -> list[int]:
    """The order as it was first written, with every index of the epoch in memory. Trainings whose
    checkpoints were made with it continue in the same order."""
    random = np.random.Generator(np.random.PCG64([seed, epoch]))
    shards = random.permutation(-(-sequences // shard)).tolist()
    order: list[int] = []
    for start in range(0, len(shards), window):
        blocks = [
            np.arange(first, min(first + block, end))
            for index in shards[start : start + window]
            for end in (min((index + 1) * shard, sequences),)
            for first in range(index * shard, end, block)
        ]
        mixed = [blocks[i] for i in random.permutation(len(blocks))]
        for few in range(0, len(mixed), 16):
            order += random.permutation(np.concatenate(mixed[few : few + 16])).tolist()
    return order


@pytest.mark.parametrize(("sequences", "shard", "block"), [*SIZES, (5000, 999, 16)])
def test_windows_continue_the_order_from_any_sequence(
    sequences: int, shard: int, block: int
) -> None:
    for seed, epoch, window in ((5, 0, WINDOW), (2**40, 3, 3)):
        whole = whole_order(seed, epoch, sequences, shard, block, window)
        for seen in {0, sequences // 3, sequences - 1, sequences} - {-1}:
            windows = epoch_windows(seed, epoch, sequences, shard, block, window=window, seen=seen)
            parts = list(windows)
            assert joined(parts).tolist() == whole[seen:]
            assert all(0 < len(part) <= window * shard for part in parts)


def test_every_place_of_an_epoch_is_equally_likely_for_every_sequence() -> None:
    """Over epochs, for the first, a middle and the last sequence: chi-squared of 19 degrees."""
    orders = np.array([epoch_order(9, epoch, 20, 5, 2, window=2) for epoch in range(4000)])
    places = np.argsort(orders, axis=1)
    for sequence in (0, 7, 19):
        counts = np.bincount(places[:, sequence], minlength=20)
        assert 4 < ((counts - 200.0) ** 2 / 200.0).sum() < 50


def test_a_billion_sequences_take_the_memory_of_a_window() -> None:
    shard, block = 10_000, 16
    tracemalloc.start()
    try:
        windows = epoch_windows(0, 0, 10**9, shard, block)
        steps = list(itertools.islice(map(np.sum, regrouped(windows, 100)), 2400))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(set(steps)) > 2300  # three windows
    assert peak < 8 * (10**9 // shard) + 6 * 8 * WINDOW * shard


def test_regrouped_parts_keep_every_number_in_its_place() -> None:
    parts = [np.arange(0, 3), np.arange(3, 3), np.arange(3, 20), np.arange(20, 21)]
    for size in (1, 2, 3, 7, 21, 50):
        groups = list(regrouped(parts, size))
        assert joined(groups).tolist() == list(range(21))
        assert {len(group) for group in groups[:-1]} <= {size}
        assert 0 < len(groups[-1]) <= size
    assert list(regrouped([], 4)) == []


def grid(sequences: int, positions: int, first: int = 0) -> Grid:
    ids = np.repeat(np.arange(first, first + sequences), positions)
    return ids, np.tile(np.arange(positions, dtype=np.int32), sequences)


def split_mix(state: int) -> int:
    """SplitMix64 in Python's own integers."""
    mask = 2**64 - 1
    state = (state + 0x9E3779B97F4A7C15) & mask
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
    return state ^ (state >> 31)


def test_numbers_are_those_of_plain_integer_arithmetic() -> None:
    for seed in (0, 1, 2**63 + 5):
        ids, positions = grid(4, 3, first=2**40)
        expected = [
            (split_mix(split_mix(split_mix(seed) ^ int(i)) ^ int(p)) >> 11) / 2**53
            for i, p in zip(ids, positions, strict=True)
        ]
        assert uniform(seed, ids, positions).tolist() == expected


def test_numbers_are_uniform() -> None:
    numbers = uniform(3, *grid(1000, 200))
    assert numbers.dtype == np.float64
    assert 0.0 <= numbers.min() < 1e-4
    assert 1 - 1e-4 < numbers.max() < 1.0
    deviation = np.sqrt(1 / 12 / len(numbers))
    assert abs(numbers.mean() - 0.5) < 4 * deviation
    assert abs(numbers.var() - 1 / 12) < 0.001
    counts, _ = np.histogram(numbers, bins=100, range=(0, 1))
    chi_squared = ((counts - 2000.0) ** 2 / 2000.0).sum()
    assert 55 < chi_squared < 160  # 99 degrees of freedom, five deviations either way


def test_no_two_places_share_a_number_and_neighbours_are_unrelated() -> None:
    numbers = uniform(0, *grid(400, 256)).reshape(400, 256)
    assert len(np.unique(numbers)) == numbers.size
    next_seed = uniform(1, *grid(400, 256)).reshape(400, 256)
    pairs = {
        "positions": (numbers[:, :-1], numbers[:, 1:]),
        "sequences": (numbers[:-1], numbers[1:]),
        "seeds": (numbers, next_seed),
        "swapped": (numbers[:256], numbers[:256].T),
    }
    for name, (one, other) in pairs.items():
        off_diagonal = one.ravel() != other.ravel()
        related = np.corrcoef(one.ravel()[off_diagonal], other.ravel()[off_diagonal])[0, 1]
        assert abs(related) < 0.02, name


def test_a_number_does_not_depend_on_its_batch() -> None:
    ids, positions = grid(9, 7)
    whole = uniform(2, ids, positions)
    shuffled = np.random.default_rng(0).permutation(len(ids))
    assert np.array_equal(uniform(2, ids[shuffled], positions[shuffled]), whole[shuffled])
    one_by_one = [uniform(2, ids[i : i + 1], positions[i : i + 1])[0] for i in range(len(ids))]
    assert one_by_one == whole.tolist()
    assert len(uniform(2, ids[:0], positions[:0])) == 0
