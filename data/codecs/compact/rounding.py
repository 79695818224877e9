"""The rounding of `compact`: probabilities to levels of sqrt(p), tail mass to an angle, and
log-probabilities and entropies to steps.

KL is, to second order, twice the squared error of sqrt(p), so that every entry contributes equally,
large or small. The decoder scales the head to its stored mass, so that head and tail always sum
to 1.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import ColdstillError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

STEPS = 64
"""Steps per nat for log-probabilities of labels and samples, and for entropies."""
_PARTS = 1 << 30
"""Parts of 1 in which weights w, and w log w, are added up."""
_ANGLES = 4095
"""Steps of a right angle. Tail mass is sin^2 and head mass cos^2, so that both keep precision."""
ANGLE_ERROR = math.pi / 2 / _ANGLES
_CACHE_ELEMENTS = 1 << 15
"""Entries that are processed at a time, so that they stay in the cache of a core."""


@functools.lru_cache(maxsize=8)
def levels_of(levels: int, temperature: float) -> Levels:
    """The levels of a codec."""
    return Levels(levels, temperature)


class Levels:
    """Heads as ids in increasing order, with a level for each."""

    def __init__(self, levels: int, temperature: float) -> None:
        """levels       steps between 0 and 1, up to 254
        temperature  T: steps are uniform in p^(1 / 2T)
        """
        self._levels, self._power = levels, 2.0 * temperature
        root = np.arange(256) / levels
        root[0] = 0.25 / levels  # values that round to level 0 are at most half a step
        nats = -self._power * np.log(root)
        self.steps = np.rint(nats * STEPS).astype(np.int64)
        """[256] -log p of each level before scaling, in steps."""
        self._logs = (-nats).astype(np.float32)
        self._largest = min(255, levels + 1)
        """The most probable token may be one level above 1."""
        # larger weights would not fit 64 bits
        weights = np.minimum(root, root[self._largest]) ** self._power
        self._parts = np.rint(weights * _PARTS).astype(np.int64)
        self._terms = np.rint(weights * np.log(weights) * _PARTS).astype(np.int64)

    def of(self, logprobs_MK: NDArray[np.float32]) -> NDArray[np.uint8]:
        """[M, K] the level of each head token, most probable first."""
        levels = np.empty(logprobs_MK.shape, np.uint8)
        for rows in row_blocks(*logprobs_MK.shape):
            root = np.exp(logprobs_MK[rows] * np.float32(1.0 / self._power))
            level = np.rint(root * np.float32(self._levels))
            if level.shape[1] > 1:
                # keep the most probable token alone on its level, so that top-1 is preserved
                level[:, 0] += level[:, 0] == level[:, 1]
            levels[rows] = level
        return levels

    def by_id(
        self, ids_MK: NDArray[np.int32], levels_MK: NDArray[np.uint8]
    ) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
        """[M, K] ids in increasing order, and their levels."""
        keys = ids_MK.astype(np.uint32) << 8 | levels_MK
        keys.sort(axis=1)
        return np.right_shift(keys, 8).astype(np.int32), (keys & 255).astype(np.uint8)

    def most_probable_first(
        self, ids_MK: NDArray[Any], levels_MK: NDArray[np.uint8]
    ) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
        """[M, K] ids and levels, most probable first; of equal levels, the smaller id comes first.

        One sort of 32-bit keys (inverted level above, id below) orders ids and levels together.
        """
        ids, levels = np.empty(ids_MK.shape, np.int32), np.empty(levels_MK.shape, np.uint8)
        for rows in row_blocks(*ids_MK.shape):
            keys = ids_MK[rows].astype(np.uint32)
            top_byte = keys.view(np.uint8)[:, 3::4]
            np.subtract(255, levels_MK[rows], out=top_byte)
            keys.sort(axis=1)
            np.bitwise_and(keys, 0xFFFFFF, out=ids[rows].view(np.uint32))
            np.subtract(255, top_byte, out=levels[rows])
        return ids, levels

    def ordered(
        self,
        ids_MK: NDArray[np.int32],
        levels_MK: NDArray[np.uint8],
        tokens_V: NDArray[np.int32],
        loops: Any,
    ) -> tuple[NDArray[np.int32], NDArray[np.uint8], NDArray[np.int64]]:
        """`most_probable_first` and `sums` with compiled loops: what `tokens_V` has for the ids,
        the levels and their sums. The given ids are overwritten."""
        self._expect(levels_MK)
        keys = ids_MK.view(np.uint32)
        tokens, levels = np.empty(keys.shape, np.int32), np.empty(keys.shape, np.uint8)
        sums_2M = np.empty((2, len(keys)), np.int64)
        for rows in row_blocks(*keys.shape):
            loops.head_keys(keys[rows], levels_MK[rows])
            keys[rows].sort(axis=1)
            loops.head_rows(
                keys[rows],
                tokens_V,
                self._parts,
                self._terms,
                tokens[rows],
                levels[rows],
                sums_2M[:, rows],
            )
        return tokens, levels, sums_2M

    def sums(self, levels_MK: NDArray[np.uint8]) -> NDArray[np.int64]:
        """[2, M] the sums of a position's weights w before scaling, and of w log w, in parts.

        Sums of whole numbers are the same on every machine. Raises ValueError for a level that no
        probability has.
        """
        self._expect(levels_MK)
        sums_2M = np.zeros((2, len(levels_MK)), np.int64)
        for rows in row_blocks(*levels_MK.shape):
            levels = levels_MK[rows].astype(np.intp)
            np.sum(self._parts.take(levels), axis=1, out=sums_2M[0, rows])
            np.sum(self._terms.take(levels), axis=1, out=sums_2M[1, rows])
        return sums_2M

    def _expect(self, levels_MK: NDArray[np.uint8]) -> None:
        if levels_MK.max(initial=0) > self._largest:
            raise ValueError(f"column 'head_levels' reaches {levels_MK.max()}")

    def logprobs(
        self,
        levels_MK: NDArray[np.uint8],
        log_mass_M: NDArray[np.float32],
        sums_2M: NDArray[np.int64],
        loops: Any = None,
    ) -> NDArray[np.float32]:
        """[M, K] log-probabilities, scaled so that those of a position sum to its mass.

        loops  compiled loops (`compiled.loops`), or None
        """
        shift_M = (log_mass_M - np.log(_weight(sums_2M))).astype(np.float32)
        if loops is not None:
            scaled: NDArray[np.float32] = loops.head_logprobs(levels_MK, self._logs, shift_M)
            return scaled
        logprobs = np.empty(levels_MK.shape, np.float32)
        for rows in row_blocks(*levels_MK.shape):
            np.add(self._logs.take(levels_MK[rows]), shift_M[rows, None], out=logprobs[rows])
        return logprobs

    def entropy(
        self, sums_2M: NDArray[np.int64], mass_M: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """[M] the part of the entropy that is in the head, in nats: the sum of -p log p.

        With weights w whose sum is S, p is `mass w / S`.
        """
        weight_M, terms_M = _weight(sums_2M), sums_2M[1] / _PARTS
        log_scale = np.log(np.maximum(mass_M, 1e-30) / weight_M)
        nats_M: NDArray[np.float64] = -mass_M * (terms_M / weight_M + log_scale)
        return nats_M


def _weight(sums_2M: NDArray[np.int64]) -> NDArray[np.float64]:
    """[M] the sum of the weights."""
    weight_M: NDArray[np.float64] = np.maximum(sums_2M[0], 1) / _PARTS
    return weight_M


def row_blocks(rows: int, width: int) -> Iterator[slice]:
    """Rows of a matrix of this width, few enough to stay in a core's cache."""
    step = max(1, _CACHE_ELEMENTS // max(1, width))
    return (slice(start, start + step) for start in range(0, rows if width else 0, step))


def to_angle(log_tail_M: NDArray[np.float32], head: int) -> NDArray[np.uint16]:
    """[M] the angle of the tail mass.  head  K"""
    tail = np.exp(log_tail_M.astype(np.float64))
    angle = np.rint(np.arctan2(np.sqrt(tail), np.sqrt(np.maximum(1.0 - tail, 0.0))) * _PER_RADIAN)
    # a head or tail with mass keeps some of it; an empty tail stays empty
    smallest = np.where(log_tail_M > -np.inf, 1, 0)
    return np.clip(angle, smallest, widest_angle(head)).astype(np.uint16)


def widest_angle(head: int) -> int:
    """The largest angle; only without a head can all mass be in the tail."""
    return _ANGLES - 1 if head else _ANGLES


def log_masses(angle_M: NDArray[np.uint16]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """[M] log of the mass in the tail, and in the head."""
    return _LOG_TAIL.take(angle_M), _LOG_HEAD.take(angle_M)


def tail_mass(angle_M: NDArray[np.uint16]) -> NDArray[np.float64]:
    """[M] the mass of the tail."""
    return _sines[angle_M] ** 2


def angle_steps() -> NDArray[np.int64]:
    """-log of the tail's mass at every angle, in steps; 0 for an empty tail."""
    return _TAIL_STEPS


def to_steps(values: NDArray[np.float32], what: str) -> NDArray[np.uint16]:
    """Positive numbers in whole steps.

    what  the name of the numbers, for the message

    Raises
        ColdstillError: a number of 1,024 nats or more, which 16 bits of steps cannot hold
    """
    scaled = np.rint(values.astype(np.float64) * STEPS)
    if scaled.max(initial=0.0) > np.iinfo(np.uint16).max:
        raise ColdstillError(
            f"{what} has {values.max():,.6g} nats; the codec compact stores less than 1,024: "
            'choose the codec "plain"'
        )
    return np.maximum(scaled, 0.0).astype(np.uint16)


def from_steps(steps: NDArray[np.uint16], sign: int) -> NDArray[np.float32]:
    """The numbers, with a sign of 1 or -1."""
    return np.multiply(steps, np.float32(sign / STEPS), dtype=np.float32)


_PER_RADIAN = _ANGLES / (math.pi / 2)
with np.errstate(divide="ignore"):  # an empty tail or head
    _sines = np.sin(np.arange(_ANGLES + 1) / _PER_RADIAN)
    _LOG_TAIL = (2.0 * np.log(_sines)).astype(np.float32)
    _LOG_HEAD = (2.0 * np.log(_sines[::-1])).astype(np.float32)
_TAIL_STEPS = np.zeros(_ANGLES + 1, np.int64)
_TAIL_STEPS[1:] = np.rint(-2.0 * np.log(_sines[1:]) * STEPS)
