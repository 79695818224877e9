"""The one place where position `t` and token `t + 1` meet.

A causal model's output at position `t` predicts the token at `t + 1` of the same document. The
step is taken here, once, when sequences are packed (`supervised_positions`) and when labels are
wanted (`labels`); nothing else in the project shifts anything.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .schema import Sequences


def supervised_positions(
    learned_T: NDArray[np.bool_], document_starts_D: NDArray[np.int32]
) -> NDArray[np.int32]:
    """[M] the positions whose *next* token is to be learned.

    learned_T          which tokens are to be learned (for a chat: the assistant's)
    document_starts_D  where documents begin; a document's first token has no position before it
                       in its own document, so it is nobody's label
    """
    predictable_T = learned_T.copy()
    predictable_T[document_starts_D] = False
    return (np.flatnonzero(predictable_T) - 1).astype(np.int32)


def labels(sequences: Sequences) -> NDArray[np.int32]:
    """[M] the token that really came next at each supervised position."""
    starts_M = np.repeat(sequences.tokens.offsets[:-1], sequences.positions.lengths)
    flat: NDArray[np.int32] = sequences.tokens.values[starts_M + label_places(sequences)]
    return flat


def label_places(sequences: Sequences) -> NDArray[np.int32]:
    """[M] where in its sequence that token stands."""
    return sequences.positions.values + np.int32(1)
