"""A small encoding: ids as sorted differences, probabilities as levels of sqrt(p).

Head ids are sorted and replaced by their differences. Neighbouring positions share many candidates,
so that the same runs of differences repeat and the format's zstd finds them. Measured: 20 bytes for
50 ids of a vocabulary of 4,096 tokens, whose separate entropies are 27 bytes. Ranking ids by
frequency first changed nothing. Ids sorted by probability, or stored column by column, took 36
bytes and more.

Probabilities are rounded to whole levels of sqrt(p). KL is, to second order, twice the squared
error of sqrt(p), so that every entry contributes equally, large or small. The decoder scales the
head to its stored mass, so that head and tail always sum to 1.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ..schema import (
    Block,
    Capture,
    Ragged,
    Targets,
    expect_column,
    from_positions,
    target_shapes,
    to_positions,
    to_sequences,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from ..schema import Columns

_LARGEST_VOCABULARY = 1 << 24
"""A sort key has 24 bits for the id and 8 bits for the level."""
_LARGEST_POWER = 6.0
"""At a larger temperature, the weight of the lowest level would underflow float32."""
_ANGLES = 4095
"""Steps of a right angle. Tail mass is sin^2 and head mass cos^2, so that both keep precision."""
_STEPS = 64
"""Steps per nat for log-probabilities of labels and samples, and for entropies."""
_MOST_POSITIONS = 1 << 31
"""Arrow lists have 32-bit offsets."""
_CACHE_ELEMENTS = 1 << 15
"""Entries that are processed at a time, so that they stay in the cache of a core."""


@dataclass(frozen=True, slots=True)
class CompactCodec:
    """Exact ids, and probabilities rounded to `levels` steps."""

    name: ClassVar[str] = "compact"
    compress: ClassVar[bool] = True
    rounding: ClassVar[float] = 0.5 / _STEPS

    vocabulary: int
    """V. Up to 65,536 tokens, an id takes two bytes before compression, otherwise four."""
    levels: int = 127
    """Steps of sqrt(p) between 0 and 1."""
    temperature: float = 1.0
    """T, the largest captured temperature, 1 to 6. Steps are uniform in p^(1 / 2T)."""

    def __post_init__(self) -> None:
        for name in ("vocabulary", "levels"):
            operator.index(getattr(self, name))  # raises TypeError unless it is a whole number
        if not 1 <= self.vocabulary <= _LARGEST_VOCABULARY:
            raise ValueError(f"vocabulary {self.vocabulary}: 1 to {_LARGEST_VOCABULARY}")
        if not 15 <= self.levels <= 254:
            raise ValueError(f"levels {self.levels}: 15 to 254")
        if not 1.0 <= self.temperature <= _LARGEST_POWER:
            raise ValueError(f"temperature {self.temperature}: 1 to {_LARGEST_POWER:g}")

    @classmethod
    def fitting(cls, *, vocabulary: int, capture: Capture, **settings: Any) -> CompactCodec:
        """The codec for every captured temperature. `levels` may be set."""
        temperature = min(_LARGEST_POWER, float(max((1.0, *capture.temperatures))))
        return cls(vocabulary=vocabulary, temperature=temperature, **settings)

    def maximum_error(self, capture: Capture) -> float:
        """Half a step for rounding, plus one step for the first entry, plus the error of scaling.

        Scaling divides by the norm of the rounded head. It moves an entry by at most the norm of
        all rounding errors, which is half a step times sqrt(K + 3).
        """
        if capture.head == 0:
            return 0.0
        step = self.temperature / self.levels
        angle = math.pi / 2 / _ANGLES
        return step * (1.0 + 0.5 * math.sqrt(capture.head + 3)) + angle

    def encode(self, block: Block) -> Columns:
        sequences, targets = block.sequences, block.targets
        id_type = self._id_type
        arrays: dict[str, NDArray[Any]] = {}
        if targets.head_ids.shape[1]:
            ids, levels = self._sorted_head(targets)
            arrays |= {"head_ids": _differences(ids, id_type), "head_levels": levels}
        arrays["tail_angle"] = _angle(targets.log_tail, targets.head_ids.shape[1])
        if targets.tail_ids.shape[1]:
            arrays["tail_ids"] = _differences(targets.tail_ids, id_type)
        if targets.tail_logprobs is not None:
            arrays["tail_logprobs"] = _steps(-targets.tail_logprobs)
        arrays["label_logprob"] = _steps(-targets.label_logprob)
        arrays["entropy"] = _steps(targets.entropy)
        if targets.log_norm.shape[1]:
            arrays["log_norm"] = targets.log_norm
        starts, lengths = _runs(sequences.positions)
        columns: Columns = {
            "sequence_id": sequences.ids,
            "token_ids": Ragged(sequences.tokens.values.astype(id_type), sequences.tokens.offsets),
            "document_starts": sequences.document_starts,
            "document_ids": sequences.document_ids,
            "run_starts": starts,
            "run_lengths": lengths,
            "sequence_hash": sequences.hashes,
        }
        return columns | from_positions(arrays, sequences.positions)

    def decode(self, columns: Columns, capture: Capture) -> Block:
        """The block. Heads are most probable first; of equal levels, the smaller id comes first."""
        stored: dict[str, Any] = columns
        positions = _from_runs(stored["run_starts"], stored["run_lengths"])
        arrays = to_positions(columns, positions)
        shapes = target_shapes(capture, len(positions.values))

        def column(name: str, dtype: Any, field: str | None = None) -> NDArray[Any]:
            return expect_column(arrays, name, shapes[field or name][0], dtype)

        angle = column("tail_angle", np.uint16, "log_tail")
        if angle.max(initial=0) > _widest(capture.head):
            raise ValueError(f"column 'tail_angle' reaches {angle.max()}, beyond a right angle")
        head_ids, head_logprobs = self._head(
            column("head_ids", self._id_type),
            column("head_levels", np.uint8, "head_ids"),
            _LOG_HEAD_MASS.take(angle),
        )
        tail_logprobs = None
        if capture.keeps_tail_logprobs:
            tail_logprobs = _from_steps(column("tail_logprobs", np.uint16), -1)
        targets = Targets(
            head_ids=head_ids,
            head_logprobs=head_logprobs,
            log_tail=_LOG_TAIL.take(angle),
            tail_ids=_cumulated(column("tail_ids", self._id_type)),
            tail_logprobs=tail_logprobs,
            label_logprob=_from_steps(column("label_logprob", np.uint16), -1),
            entropy=_from_steps(column("entropy", np.uint16), 1),
            log_norm=column("log_norm", np.float32),
        )
        tokens = Ragged(stored["token_ids"].values.astype(np.int32), stored["token_ids"].offsets)
        sequences = to_sequences(columns | {"token_ids": tokens, "positions": positions})
        return Block(sequences=sequences, targets=targets, capture=capture)

    @property
    def _id_type(self) -> Any:
        return np.uint16 if self.vocabulary <= 1 << 16 else np.uint32

    def _sorted_head(self, targets: Targets) -> tuple[NDArray[np.uint32], NDArray[np.uint8]]:
        """[M, K] ids in increasing order, and their levels."""
        scale = 0.5 / self.temperature
        ids, logprobs = targets.head_ids, targets.head_logprobs
        keys = np.empty(ids.shape, np.uint32)
        for rows in _row_blocks(*ids.shape):
            level = np.rint(np.exp(logprobs[rows] * np.float32(scale)) * np.float32(self.levels))
            if level.shape[1] > 1:
                # keep the most probable token alone on its level, so that top-1 is preserved
                level[:, 0] += level[:, 0] == level[:, 1]
            keys[rows] = ids[rows].astype(np.uint32) << 8 | level.astype(np.uint32)
        keys.sort(axis=1)
        return np.right_shift(keys, 8, dtype=np.uint32), (keys & 255).astype(np.uint8)

    def _head(
        self, differences: NDArray[Any], levels: NDArray[np.uint8], log_mass: NDArray[np.float32]
    ) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """[M, K] ids and log-probabilities, most probable first.

        One sort of 32-bit keys (inverted level above, id below) orders ids and levels together.
        """
        ids = np.empty(differences.shape, np.int32)
        logprobs = np.empty(differences.shape, np.float32)
        weights = self._weights()
        for rows in _row_blocks(*differences.shape):
            keys = differences[rows].astype(np.uint32)
            np.add.accumulate(keys, axis=1, out=keys)
            top_byte = keys.view(np.uint8)[:, 3::4]
            np.subtract(255, levels[rows], out=top_byte)
            keys.sort(axis=1)
            np.bitwise_and(keys, 0xFFFFFF, out=ids[rows].view(np.uint32))
            part = logprobs[rows]
            np.take(weights, top_byte, out=part, mode="clip")
            np.multiply(part, (np.exp(log_mass[rows]) / part.sum(1))[:, None], out=part)
            np.log(part, out=part)
        return ids, logprobs

    def _weights(self) -> NDArray[np.float32]:
        """[256] the probability of each level before scaling, indexed by 255 - level."""
        root = np.arange(255, -1, -1) / self.levels
        root[-1] = 0.25 / self.levels  # values that round to level 0 are at most half a step
        return (root ** (2.0 * self.temperature)).astype(np.float32)


def _row_blocks(rows: int, width: int) -> Iterator[slice]:
    step = max(1, _CACHE_ELEMENTS // max(1, width))
    return (slice(start, start + step) for start in range(0, rows if width else 0, step))


def _differences(ids: NDArray[Any], id_type: Any) -> NDArray[Any]:
    """[M, K] the first id of each row, then the difference to the id before."""
    return np.diff(ids.astype(np.int64), axis=1, prepend=0).astype(id_type)


def _cumulated(differences: NDArray[Any]) -> NDArray[np.int32]:
    ids = np.empty(differences.shape, np.int32)
    for rows in _row_blocks(*differences.shape):
        np.add.accumulate(differences[rows], axis=1, dtype=np.int32, out=ids[rows])
    return ids


def _runs(positions: Ragged) -> tuple[Ragged, Ragged]:
    """Start and length of each run of consecutive positions."""
    values = positions.values
    begins = np.diff(values, prepend=-2) != 1
    begins[positions.offsets[:-1][positions.lengths > 0]] = True
    places = np.flatnonzero(begins)
    offsets = np.searchsorted(places, positions.offsets)
    lengths = np.diff(places, append=len(values)).astype(np.int32)
    return Ragged(values[places], offsets), Ragged(lengths, offsets)


def _from_runs(starts: Ragged, lengths: Ragged) -> Ragged:
    if not np.array_equal(starts.offsets, lengths.offsets) or (lengths.values < 1).any():
        raise ValueError("the runs of supervised positions have no starts, or no lengths")
    ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths.values, dtype=np.int64)])
    if ends[-1] > _MOST_POSITIONS:
        raise ValueError(f"a block of {ends[-1]} supervised positions")
    shift = starts.values - ends[:-1]
    values = np.arange(ends[-1]) + np.repeat(shift, lengths.values)
    return Ragged(values.astype(np.int32), ends[starts.offsets])


def _angle(log_tail: NDArray[np.float32], head: int) -> NDArray[np.uint16]:
    tail = np.exp(log_tail.astype(np.float64))
    angle = np.rint(np.arctan2(np.sqrt(tail), np.sqrt(np.maximum(1.0 - tail, 0.0))) * _PER_RADIAN)
    # a head or tail with mass keeps some of it; an empty tail stays empty
    smallest = np.where(log_tail > -np.inf, 1, 0)
    return np.clip(angle, smallest, _widest(head)).astype(np.uint16)


def _widest(head: int) -> int:
    """The largest angle; only without a head can all mass be in the tail."""
    return _ANGLES - 1 if head else _ANGLES


def _steps(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    scaled = np.rint(values.astype(np.float64) * _STEPS)
    return np.clip(scaled, 0, np.iinfo(np.uint16).max).astype(np.uint16)


def _from_steps(steps: NDArray[np.uint16], sign: int) -> NDArray[np.float32]:
    return np.multiply(steps, np.float32(sign / _STEPS), dtype=np.float32)


_PER_RADIAN = _ANGLES / (math.pi / 2)
with np.errstate(divide="ignore"):  # an empty tail or head
    _sines = np.sin(np.arange(_ANGLES + 1) / _PER_RADIAN)
    _LOG_TAIL = (2.0 * np.log(_sines)).astype(np.float32)
    _LOG_HEAD_MASS = (2.0 * np.log(_sines[::-1])).astype(np.float32)
