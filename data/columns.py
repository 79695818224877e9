"""The table that every store holds: one row a sequence, flat columns or lists.

A codec decides which columns there are, a store how they lie on disk; neither knows the other. The
columns that describe sequences, as `plain` writes them, are named here: a prepared corpus has no
others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .ragged import Ragged
from .schema import Sequences, sequence_hash

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

Columns = dict[str, "NDArray[Any] | Ragged"]
"""Column name to one value per sequence `[N]`, or one list per sequence (`Ragged`)."""

_SEQUENCE_COLUMNS = {
    "sequence_id": "ids",
    "token_ids": "tokens",
    "document_starts": "document_starts",
    "document_ids": "document_ids",
    "positions": "positions",
    "sequence_hash": "hashes",
}


def from_sequences(sequences: Sequences) -> Columns:
    """The columns that describe the sequences themselves."""
    return {column: getattr(sequences, name) for column, name in _SEQUENCE_COLUMNS.items()}


def to_sequences(columns: Columns) -> Sequences:
    """Rebuild the sequences of a block; `check_hashes` says whether they are what was written."""
    values: dict[str, Any] = {name: columns[c] for c, name in _SEQUENCE_COLUMNS.items()}
    return Sequences(**values)


def check_hashes(sequences: Sequences) -> None:
    """Check each sequence against its own hash.

    Raises
        ValueError: one is not what was written (which)
    """
    for row in range(len(sequences)):
        expected = sequence_hash(
            sequences.tokens[row], sequences.document_starts[row], sequences.positions[row]
        )
        if expected != int(sequences.hashes[row]):
            raise ValueError(
                f"sequence {int(sequences.ids[row])} is not what was written: its tokens, document "
                "borders or positions do not match their hash"
            )


def from_positions(values: Mapping[str, NDArray[Any]], positions: Ragged) -> Columns:
    """Give each per-position array `[M, ...]` the row borders of the supervised positions."""
    return {name: Ragged(array, positions.offsets) for name, array in values.items()}


def to_positions(columns: Columns, positions: Ragged) -> dict[str, NDArray[Any]]:
    """The per-position arrays `[M, ...]` of a block: the lists that have its row borders."""
    return {
        name: column.values
        for name, column in columns.items()
        if isinstance(column, Ragged) and np.array_equal(column.offsets, positions.offsets)
    }


def expect_column(
    arrays: Mapping[str, NDArray[Any]], name: str, shape: tuple[int, ...], dtype: Any
) -> NDArray[Any]:
    """One per-position array; without width it need not be there.

    Raises
        ValueError: it is not there, or of another shape or type
    """
    if 0 in shape[1:]:
        return np.zeros(shape, dtype)
    array = arrays.get(name)
    if array is None or array.shape != shape or array.dtype != dtype:
        found = "nothing" if array is None else f"{array.dtype} {array.shape}"
        raise ValueError(
            f"column '{name}' should be {np.dtype(dtype).name} {shape}, an entry for each "
            f"supervised position: {found}"
        )
    return array
