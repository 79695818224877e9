"""Draws the branches of a store: words beside the text that the student spells with several tokens.

The records say how probable such words are at every position. Drawing them by equally spaced points
over a whole sequence gives each word its share of the branches, without bias, and any number of
branches that the training can pay for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..branches import Branches
from ..order import systematic, uniform
from ..ragged import Ragged, places_in
from .known import known_tokens, sums_at

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..schema import Capture, Sequences, Targets
    from .mapping import TokenMap

DRAWS = 4.0
"""Most branches of a sequence for each 1 of the probability that such words have there."""
_SEED = 0x4252_414E_4348
"""Added to the capture's seed: draws must be independent of those of the capture."""


def drawn_branches(
    targets: Targets,
    old: Capture,
    table: TokenMap,
    spelled_V: NDArray[np.float64],
    sequences: Sequences,
    begins: NDArray[np.int64],
    share: float,
    length: int,
) -> Branches:
    """The branches of the student's sequences.

    targets    the teacher's D records where chunks begin that have one, in order
    old        their capture
    spelled_V  [V of the teacher] share of each token's probability that goes to the first token of
               its spelling (`KnownTokens.spelled`). The rest is of longer tokens of the student
    sequences  the student's
    begins     [D] the student's supervised positions that have these records
    share      most branches of a sequence for each of its tokens
    length     tokens of the longest sequence. A word that would be read beyond them is left out: a
               student need not have more positions
    """
    count = len(sequences)
    rows, words, masses, _ = known_tokens(targets, old)
    masses = masses * spelled_V[words]
    further_V = np.diff(table.beginnings.offsets_V)
    # a word of one token is a sample of its position already
    kept = (further_V[words] > 0) & (table.first_V[words] >= 0)
    kept &= masses >= np.finfo(np.float32).tiny  # a smaller weight would be 0 in the store
    kept &= sequences.positions.values[begins[rows]] + further_V[words] < length
    order = np.flatnonzero(kept)[np.argsort(rows[kept], kind="stable")]
    at, words, masses = begins[rows[order]], words[order], masses[order]
    sequence_E = np.searchsorted(sequences.positions.offsets, at, side="right") - 1
    sums_N = sums_at(sequence_E, masses, count)
    most_N = np.ceil(np.minimum(share * sequences.tokens.lengths, DRAWS * sums_N))
    points_N = most_N.astype(np.int64)
    shift_N = uniform(old.seed + _SEED, sequences.ids, np.zeros(count, np.int32))
    some, place_E = np.unique(sequence_E, return_inverse=True)  # the sequences that have any
    drawn_E = systematic(place_E, masses, shift_N[some], points_N[some])
    found = np.flatnonzero(drawn_E)
    words, sequence_B = words[found], sequence_E[found]
    sizes_B = further_V[words] + 1
    tokens = np.empty(int(sizes_B.sum()), np.int32)
    branch, within = places_in(sizes_B)
    further = table.beginnings.offsets_V[words][branch] + within - 1
    tokens[within == 0] = table.first_V[words]
    tokens[within > 0] = table.beginnings.nexts[further[within > 0]]
    each_B = (sums_N / np.maximum(points_N, 1))[sequence_B]
    borders = np.append(0, np.cumsum(np.bincount(sequence_B, minlength=count), dtype=np.int64))
    ends = np.append(0, np.cumsum(sizes_B, dtype=np.int64))
    return Branches(
        places=Ragged(sequences.positions.values[at[found]].astype(np.int32), borders),
        sizes=Ragged(sizes_B.astype(np.int32), borders),
        tokens=Ragged(tokens, ends[borders]),
        weights=Ragged((each_B * drawn_E[found]).astype(np.float32), borders),
    )
