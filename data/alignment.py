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


def label_places(sequences: Sequences) -> NDArray[np.int32]:
    """[M] index of each label in its sequence."""
    return sequences.positions.values + np.int32(1)
