from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from coldstill.data.columns import (
    check_hashes,
    from_positions,
    from_sequences,
    to_positions,
    to_sequences,
)
from coldstill.data.ragged import Ragged
from coldstill.data.schema import Sequences
from oracles import random_sequences


def test_sequences_become_columns_and_come_back() -> None:
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


def test_position_columns_have_the_borders_of_the_positions() -> None:
    sequences = random_sequences(0, 5)
    values = np.arange(len(sequences.positions.values))
    columns = from_sequences(sequences) | from_positions({"x": values}, sequences.positions)
    column = columns["x"]
    assert isinstance(column, Ragged)
    assert column.lengths.tolist() == sequences.positions.lengths.tolist()
    assert to_positions(columns, sequences.positions)["x"] is values
    assert list(to_positions(columns, sequences.positions)) == ["x"]


def test_a_column_with_other_borders_is_named() -> None:
    sequences = random_sequences(0, 5)
    shifted = Ragged(sequences.positions.values, np.roll(sequences.positions.offsets, 1))
    for wrong in (shifted, np.arange(5)):
        with pytest.raises(ValueError, match="'x' does not have one entry per supervised position"):
            to_positions({"x": wrong}, sequences.positions)


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
