"""The only place that relates position `t` to token `t + 1`.

The output of a causal model at position `t` predicts token `t + 1` of the same document. The shift
is made here: when sequences are packed (`supervised_positions`) and when labels are needed
(`labels`). No other file shifts anything.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .ragged import Ragged
    from .schema import Sequences


def supervised_positions(
    learned_T: NDArray[np.bool_], document_starts_D: NDArray[np.int32]
) -> NDArray[np.int32]:
    """[M] the positions whose *next* token is learned.

    learned_T          which tokens are learned (in a chat: the assistant's)
    document_starts_D  where documents begin; the first token of a document is never a label, since
                       its document has no position before it
    """
    predictable_T = learned_T.copy()
    predictable_T[document_starts_D] = False
    return (np.flatnonzero(predictable_T) - 1).astype(np.int32)


def labels(sequences: Sequences) -> NDArray[np.int32]:
    """[M] the token that follows each supervised position."""
    tokens = sequences.tokens
    flat: NDArray[np.int32] = tokens.values[label_indices(tokens.offsets, sequences.positions)]
    return flat


def label_indices(offsets: NDArray[np.int64], positions: Ragged) -> NDArray[np.int64]:
    """[M] index of each label among the tokens of all sequences.

    offsets    [N + 1] first token of each sequence
    positions  [N][M] the supervised positions
    """
    indices_M: NDArray[np.int64] = np.repeat(offsets[:-1], positions.lengths)
    indices_M += positions.values
    indices_M += 1
    return indices_M


READINGS = {"own": 0, "next": 1}
"""How other programs store the row of a token: at the token that it is about, or at the one before.
The value is the distance from the token beside which the row is stored to the one it is about."""


def row_positions(
    tokens: Ragged, places: Ragged, document_starts: Ragged | None, distance: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """The position and the label of rows that another program stored beside tokens.

    tokens           [N][T] token ids of the records
    places           [N][S] index of the token beside which each row is stored
    document_starts  [N][D] where documents begin; None if each record is one
    distance         from the token beside which a row is stored to the one that it is about; a
                     value of `READINGS`, or another one to compare with

    Returns position [S] in its record, label [S], and whether [S] the row has both: its label is in
    the record and begins no document.
    """
    record_S = np.repeat(np.arange(len(places)), places.lengths)
    label_place_S = places.values + distance
    has_S = (label_place_S >= 1) & (label_place_S < tokens.lengths[record_S])
    flat_S = np.where(has_S, tokens.offsets[record_S] + label_place_S, 0)
    if document_starts is not None and len(document_starts.values):
        borders = np.zeros(len(tokens.values) + 1, np.bool_)
        rows = np.repeat(np.arange(len(document_starts)), document_starts.lengths)
        borders[tokens.offsets[rows] + document_starts.values] = True
        has_S &= ~borders[flat_S]
    if not len(tokens.values):
        return label_place_S - 1, np.zeros(len(record_S), np.int64), has_S
    return label_place_S - 1, tokens.values[flat_S], has_S


def label_places(sequences: Sequences) -> NDArray[np.int32]:
    """[M] index of each label in its sequence."""
    return sequences.positions.values + np.int32(1)
