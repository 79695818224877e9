"""Packs the tail samples of `compact`: distinct ids, how often each was drawn, how many there are.

Each id has one bit: whether it was drawn more than once. Of such ids, the count less 2 is stored.
That of the last one of a position is not: it follows from R.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ...columns import expect_list, list_offsets
from ...schema import Ragged, Tail, count_type
from .gaps import GapPacking, Sets
from .rounding import STEPS, from_steps, to_steps

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ...columns import Columns

_IDS = GapPacking("tail_ids", flags=True)
_UNSEEN = 0.35
"""How often a label that was not drawn counts as drawn: about the median of such labels."""
_LINEAR, _SQUARE = 0.6, 2.0
"""What the entropy of R samples lacks of the teacher's, in nats, by x, the number of different
tokens over R: 0.6 x + 2 x^2 is within 0.1 nats of the median up to x = 0.7 (synthetic teacher,
V = 128,256, and a real one, V = 49,152)."""
_FINE = 256
"""Parts of a step in which entropies are added up."""


class Drawn:
    """The samples of M positions, by rank in increasing order.

    Most ids were drawn once. What concerns counts is computed on the others, which are few.
    """

    def __init__(
        self,
        draws: int,
        ranks_J: NDArray[np.int32],
        often_J: NDArray[np.bool_],
        sizes_M: NDArray[np.int64],
    ) -> None:
        """The samples without their counts.

        draws    R
        often_J  whether an id was drawn more than once
        sizes_M  the number of ids of each position, at least 1
        """
        self.draws, self.ranks, self.sizes = draws, ranks_J, sizes_M
        self.offsets = list_offsets(sizes_M)
        self.starts = self.offsets[:-1]
        self.counts = np.ones(len(ranks_J), count_type(draws))
        """[J]"""
        self.logprobs: NDArray[np.uint16] | None = None
        """[J] log-probabilities in steps."""
        self._often_J = often_J
        self._often = np.flatnonzero(often_J)
        """The entries that were drawn more than once."""
        ends_M = np.cumsum(often_J, dtype=np.int32)[self.offsets[1:] - 1]
        self._rows = np.flatnonzero(np.diff(ends_M, prepend=0))
        """The positions that have such entries."""
        self._last = ends_M[self._rows] - 1
        """Index in `_often` of the last one of each of these positions."""
        self._first = np.append(0, self._last[:-1] + 1)[: len(self._rows)]
        kept = np.ones(len(self._often), np.bool_)
        kept[self._last] = False
        self._kept = self._often[kept]
        """The entries whose counts are stored."""

    @classmethod
    def of(cls, tail: Tail, ranks_J: NDArray[np.int32], draws: int) -> Drawn:
        """Samples whose ranks are in any order."""
        order = np.argsort(tail.rows() << 32 | ranks_J, kind="stable")
        counts = tail.counts[order]
        made = cls(draws, ranks_J[order], counts > 1, tail.lengths)
        made.counts = counts.astype(made.counts.dtype)
        if tail.logprobs is not None:
            made.logprobs = to_steps(-tail.logprobs[order], "-tail_logprobs")
        return made

    def pack(self, borders_N: NDArray[np.int64]) -> Columns:
        """The columns but for the sizes: one list per sequence.

        borders_N  [N + 1] the first position of each sequence
        """
        columns = _IDS.pack(Sets(self.ranks, self.sizes, self._often_J), borders_N)
        first_N, kept = self.offsets[borders_N], self._kept
        counts = (self.counts[kept] - 2).astype(self.counts.dtype)
        columns["tail_counts"] = Ragged(counts, np.searchsorted(kept, first_N))
        if self.logprobs is not None:
            columns["tail_logprobs"] = Ragged(self.logprobs, first_N)
        return columns

    @classmethod
    def unpack(
        cls,
        columns: Columns,
        sizes: NDArray[np.int64],
        borders_N: NDArray[np.int64],
        *,
        draws: int,
        logprobs: bool,
    ) -> Drawn:
        """The samples. Raises ValueError if the columns do not fit the sizes or R."""
        if sizes.max(initial=1) > draws:
            raise ValueError(f"column 'tail_sizes' holds {sizes.max()} ids of {draws} draws")
        sets = _IDS.unpack(columns, sizes, borders_N)
        assert sets.flags is not None
        made = cls(draws, sets.ids, sets.flags, sizes)
        first_N, counts, kept = made.offsets[borders_N], made.counts, made._kept
        borders = np.searchsorted(kept, first_N)
        stored = expect_list(columns, "tail_counts", borders, counts.dtype)
        if stored.max(initial=0) > max(0, draws - 2):
            raise ValueError(f"column 'tail_counts' reaches {stored.max()} of {draws} draws")
        counts[kept] = stored + counts.dtype.type(2)
        left_M = draws - sizes
        left_M[made._rows] -= made._sums(counts[made._often].astype(np.int64) - 1)
        if (left_M[made._rows] < 1).any() or np.count_nonzero(left_M) != len(made._rows):
            raise ValueError(f"column 'tail_counts': those of a position do not sum to {draws}")
        counts[made._often[made._last]] = 1 + left_M[made._rows]
        if logprobs:
            made.logprobs = expect_list(columns, "tail_logprobs", first_N, np.uint16)
        return made

    def tops(self) -> NDArray[np.int64]:
        """[M] the entry that was drawn most often; of several, the first."""
        counts = self.counts[self._often]
        tops_M = self.starts.copy()
        if len(self._rows):
            most = np.maximum.reduceat(counts, self._first)
            places = np.flatnonzero(counts == np.repeat(most, self._last - self._first + 1))
            tops_M[self._rows] = self._often[places[np.searchsorted(places, self._first)]]
        return tops_M

    def find(self, ranks_M: NDArray[np.int32]) -> NDArray[np.int64]:
        """[M] the entry of a token in each position's samples, or -1."""
        places = np.flatnonzero(self.ranks == np.repeat(ranks_M, self.sizes))
        found = np.full(len(self.sizes), -1)
        found[np.searchsorted(self.starts, places, side="right") - 1] = places
        return found

    def label_steps(self, entry_M: NDArray[np.int64]) -> NDArray[np.int64]:
        """[M] -log of an entry's share of the samples, in steps; of an unseen token's at -1."""
        share = np.maximum(np.arange(self.draws + 1), _UNSEEN) / self.draws
        table = np.rint(-np.log(share) * STEPS).astype(np.int64)
        steps_M: NDArray[np.int64] = table[np.where(entry_M < 0, 0, self.counts[entry_M])]
        return steps_M

    def entropy_steps(self) -> NDArray[np.int64]:
        """[M] the entropy of the samples, in steps, and what such an entropy lacks."""
        share = np.arange(self.draws + 1) / self.draws
        terms = -share * np.log(np.maximum(share, 1e-9)) * STEPS * _FINE
        table = np.rint(terms).astype(np.int64)
        seen_M: NDArray[np.int64] = self.sizes * table[1]
        seen_M[self._rows] += self._sums(table[self.counts[self._often]] - table[1])
        kinds = np.arange(self.draws + 1) / self.draws
        unseen = np.rint((_LINEAR * kinds + _SQUARE * kinds**2) * STEPS).astype(np.int64)
        seen_M //= _FINE
        seen_M += unseen[self.sizes]
        return seen_M

    def tail(self, ids_J: NDArray[np.int32]) -> Tail:
        """The samples, with these ids for their ranks."""
        logprobs = None if self.logprobs is None else from_steps(self.logprobs, -1)
        return Tail(ids=ids_J, counts=self.counts, logprobs=logprobs, offsets=self.offsets)

    def _sums(self, values: NDArray[np.int64]) -> NDArray[np.int64]:
        """For each of `_rows`, the sum of a value over its entries that were drawn often."""
        if len(values) == 0:
            return values
        sums: NDArray[np.int64] = np.add.reduceat(values, self._first)
        return sums
