"""Packs the tail samples of `compact`: distinct ids, how often each was drawn, how many there are.

Each id has one bit: whether it was drawn more than once. Of such ids, the count less 2 is stored.
That of the last one of a position is not: it follows from R.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
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


_Decoded = tuple["NDArray[Any]", "NDArray[np.int64]", "NDArray[np.int64]"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Drawn:
    """The samples of M positions, by rank in increasing order."""

    draws: int
    """R."""
    ids: NDArray[np.int32]
    """[J] their tokens."""
    counts: NDArray[Any]
    """[J] how often each was drawn, at least once."""
    logprobs: NDArray[np.uint16] | None
    """[J] log-probabilities in steps."""
    offsets: NDArray[np.int64]
    """[M + 1] borders of the positions."""
    tops: NDArray[np.int64]
    """[M] the entry that was drawn most often; of several, the first."""
    entropy_steps: NDArray[np.int64]
    """[M] the entropy of the samples, in steps, and what such an entropy lacks."""

    @property
    def sizes(self) -> NDArray[np.int64]:
        """[M] the number of ids of each position, at least 1."""
        return np.diff(self.offsets)

    @classmethod
    def of(cls, tail: Tail, ranks_J: NDArray[np.int32], draws: int) -> Drawn:
        """Samples whose ranks are in any order."""
        order = np.argsort(tail.rows() << 32 | ranks_J, kind="stable")
        counts = tail.counts[order].astype(count_type(draws))
        repeats = _Repeats(counts > 1, tail.offsets)
        sums = repeats.added(_terms(draws).take(counts[repeats.entries]))
        return cls(
            draws=draws,
            ids=tail.ids[order],
            counts=counts,
            logprobs=None
            if tail.logprobs is None
            else to_steps(-tail.logprobs[order], "-tail_logprobs"),
            offsets=tail.offsets,
            tops=repeats.tops(counts),
            entropy_steps=repeats.entropy_steps(sums, draws),
        )

    def pack(self, ranks_J: NDArray[np.int32], borders_N: NDArray[np.int64]) -> Columns:
        """The columns but for the sizes: one list per sequence.

        ranks_J    the ranks of the ids
        borders_N  [N + 1] the first position of each sequence
        """
        often_J = self.counts > 1
        repeats, sizes = _Repeats(often_J, self.offsets), self.sizes
        columns = _IDS.pack(Sets(ranks_J, sizes, often_J), borders_N)
        counts = (self.counts[repeats.entries[repeats.kept]] - 2).astype(self.counts.dtype)
        columns["tail_counts"] = Ragged(counts, repeats.kept_before(borders_N))
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
        tokens_V: NDArray[np.int32],
        loops: Any,
    ) -> Drawn:
        """The samples. Raises ValueError if the columns do not fit the sizes or R.

        tokens_V  the token of each rank
        loops     compiled loops (`compiled.loops`), or None
        """
        if sizes.max(initial=1) > draws:
            raise ValueError(f"column 'tail_sizes' holds {sizes.max()} ids of {draws} draws")
        sets = _IDS.unpack(columns, sizes, borders_N, tokens_V, loops=loops)
        assert sets.flags is not None
        offsets, dtype = list_offsets(sizes), np.dtype(count_type(draws))
        known = (
            expect_list(columns, "tail_logprobs", offsets[borders_N], np.uint16)
            if logprobs
            else None
        )
        repeats = (
            _Repeats(sets.flags, offsets)
            if loops is None or dtype.itemsize > 2
            else _CompiledRepeats(sets, loops)
        )
        stored = expect_list(columns, "tail_counts", repeats.kept_before(borders_N), dtype)
        if stored.max(initial=0) > max(0, draws - 2):
            raise ValueError(f"column 'tail_counts' reaches {stored.max()} of {draws} draws")
        counts, tops, steps = repeats.decoded(stored, draws)
        return cls(
            draws=draws,
            ids=sets.ids,
            counts=counts,
            logprobs=known,
            offsets=offsets,
            tops=tops,
            entropy_steps=steps,
        )

    def find(self, ids_M: NDArray[np.int32]) -> NDArray[np.int64]:
        """[M] the entry of a token in each position's samples, or -1."""
        places = np.flatnonzero(self.ids == np.repeat(ids_M, self.sizes))
        found = np.full(len(self.sizes), -1)
        found[np.searchsorted(self.offsets[:-1], places, side="right") - 1] = places
        return found

    @property
    def steps(self) -> NDArray[np.int64]:
        """[R + 1] -log of the share of a token in the samples that was drawn so often, in steps."""
        return _share_steps(self.draws)

    def tail(self) -> Tail:
        """The samples."""
        logprobs = None if self.logprobs is None else from_steps(self.logprobs, -1)
        return Tail(ids=self.ids, counts=self.counts, logprobs=logprobs, offsets=self.offsets)


