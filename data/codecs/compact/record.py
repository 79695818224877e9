"""The integers of a record of `compact`, in which labels are looked up, and the ranks of tokens."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import numpy as np

from ...alignment import label_indices
from ...columns import list_offsets
from ...ragged import Ragged
from .rounding import STEPS, angle_steps, from_steps, tail_mass, widest_angle

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .drawn import Drawn
    from .rounding import Levels

_BEHIND = 2 * STEPS
"""A label outside the head, where no sample tells its probability: -log of its share of the tail's
mass, in steps."""
_SPREAD = 4.0
"""The entropy of what is outside the head, in nats, where no sample tells it."""


class Ranks:
    """The numbers of tokens: those in `frequent` come first, then the others by id."""

    def __init__(self, vocabulary: int, frequent: tuple[int, ...]) -> None:
        others = np.ones(vocabulary, np.bool_)
        others[list(frequent)] = False
        tokens = np.concatenate([np.array(frequent, np.int32), np.flatnonzero(others)])
        self.tokens = tokens.astype(np.int32)
        """[V] the token of each rank."""
        self._ranks = np.empty(vocabulary, np.int32)
        self._ranks[self.tokens] = np.arange(vocabulary, dtype=np.int32)

    def of(self, ids: NDArray[np.int32]) -> NDArray[np.int32]:
        """The ranks of tokens."""
        return self._ranks[ids]


@functools.lru_cache(maxsize=8)
def ranks_of(vocabulary: int, frequent: tuple[int, ...]) -> Ranks:
    """The ranks of a codec's tokens."""
    return Ranks(vocabulary, frequent)


