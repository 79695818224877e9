"""The table of columns that codecs and formats exchange: a block of sequences and targets."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

import numpy as np

from .branches import Branches
from .ragged import Ragged
from .schema import Sequences, sequence_hash

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

Columns = dict[str, "NDArray[Any] | Ragged"]
"""Columns by name: one value per sequence `[N]`, or one list per sequence (`Ragged`)."""

_SEQUENCE_COLUMNS = {
    "sequence_id": "ids",
    "token_ids": "tokens",
    "document_starts": "document_starts",
    "document_ids": "document_ids",
    "positions": "positions",
    "sequence_hash": "hashes",
}
_BRANCH_COLUMNS = {f"branch_{each.name}": each.name for each in fields(Branches)}


def from_sequences(sequences: Sequences) -> Columns:
    """The columns that describe the sequences themselves."""
    own: Columns = {column: getattr(sequences, name) for column, name in _SEQUENCE_COLUMNS.items()}
    if sequences.branches is not None:
        beside = sequences.branches
        own |= {column: getattr(beside, name) for column, name in _BRANCH_COLUMNS.items()}
    return own


def to_sequences(columns: Columns) -> Sequences:
    """The sequences of a block. `check_hashes` compares them with what was written. Raises
    ValueError if there are branches that do not fit together."""
    values: dict[str, Any] = {name: columns[c] for c, name in _SEQUENCE_COLUMNS.items()}
    return Sequences(**values, branches=_branches(columns))


def _branches(columns: Columns) -> Branches | None:
    if not columns.keys() & _BRANCH_COLUMNS.keys():
        return None
    found = Branches(
        **{
            name: expect_lists(columns, column, np.float32 if name == "weights" else np.int32)
            for column, name in _BRANCH_COLUMNS.items()
        }
    )
    borders = found.places.offsets
    if any(not np.array_equal(each.offsets, borders) for each in (found.sizes, found.weights)):
        raise ValueError("columns of branches have different numbers of entries")
    if found.sizes.values.min(initial=2) < 2:
        raise ValueError("column 'branch_sizes' has a branch of less than two tokens")
    ends = list_offsets(found.sizes.values)[borders]
    if not np.array_equal(found.tokens.offsets, ends):
        raise ValueError("column 'branch_tokens' does not have as many tokens as its branches")
    return found


def check_hashes(sequences: Sequences) -> None:
    """Compare each sequence with its stored hash. Raises ValueError if a sequence is not what was
    written (which)."""
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
    """Per-position arrays `[M, ...]` as lists with the row borders of the supervised positions."""
    return {name: Ragged(array, positions.offsets) for name, array in values.items()}


def to_positions(columns: Columns, positions: Ragged) -> dict[str, NDArray[Any]]:
    """The per-position arrays `[M, ...]`: the lists with the row borders of the positions."""
    fitting: dict[int, bool] = {}  # by the identity of the borders, which columns share
    arrays = {}
    for name, column in columns.items():
        if isinstance(column, Ragged):
            borders = column.offsets
            if id(borders) not in fitting:
                fitting[id(borders)] = np.array_equal(borders, positions.offsets)
            if fitting[id(borders)]:
                arrays[name] = column.values
    return arrays


def expect_column(
    arrays: Mapping[str, NDArray[Any]], name: str, shape: tuple[int, ...], dtype: Any
) -> NDArray[Any]:
    """One per-position array. An array of width 0 is not stored and is made here. Raises ValueError
    if the column is missing, or has another shape or dtype."""
    if 0 in shape[1:]:
        return np.zeros(shape, dtype)
    array = arrays.get(name)
    if array is None or array.shape != shape or array.dtype != dtype:
        found = "nothing" if array is None else f"{array.dtype} {array.shape}"
        raise ValueError(
            f"column '{name}' should be {np.dtype(dtype).name} {shape}, an entry for each "
            f"supervised position: {found}"
        )
    return as_given(array)


def list_offsets(sizes: NDArray[Any]) -> NDArray[np.int64]:
    """[M + 1] borders of lists with these lengths. Raises ValueError if a length is below 0."""
    if sizes.min(initial=0) < 0:
        raise ValueError("a list has a length below 0")
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes, dtype=np.int64)])


def expect_lists(columns: Columns, name: str, dtype: Any) -> Ragged:
    """A column of lists of numbers. Raises ValueError if it is missing, or has another dtype."""
    column = columns.get(name)
    if not isinstance(column, Ragged) or column.values.dtype != dtype or column.values.ndim != 1:
        raise ValueError(f"column '{name}' should be lists of {np.dtype(dtype).name}")
    return Ragged(as_given(column.values), column.offsets)


def expect_list(
    columns: Columns, name: str, offsets: NDArray[np.int64], dtype: Any
) -> NDArray[Any]:
    """The entries of a column of lists with these borders. Raises ValueError if the column is
    missing, or has other borders or another dtype."""
    column = expect_lists(columns, name, dtype)
    if not np.array_equal(column.offsets, offsets):
        raise ValueError(f"column '{name}' should have {offsets[-1]} entries in its lists")
    return column.values


def as_given(array: NDArray[Any]) -> NDArray[Any]:
    """The same numbers as compiled code takes them: without gaps. Mostly the array itself."""
    flags = array.flags
    return array if flags.c_contiguous and flags.aligned else array.copy()
