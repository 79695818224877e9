from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from coldstill.data.schema import (
    Ragged,
    Sequences,
    check_hashes,
    expect_column,
    from_positions,
    from_sequences,
    to_positions,
    to_sequences,
)
from oracles import random_sequences


def test_sequences_are_converted_to_columns_and_back() -> None:
    sequences = random_sequences(0, 7)
    columns = from_sequences(sequences)
    assert set(columns) == {
        "sequence_id",
        "token_ids",
        "document_starts",
        "document_ids",
        "positions",
        "sequence_hash",
    }
    back = to_sequences(columns)
    for f in fields(Sequences):
        assert getattr(back, f.name) is getattr(sequences, f.name)


def test_position_columns_are_the_lists_with_the_borders_of_the_positions() -> None:
    sequences = random_sequences(0, 5)
    positions = sequences.positions
    values = np.arange(len(positions.values))
    columns = from_sequences(sequences) | from_positions({"x": values}, positions)
    assert columns["x"].offsets is positions.offsets  # type: ignore[union-attr]
    columns["shifted"] = Ragged(positions.values, np.roll(positions.offsets, 1))
    found = to_positions(columns | {"flat": np.arange(5)}, positions)
    assert list(found) == ["positions", "x"]
    assert found["x"] is values


def test_a_column_of_a_wrong_shape_or_type_is_named() -> None:
    arrays = {"x": np.zeros((3, 2), np.int32)}
    assert expect_column(arrays, "x", (3, 2), np.int32) is arrays["x"]
    assert expect_column(arrays, "none", (3, 0), np.int32).shape == (3, 0)
    for shape, dtype in (((3, 3), np.int32), ((2, 2), np.int32), ((3, 2), np.uint32)):
        with pytest.raises(ValueError, match=r"'x' should be .*: int32 \(3, 2\)"):
            expect_column(arrays, "x", shape, dtype)
    with pytest.raises(ValueError, match=r"'y' should be .*: nothing"):
        expect_column(arrays, "y", (3, 2), np.int32)


@pytest.mark.parametrize("name", ["tokens", "document_starts", "positions"])
def test_a_sequence_that_is_not_what_was_written_is_named(name: str) -> None:
    sequences = random_sequences(0, 6)
    check_hashes(sequences)
    column = getattr(sequences, name)
    row = int(np.flatnonzero(column.lengths)[-1])
    values = column.values.copy()
    values[column.offsets[row]] += 1
    changes: dict[str, Any] = {name: Ragged(values, column.offsets)}
    changed = replace(sequences, ids=sequences.ids + 1000, **changes)
    with pytest.raises(ValueError, match=f"sequence {1000 + row} is not what was written"):
        check_hashes(changed)