class _Repeats:
    """The entries that were drawn more than once, in numpy: most ids were drawn once, so that what
    concerns counts is computed on few."""

    def __init__(self, often_J: NDArray[np.bool_], offsets: NDArray[np.int64]) -> None:
        """often_J  whether an id was drawn more than once
        offsets  [M + 1] borders of the positions
        """
        self._offsets, self._sizes = offsets, np.diff(offsets)
        self.entries = np.flatnonzero(often_J)
        """Indices of these entries among all."""
        self._before = np.cumsum(np.append(np.False_, often_J), dtype=np.int32).take(offsets)
        """[M + 1] how many of them are in the positions before."""
        self._rows = np.flatnonzero(self._before[1:] > self._before[:-1])
        """The positions that have such entries."""
        self._first = self._before.take(self._rows)
        """Index in `entries` of the first one of each of these positions."""
        self._last = self._before.take(self._rows + 1) - 1
        kept = np.ones(len(self.entries), np.bool_)
        kept[self._last] = False
        self.kept = np.flatnonzero(kept)
        """Indices in `entries` of those whose counts are stored."""

    def kept_before(self, borders_N: NDArray[np.int64]) -> NDArray[np.int64]:
        """[N + 1] how many entries before these positions have stored counts."""
        return self._before[borders_N] - np.searchsorted(self._rows, borders_N)

    def added(self, values: NDArray[np.int64]) -> NDArray[np.int64]:
        """For each position with such entries, the sum of a value of theirs."""
        sums = np.append(0, values.cumsum())
        added: NDArray[np.int64] = sums.take(self._last + 1) - sums.take(self._first)
        return added

    def decoded(self, stored: NDArray[Any], draws: int) -> _Decoded:
        """The counts of all entries from the stored ones, which are less by 2; `Drawn.tops` and
        `Drawn.entropy_steps`. Raises ValueError if the counts do not sum to R."""
        rows, table = self._rows, _terms(draws)
        terms = np.zeros(len(self.entries), np.int64)
        terms[self.kept] = table[2:].take(stored)
        sums = self.added(terms)
        left = draws - self._sizes.take(rows) - (sums & _REPEATS)
        if (left < 1).any() or np.count_nonzero(self._sizes < draws) != len(rows):
            raise _wrong_sum(draws)
        counts = np.empty(len(self.entries), stored.dtype)
        counts[self.kept] = stored + stored.dtype.type(2)
        counts[self._last] = left + 1
        counts_J = np.ones(self._offsets[-1], stored.dtype)
        counts_J[self.entries] = counts
        steps_M = self.entropy_steps(sums + table.take(left + 1), draws)
        return counts_J, self.tops(counts_J), steps_M

    def tops(self, counts_J: NDArray[Any]) -> NDArray[np.int64]:
        """[M] the entry that was drawn most often; of several, the first."""
        tops_M = self._offsets[:-1].copy()
        if len(self._rows):
            number = len(self.entries)
            keys = counts_J.take(self.entries).astype(np.int64) << 32
            keys |= np.arange(number, 0, -1)
            most = np.maximum.reduceat(keys, self._first)
            tops_M[self._rows] = self.entries.take(number - (most & 0xFFFFFFFF))
        return tops_M

    def entropy_steps(self, sums: NDArray[np.int64], draws: int) -> NDArray[np.int64]:
        """[M] the entropy of the samples, in steps, and what such an entropy lacks.

        sums  for each position with such entries, their `_terms` added up
        """
        # as if all were drawn once, and what the others add to it
        once, unseen = np.arange(draws + 1) * _entropies(draws)[1], _unseen(draws)
        steps_M: NDArray[np.int64] = (once // _FINE + unseen).take(self._sizes)
        sizes = self._sizes.take(self._rows)
        steps_M[self._rows] = (once.take(sizes) + (sums >> 32)) // _FINE + unseen.take(sizes)
        return steps_M


class _CompiledRepeats:
    """The same with compiled loops, which pass over all entries."""

    def __init__(self, sets: Sets, loops: Any) -> None:
        self._sets, self._loops = sets, loops

    def kept_before(self, borders_N: NDArray[np.int64]) -> NDArray[np.int64]:
        assert self._sets.flagged is not None  # the loops count them
        return list_offsets(np.maximum(self._sets.flagged - 1, 0))[borders_N]

    def decoded(self, stored: NDArray[Any], draws: int) -> _Decoded:
        counts_J, tops_M, sums_M, fits = self._loops.counts(
            self._sets.flags, self._sets.sizes, stored, draws, _entropies(draws)
        )
        if not fits:
            raise _wrong_sum(draws)
        return counts_J, tops_M, sums_M // _FINE + _unseen(draws).take(self._sets.sizes)


def _wrong_sum(draws: int) -> ValueError:
    return ValueError(f"column 'tail_counts': those of a position do not sum to {draws}")


@functools.lru_cache(maxsize=8)
def _share_steps(draws: int) -> NDArray[np.int64]:
    share = np.maximum(np.arange(draws + 1), _UNSEEN) / draws
    table: NDArray[np.int64] = np.rint(-np.log(share) * STEPS).astype(np.int64)
    return table


@functools.lru_cache(maxsize=8)
def _unseen(draws: int) -> NDArray[np.int64]:
    """[R + 1] what the entropy of so many different tokens lacks of the teacher's, in steps."""
    share = np.arange(draws + 1) / draws
    steps: NDArray[np.int64] = np.rint((_LINEAR * share + _SQUARE * share**2) * STEPS)
    return steps.astype(np.int64)


@functools.lru_cache(maxsize=8)
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