class Record:
    """The integers of a record at M positions, in which labels are looked up."""

    def __init__(self, positions: int, loops: Any = None) -> None:
        """loops  compiled loops (`compiled.loops`), or None"""
        self._loops = loops
        self.ids = np.zeros((positions, 0), np.int32)
        """[M, K] the tokens of the head, most probable first."""
        self.levels = np.zeros((positions, 0), np.uint8)
        self.sums = np.zeros((2, positions), np.int64)
        self.angle = np.full(positions, widest_angle(0), np.uint16)
        self.drawn: Drawn | None = None
        self._rounding: Levels | None = None

    def set_head(
        self,
        rounding: Levels,
        ids_MK: NDArray[np.int32],
        levels_MK: NDArray[np.uint8],
        angle_M: NDArray[np.uint16],
        tokens_V: NDArray[np.int32],
    ) -> None:
        """The head by increasing rank. Raises ValueError for a level that no probability has.

        ids_MK  compiled loops overwrite them
        tokens_V  the token of each rank
        """
        self.angle, self._rounding = angle_M, rounding
        if self._loops is None:
            ranks, self.levels = rounding.most_probable_first(ids_MK, levels_MK)
            self.ids, self.sums = tokens_V.take(ranks), rounding.sums(self.levels)
        else:
            self.ids, self.levels, self.sums = rounding.ordered(
                ids_MK, levels_MK, tokens_V, self._loops
            )

    def codes(self, labels_M: NDArray[np.int32]) -> NDArray[np.uint8]:
        """[M] the code of each label: 0 if it is not in the record or beyond the last code, then
        the entries of the head, the sample that was drawn most often, and the other samples."""
        head = self.ids.shape[1]
        code_M = np.zeros(len(self.angle), np.int64)
        if head:
            is_label = self.ids == labels_M[:, None]
            code_M = np.where(is_label.any(1), is_label.argmax(1) + 1, 0)
        if self.drawn is not None:
            entry_M = self.drawn.find(labels_M)
            starts_M = self.drawn.offsets[:-1]
            place_M = np.where(entry_M == self.drawn.tops, 0, entry_M - starts_M + 1)
            code_M = np.where(entry_M >= 0, head + 1 + place_M, code_M)
        return np.where(code_M < 256, code_M, 0).astype(np.uint8)

    def folded(
        self,
        code_M: NDArray[np.uint8],
        label_steps_M: NDArray[np.uint16],
        entropy_steps_M: NDArray[np.uint16],
    ) -> tuple[NDArray[np.uint16], NDArray[np.uint16]]:
        """[M] the log-probabilities of the labels and the entropies, in steps, as the differences
        to what the record says of them."""
        expected_M = self._labels(code_M)[1]
        return _less(label_steps_M, expected_M), _less(entropy_steps_M, self._entropy_steps())

    def unfolded(
        self,
        code_M: NDArray[np.uint8],
        logprob_M: NDArray[np.uint16],
        entropy_M: NDArray[np.uint16],
    ) -> tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.float32]]:
        """[M] the tokens of the labels that have a code, and log-probabilities and entropies from
        their differences. Raises ValueError for a code without an entry."""
        expected_M = self._entropy_steps()
        drawn = self.drawn
        if self._loops is None or (drawn is not None and drawn.counts.dtype.itemsize > 2):
            ids_M, steps_M = self._labels(code_M)
            logprobs_M = from_steps(_plus(logprob_M, steps_M), -1)
            entropies_M = from_steps(_plus(entropy_M, expected_M), 1)
        else:
            none = np.zeros(len(code_M) + 1, np.int64)
            ids_M, logprobs_M, entropies_M, fits = self._loops.labels(
                code_M,
                logprob_M,
                entropy_M,
                self.angle,
                angle_steps(),
                self.ids,
                self.levels,
                none if self._rounding is None else self._rounding.steps,
                none if drawn is None else drawn.offsets,
                np.zeros(0, np.int32) if drawn is None else drawn.ids,
                np.zeros(0, np.uint8) if drawn is None else drawn.counts,
                np.array([_BEHIND]) if drawn is None else drawn.steps,
                none if drawn is None else drawn.tops,
                expected_M,
            )
            if not fits:
                raise _NO_ENTRY
        return ids_M, logprobs_M, entropies_M

    def _labels(self, code_M: NDArray[np.uint8]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """[M] the token of each label with a code, else 0; and about -log p of each label,
        in steps. Raises ValueError for a code without an entry."""
        head, drawn = self.ids.shape[1], self.drawn
        ids_M, steps_M = np.zeros(len(code_M), np.int32), angle_steps().take(self.angle)
        steps_M += _BEHIND if drawn is None else drawn.steps[0]
        in_head = np.flatnonzero((code_M > 0) & (code_M <= head))
        columns = code_M[in_head].astype(np.int64) - 1
        ids_M[in_head] = self.ids[in_head, columns]
        if self._rounding is not None:
            steps_M[in_head] = self._rounding.steps[self.levels[in_head, columns]]
        in_tail = np.flatnonzero(code_M > head)
        places = code_M[in_tail].astype(np.int64) - (head + 1)
        if drawn is not None and (places <= drawn.sizes[in_tail]).all():
            others = drawn.offsets[in_tail] + places - 1
            entries = np.where(places == 0, drawn.tops[in_tail], others)
            ids_M[in_tail] = drawn.ids[entries]
            steps_M[in_tail] += drawn.steps.take(drawn.counts.take(entries)) - drawn.steps[0]
        elif len(in_tail):
            raise _NO_ENTRY
        return ids_M, steps_M

    def _entropy_steps(self) -> NDArray[np.int64]:
        """[M] about the entropy, in steps: that of the head and of the samples."""
        drawn = self.drawn
        if self._rounding is None:
            return np.zeros(len(self.angle), np.int64) if drawn is None else drawn.entropy_steps
        tail_M = tail_mass(self.angle)
        inside = _SPREAD if drawn is None else drawn.entropy_steps / STEPS
        nats = self._rounding.entropy(self.sums, 1.0 - tail_M)
        nats += tail_M * (inside + angle_steps().take(self.angle) / STEPS)
        return np.rint(nats * STEPS).astype(np.int64)


_NO_ENTRY = ValueError("column 'label_code' names an entry that its record does not have")


def _less(steps: NDArray[np.uint16], expected: NDArray[np.int64]) -> NDArray[np.uint16]:
    """The difference to the expected steps: 0, -1, 1, -2, 2 as 0, 1, 2, 3, 4, in 16 bits."""
    off = (steps.astype(np.int64) - expected).astype(np.uint16).view(np.int16).astype(np.int64)
    return np.where(off < 0, -2 * off - 1, 2 * off).astype(np.uint16)


def _plus(folded: NDArray[np.uint16], expected: NDArray[np.int64]) -> NDArray[np.uint16]:
    """The steps of which `_less` made the difference."""
    half = (folded >> 1).astype(np.int64)
    return (expected + np.where(folded & 1, -half - 1, half)).astype(np.uint16)


def kept(tokens: Ragged, shown: NDArray[np.bool_], dtype: Any) -> Ragged:
    """The tokens that do not follow from their record."""
    places = np.flatnonzero(shown)
    return Ragged(tokens.values[places].astype(dtype), np.searchsorted(places, tokens.offsets))


def with_labels(
    shown: Ragged,
    positions: Ragged,
    code_M: NDArray[np.uint8],
    ids_M: NDArray[np.int32],
    loops: Any = None,
) -> Ragged:
    """All tokens: those that are stored, and the labels that are known from their records. Raises
    ValueError if a known label is not inside its sequence."""
    if len(shown) != len(positions):
        raise ValueError(f"column 'token_ids' has {len(shown)} lists, expected {len(positions)}")
    if loops is not None:
        tokens, offsets, fits = loops.tokens(
            shown.values, shown.offsets, positions.values, positions.offsets, code_M, ids_M
        )
    else:
        known = np.flatnonzero(code_M)
        known_N = np.diff(np.searchsorted(known, positions.offsets))
        offsets = list_offsets(shown.lengths + known_N)
        places = label_indices(offsets, positions)[known]
        first, end = (np.repeat(borders, known_N) for borders in (offsets[:-1], offsets[1:]))
        fits = bool(((first <= places) & (places < end)).all())
        tokens = np.empty(int(offsets[-1]), np.int32)
        own = np.ones(len(tokens), np.bool_)
        if fits:
            own[places] = False
            fits = np.count_nonzero(own) == len(shown.values)  # no label is there twice
        if fits:
            tokens[places] = ids_M[known]
            tokens[own] = shown.values
    if not fits:
        raise ValueError("column 'label_code' names labels that are not inside their sequence")
    return Ragged(tokens, offsets)
