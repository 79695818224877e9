"""Batches hold every sequence once, within the budget and with little padding."""

from __future__ import annotations

import numpy as np
import pytest
from coldstill.stages.capture.forward import batches_of


@pytest.mark.parametrize("budget", [1, 64, 500, 10_000])
def test_every_sequence_comes_once_and_within_the_budget(budget: int) -> None:
    lengths = np.random.default_rng(0).integers(2, 129, 300)
    batches = list(batches_of(lengths, budget))
    assert sorted(np.concatenate(batches).tolist()) == list(range(300))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * lengths[batch].max() <= budget
        assert (np.diff(batch) > 0).all()


def test_documents_of_many_lengths_need_little_padding() -> None:
    lengths = np.random.default_rng(1).integers(16, 1025, 4000)
    cost = sum(len(b) * int(lengths[b].max()) for b in batches_of(lengths, 8192))
    assert cost < 1.09 * lengths.sum()
    in_order = [lengths[i : i + 8] for i in range(0, 4000, 8)]
    assert sum(len(b) * int(b.max()) for b in in_order) > 1.5 * lengths.sum()


def test_packed_sequences_keep_their_order() -> None:
    lengths = np.random.default_rng(2).integers(240, 257, 100)
    lengths[0] = 256
    batches = list(batches_of(lengths, 2048))
    assert np.concatenate(batches).tolist() == list(range(100))
    assert [len(batch) for batch in batches] == [8] * 12 + [4]


def test_a_sequence_longer_than_the_budget_has_its_own_batch() -> None:
    assert [b.tolist() for b in batches_of(np.array([100, 99]), 50)] == [[0], [1]]
    assert list(batches_of(np.zeros(0, np.int64), 50)) == []
