from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from coldstill.data.schema import Ragged


def lists(ragged: Ragged) -> list[list[Any]]:
    return [row.tolist() for row in ragged]


def random_rows(random: np.random.Generator) -> list[list[int]]:
    count = int(random.integers(0, 9))
    return [random.integers(0, 99, int(random.integers(0, 5))).tolist() for _ in range(count)]


def test_rows_are_read_as_they_were_laid_out() -> None:
    random = np.random.default_rng(0)
    for _ in range(100):
        rows = random_rows(random)
        ragged = Ragged.from_rows(rows, np.int32)
        assert lists(ragged) == rows
        assert len(ragged) == len(rows)
        assert ragged.values.dtype == np.int32
        assert ragged.offsets.dtype == np.int64
        assert ragged.lengths.tolist() == [len(row) for row in rows]


def test_take_gives_any_rows_in_any_order_any_number_of_times() -> None:
    random = np.random.default_rng(1)
    for _ in range(200):
        rows = [*random_rows(random), []]
        chosen = random.integers(0, len(rows), int(random.integers(0, 12)))
        ragged = Ragged.from_rows(rows, np.int64)
        taken = ragged.take(chosen)
        assert lists(taken) == [rows[i] for i in chosen]
        assert taken.offsets.dtype == np.int64
        flat = [x for i in chosen for x in rows[i]]
        assert ragged.values[ragged.flat_indices(chosen)].tolist() == flat


def test_take_keeps_the_other_axes_of_the_values() -> None:
    ragged = Ragged(np.arange(12).reshape(6, 2), np.array([0, 1, 1, 4, 6]))
    taken = ragged.take(np.array([3, 1, 0, 3]))
    assert lists(taken) == [[[8, 9], [10, 11]], [], [[0, 1]], [[8, 9], [10, 11]]]


def test_concatenate_is_the_sum_of_the_lists() -> None:
    random = np.random.default_rng(2)
    for _ in range(100):
        parts = [random_rows(random) for _ in range(int(random.integers(1, 5)))]
        joined = Ragged.concatenate([Ragged.from_rows(rows, np.int32) for rows in parts])
        assert lists(joined) == [row for rows in parts for row in rows]
        assert joined.offsets[0] == 0
        assert joined.offsets[-1] == len(joined.values)


def test_a_missing_row_is_an_index_error() -> None:
    ragged = Ragged.from_rows([[1], [2, 3]], np.int32)
    for index in (-1, 2):
        with pytest.raises(IndexError):
            ragged[index]
