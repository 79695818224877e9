"""Packs the tail samples of `compact`: distinct ids, how often each was drawn, how many there are.

Each id has one bit: whether it was drawn more than once. Of such ids, the count less 2 is stored.
That of the last one of a position is not: it follows from R.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import numpy as np

from ...columns import expect_list, list_offsets
from ...ragged import Ragged
from ...schema import Tail, count_type
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
_REPEATS = (1 << 32) - 1
"""The lower half of `_terms`."""


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
        self.counts = np.ones(len(ranks_J), count_type(draws))
        """[J]"""
        self.logprobs: NDArray[np.uint16] | None = None
        """[J] log-probabilities in steps."""
        self._often_J = often_J
        self._often = np.flatnonzero(often_J)
        """The entries that were drawn more than once."""
        self._before = np.cumsum(np.append(np.False_, often_J), dtype=np.int32).take(self.offsets)
        """[M + 1] how many of them are in the positions before."""
        self._rows = np.flatnonzero(self._before[1:] > self._before[:-1])
        """The positions that have such entries."""
        self._first = self._before.take(self._rows)
        """Index in `_often` of the first one of each of these positions."""
        self._last = self._before.take(self._rows + 1) - 1
        kept = np.ones(len(self._often), np.bool_)
        kept[self._last] = False
        self._kept = np.flatnonzero(kept)
        """Indices in `_often` of the entries whose counts are stored."""
        self._sums = np.zeros(0, np.int64)
        """For each of `_rows`, `_terms` of its entries added up."""

    @classmethod
    def of(cls, tail: Tail, ranks_J: NDArray[np.int32], draws: int) -> Drawn:
        """Samples whose ranks are in any order."""
        order = np.argsort(tail.rows() << 32 | ranks_J, kind="stable")
        counts = tail.counts[order]
        made = cls(draws, ranks_J[order], counts > 1, tail.lengths)
        made.counts = counts.astype(made.counts.dtype)
        made._sums = made._added(_terms(draws).take(counts[made._often]))
        if tail.logprobs is not None:
            made.logprobs = to_steps(-tail.logprobs[order], "-tail_logprobs")
        return made

    def pack(self, borders_N: NDArray[np.int64]) -> Columns:
        """The columns but for the sizes: one list per sequence.

        borders_N  [N + 1] the first position of each sequence
        """
        columns = _IDS.pack(Sets(self.ranks, self.sizes, self._often_J), borders_N)
        counts = (self.counts[self._often[self._kept]] - 2).astype(self.counts.dtype)
        columns["tail_counts"] = Ragged(counts, self._kept_before(borders_N))
        if self.logprobs is not None:
            columns["tail_logprobs"] = Ragged(self.logprobs, self.offsets[borders_N])
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
        stored = expect_list(
            columns, "tail_counts", made._kept_before(borders_N), made.counts.dtype
        )
        if stored.max(initial=0) > max(0, draws - 2):
            raise ValueError(f"column 'tail_counts' reaches {stored.max()} of {draws} draws")
        made._set_counts(stored)
        if logprobs:
            first_N = made.offsets[borders_N]
            made.logprobs = expect_list(columns, "tail_logprobs", first_N, np.uint16)
        return made

    def _set_counts(self, stored: NDArray[Any]) -> None:
        """The counts of all entries from the stored ones, which are less by 2."""
        rows, draws, table = self._rows, self.draws, _terms(self.draws)
        terms = np.zeros(len(self._often), np.int64)
        terms[self._kept] = table[2:].take(stored)
        self._sums = self._added(terms)
        left = draws - self.sizes.take(rows) - (self._sums & _REPEATS)
        if (left < 1).any() or np.count_nonzero(self.sizes < draws) != len(rows):
            raise ValueError(f"column 'tail_counts': those of a position do not sum to {draws}")
        self._sums += table.take(left + 1)
        counts = np.empty(len(self._often), self.counts.dtype)
        counts[self._kept] = stored + stored.dtype.type(2)
        counts[self._last] = left + 1
        self.counts[self._often] = counts

    def tops(self) -> NDArray[np.int64]:
        """[M] the entry that was drawn most often; of several, the first."""
        tops_M = self.offsets[:-1].copy()
        if len(self._rows):
            number = len(self._often)
            keys = self.counts.take(self._often).astype(np.int64) << 32
            keys |= np.arange(number, 0, -1)
            most = np.maximum.reduceat(keys, self._first)
            tops_M[self._rows] = self._often.take(number - (most & 0xFFFFFFFF))
        return tops_M

    def find(self, ranks_M: NDArray[np.int32]) -> NDArray[np.int64]:
        """[M] the entry of a token in each position's samples, or -1."""
        places = np.flatnonzero(self.ranks == np.repeat(ranks_M, self.sizes))
        found = np.full(len(self.sizes), -1)
        found[np.searchsorted(self.offsets[:-1], places, side="right") - 1] = places
        return found

    def steps(self, entries: NDArray[np.int64]) -> NDArray[np.int64]:
        """-log of the share of some entries in the samples, in steps."""
        return self._steps.take(self.counts.take(entries))

    @property
    def unseen_steps(self) -> int:
        """The same of a token that was not drawn."""
        return int(self._steps[0])

    @property
    def _steps(self) -> NDArray[np.int64]:
        share = np.maximum(np.arange(self.draws + 1), _UNSEEN) / self.draws
        table: NDArray[np.int64] = np.rint(-np.log(share) * STEPS).astype(np.int64)
        return table

    def entropy_steps(self) -> NDArray[np.int64]:
        """[M] the entropy of the samples, in steps, and what such an entropy lacks."""
        kinds = np.arange(self.draws + 1)
        share = kinds / self.draws
        unseen = np.rint((_LINEAR * share + _SQUARE * share**2) * STEPS).astype(np.int64)
        # as if all were drawn once, and what the others add to it
        once = kinds * int(_entropies(self.draws)[1])
        steps_M: NDArray[np.int64] = (once // _FINE + unseen).take(self.sizes)
        sizes = self.sizes.take(self._rows)
        seen = (once.take(sizes) + (self._sums >> 32)) // _FINE
        steps_M[self._rows] = seen + unseen.take(sizes)
        return steps_M

    def tail(self, ids_J: NDArray[np.int32]) -> Tail:
        """The samples, with these ids for their ranks."""
        logprobs = None if self.logprobs is None else from_steps(self.logprobs, -1)
        return Tail(ids=ids_J, counts=self.counts, logprobs=logprobs, offsets=self.offsets)

    def _kept_before(self, borders_N: NDArray[np.int64]) -> NDArray[np.int64]:
        """[N + 1] how many entries before these positions have stored counts."""
        return self._before[borders_N] - np.searchsorted(self._rows, borders_N)

    def _added(self, values: NDArray[np.int64]) -> NDArray[np.int64]:
        """For each of `_rows`, the sum of a value of its entries that were drawn often."""
        sums = np.append(0, values.cumsum())
        added: NDArray[np.int64] = sums.take(self._last + 1) - sums.take(self._first)
        return added


def _entropies(draws: int) -> NDArray[np.int64]:
    """[R + 1] what a token that was drawn so often adds to the entropy of the samples."""
    share = np.arange(draws + 1) / draws
    parts: NDArray[np.int64] = np.rint(-share * np.log(np.maximum(share, 1e-9)) * STEPS * _FINE)
    return parts.astype(np.int64)


@functools.lru_cache(maxsize=8)
def _terms(draws: int) -> NDArray[np.int64]:
    """[R + 1] for a token that was drawn so often, its draws after the first in the lower 32 bits,
    and what they add to the entropy of the samples in the upper ones. Two sums at once."""
    entropies = _entropies(draws)
    terms: NDArray[np.int64] = entropies - entropies[1] << 32
    return terms + np.arange(-1, draws)
