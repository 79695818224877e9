"""The next token inside a chunk, from what the teacher knows where the chunk begins.

There the student has read the first tokens of the chunk, and the teacher's tokens whose spelling
begins with them say how the text goes on: a token of the teacher that the student spells `un`,
`like`, `ly` says `like` after `un`. The token of the text has its exact probability. So has every
other token of the head. Of the rest of the distribution the samples say too little: a token of few
in a thousand is hardly ever drawn. So its mean over all records of the store counts beside them, as
much as `PRIOR_DRAWS` samples.

This is the distribution given that a token of the teacher goes on. Where one ends instead, both
texts have a border, and the next position has a record of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..ragged import places_in
from .known import Entries, sums_at

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from ..schema import Targets
    from .beginnings import Beginnings

PRIOR_DRAWS = 50.0
"""Samples of one position that weigh as much as the mean over the store."""
_LEAST = 1e-9
_Part = tuple["NDArray[np.int64]", "NDArray[np.int64]", "NDArray[np.float64]"]
"""The position, the student's token and its probability."""


@dataclass(frozen=True, slots=True, eq=False)
class Inside:
    """I positions inside chunks."""

    rows_I: NDArray[np.int64]
    """The teacher's record where the chunk begins, as a row of some targets."""
    nodes_I: NDArray[np.int64]
    """What the student has read of the chunk, as a number of `Beginnings`, or -1."""
    depths_I: NDArray[np.int64]
    """Its tokens."""
    labels_I: NDArray[np.int64]
    """The student's label."""
    firsts_I: NDArray[np.int64]
    """The teacher's label where the chunk begins."""
    logprobs_I: NDArray[np.float32]
    """The log-probability of the whole chunk."""


class Continuations:
    """Finds the next tokens by the records of a store."""

    def __init__(self, beginnings: Beginnings, masses_V: NDArray[np.float64], student: int) -> None:
        """Use the beginnings and what the records of a store say on the average.

        masses_V  [V of the teacher] sums of each token's probability over the records
        student   V of the student
        """
        self._beginnings, self._size = beginnings, student
        self._mean_V = masses_V / max(masses_V.sum(), 1e-300)
        token_S = np.repeat(np.arange(len(masses_V)), np.diff(beginnings.offsets_V))
        pairs, inverse = np.unique(
            beginnings.nodes * student + beginnings.nexts, return_inverse=True
        )
        self._next_P = pairs % student
        self._prior_P = sums_at(inverse, self._mean_V[token_S], len(pairs))
        self._offsets_N = np.searchsorted(pairs // student, np.arange(beginnings.count + 1))

    def entries(
        self, targets: Targets, draws: int, inside: Inside
    ) -> tuple[Entries, NDArray[np.float64]]:
        """The next tokens with probabilities that sum to 1 at each position, and [I] their entropy.

        targets  records of the teacher; `inside.rows_I` are rows of them
        draws    samples of each
        """
        rows_I, mean_V = inside.rows_I, self._mean_V
        rest_I = np.exp(targets.log_tail.astype(np.float64))[rows_I]
        outside_I = 1.0 - mean_V[targets.head_ids].sum(1)[rows_I]
        weight = draws / (draws + PRIOR_DRAWS)
        # the mean outside the head, scaled to the mass that is there
        scale_I = rest_I * (1.0 - weight) / np.maximum(outside_I, _LEAST)
        each_I = rest_I * weight / max(1, draws)

        every = np.arange(len(rows_I))
        ids, spelled_I = self._next(inside, every, inside.firsts_I)
        label_I = np.where(spelled_I, targets.label_logprob[rows_I], inside.logprobs_I)
        found = [
            (
                every,
                np.where(spelled_I, ids, inside.labels_I),
                np.exp(label_I.astype(np.float64)).clip(min=1e-300)  # it may be all that is known
                - np.where(spelled_I, mean_V[inside.firsts_I] * scale_I, 0.0),
            ),
            self._prior(inside, scale_I),
        ]
        # what the head has replaces its mean, and the label's own probability all else of it
        slots = targets.head_ids.shape[1]
        at, tokens = np.repeat(every, slots), targets.head_ids[rows_I].ravel().astype(np.int64)
        masses = np.exp(targets.head_logprobs[rows_I].ravel().astype(np.float64))
        found.append(self._known(inside, at, tokens, masses - mean_V[tokens] * scale_I[at]))
        tail = targets.tail
        at, within = places_in(np.diff(tail.offsets)[rows_I])
        place = tail.offsets[rows_I][at] + within
        tokens = tail.ids[place].astype(np.int64)
        found.append(self._known(inside, at, tokens, each_I[at] * tail.counts[place]))
        return self._joined(found, len(rows_I))

    def _next(
        self, inside: Inside, at: NDArray[np.int64], tokens: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """What follows at positions `at` if the teacher's token there is the one given, and whether
        the spelling of that token has the beginning and goes on."""
        known, depths = self._beginnings, inside.depths_I[at]
        step = known.offsets_V[tokens] + depths - 1
        goes_on = (depths > 0) & (step < known.offsets_V[tokens + 1])
        step = np.where(goes_on, step, 0)
        if len(known.nodes) == 0:
            return np.zeros(len(at), np.int64), goes_on
        return known.nexts[step], goes_on & (known.nodes[step] == inside.nodes_I[at])

    def _known(
        self,
        inside: Inside,
        at: NDArray[np.int64],
        tokens: NDArray[np.int64],
        masses: NDArray[np.float64],
    ) -> _Part:
        """Tokens of the teacher, except the one of the text, as the next tokens that they say."""
        ids, kept = self._next(inside, at, tokens)
        kept &= tokens != inside.firsts_I[at]
        return at[kept], ids[kept], masses[kept]

    def _prior(self, inside: Inside, scale_I: NDArray[np.float64]) -> _Part:
        """The mean over the store."""
        nodes = inside.nodes_I.clip(min=0)  # nothing follows the empty beginning
        starts = self._offsets_N[nodes]
        at, within = places_in(self._offsets_N[nodes + 1] - starts)
        place = starts[at] + within
        return at, self._next_P[place], self._prior_P[place] * scale_I[at]

    def _joined(self, parts: Sequence[_Part], count: int) -> tuple[Entries, NDArray[np.float64]]:
        rows, ids, masses = (np.concatenate(column) for column in zip(*parts, strict=True))
        keys, inverse = np.unique(rows * self._size + ids, return_inverse=True)
        # what is taken off again may leave a rounding error
        masses_E = sums_at(inverse, masses, len(keys)).clip(min=0.0)
        totals = sums_at(keys // self._size, masses_E, count)
        kept = masses_E > totals[keys // self._size] * _LEAST
        rows_E = keys[kept] // self._size
        masses_E = masses_E[kept] / sums_at(rows_E, masses_E[kept], count)[rows_E]
        entries = Entries(
            rows_E=rows_E,
            ids_E=keys[kept] % self._size,
            masses_E=masses_E,
            in_head_E=np.ones(len(rows_E), np.bool_),
            counts_E=np.zeros(len(rows_E), np.int64),
            merged_E=np.zeros(len(rows_E)),
        )
        return entries, sums_at(rows_E, -masses_E * np.log(masses_E), count)
