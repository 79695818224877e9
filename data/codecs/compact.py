"""Few bytes: ids as sorted differences, probabilities on a scale on which every error costs alike.

Head ids are sorted and replaced by their differences: neighbouring positions share many candidates,
so the same runs of differences come again and again, and the store's zstd finds them. (Measured:
20 bytes for 50 ids of a 4,096-token vocabulary, where their entropy one by one would be 27. Ids
ranked by frequency, or sorted by probability, or stored column by column were larger: the first
changed nothing, the others took 36 and more.)

Probabilities are rounded to whole levels of sqrt(p): KL is, to second order, twice the squared
error of sqrt(p), so that every entry contributes alike whatever its size. The decoder scales the
head to the mass that is stored for it, so that the record always sums to 1.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ..columns import expect_column, from_positions, to_positions, to_sequences
from ..ragged import Ragged
from ..schema import Block, Capture, Targets, target_shapes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from ..columns import Columns

_LARGEST_VOCABULARY = 1 << 24
"""A sort key is an id in 24 bits under a level in 8."""
_LARGEST_POWER = 6.0
"""At a larger temperature than this the weight of the lowest level would leave float32."""
_ANGLES = 4095
"""Steps of a right angle: tail mass is sin^2 and head mass cos^2, so both keep their digits."""
_STEPS = 64
"""Steps a nat of the label's log-probability, the samples' and the entropy."""
_MOST_POSITIONS = 1 << 31
"""Arrow's lists have borders of 32 bits."""
_CACHE_ELEMENTS = 1 << 15
"""So many entries are worked on at a time: their passes stay in a core's cache."""


@dataclass(frozen=True, slots=True)
class CompactCodec:
    """Exact ids; probabilities rounded to `levels` steps."""

    name: ClassVar[str] = "compact"
    compress: ClassVar[bool] = True
    rounding: ClassVar[float] = 0.5 / _STEPS

    vocabulary: int
    """V: ids below 65,536 take two bytes before compression, others four."""
    levels: int = 127
    """Steps of sqrt(p) between 0 and 1."""
    temperature: float = 1.0
    """T: steps are uniform in p^(1 / 2T); the largest captured temperature, 1 to 6."""

    def __post_init__(self) -> None:
        """Refuse what a byte or a sort key cannot hold."""
        for name in ("vocabulary", "levels"):
            operator.index(getattr(self, name))  # TypeError for what is no whole number
        if not 1 <= self.vocabulary <= _LARGEST_VOCABULARY:
            raise ValueError(f"vocabulary {self.vocabulary}: 1 to {_LARGEST_VOCABULARY}")
        if not 15 <= self.levels <= 254:
            raise ValueError(f"levels {self.levels}: 15 to 254")
        if not 1.0 <= self.temperature <= _LARGEST_POWER:
            raise ValueError(f"temperature {self.temperature}: 1 to {_LARGEST_POWER:g}")

    @classmethod
    def fitting(cls, *, vocabulary: int, capture: Capture, **settings: Any) -> CompactCodec:
        """Steps that serve every captured temperature; `levels` may be chosen."""
        temperature = min(_LARGEST_POWER, float(max((1.0, *capture.temperatures))))
        return cls(vocabulary=vocabulary, temperature=temperature, **settings)

    def maximum_error(self, capture: Capture) -> float:
        """Half a step for rounding, a whole one for the first entry, and what scaling adds.

        Scaling divides by the norm of the rounded head: it moves no entry further than the norm of
        all roundings, half a step times sqrt(K + 3).
        """
        if capture.head == 0:
            return 0.0
        step = self.temperature / self.levels
        angle = math.pi / 2 / _ANGLES
        return step * (1.0 + 0.5 * math.sqrt(capture.head + 3)) + angle

    def encode(self, block: Block) -> Columns:
        """Columns of small whole numbers."""
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
        """[M, K] ids in increasing order, and the level of each."""
        scale = 0.5 / self.temperature
        ids, logprobs = targets.head_ids, targets.head_logprobs
        keys = np.empty(ids.shape, np.uint32)
        for rows in _row_blocks(*ids.shape):
            level = np.rint(np.exp(logprobs[rows] * np.float32(scale)) * np.float32(self.levels))
            if level.shape[1] > 1:
                # the most probable token stays the only one on its level: it is what top-1 means
                level[:, 0] += level[:, 0] == level[:, 1]
            keys[rows] = ids[rows].astype(np.uint32) << 8 | level.astype(np.uint32)
        keys.sort(axis=1)
        return np.right_shift(keys, 8, dtype=np.uint32), (keys & 255).astype(np.uint8)

    def _head(
        self, differences: NDArray[Any], levels: NDArray[np.uint8], log_mass: NDArray[np.float32]
    ) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """[M, K] ids and log-probabilities, most probable first.

        One sort of 32-bit keys (level from the top, id below) puts an entry and its level in their
        place together.
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
        """[256] the probability that a level stands for, by 255 - level; before scaling."""
        root = np.arange(255, -1, -1) / self.levels
        root[-1] = 0.25 / self.levels  # what rounds to nothing is half a step at most
        return (root ** (2.0 * self.temperature)).astype(np.float32)


def _row_blocks(rows: int, width: int) -> Iterator[slice]:
    """Rows a few at a time; none where there is nothing in them."""
    step = max(1, _CACHE_ELEMENTS // max(1, width))
    return (slice(start, start + step) for start in range(0, rows if width else 0, step))


def _differences(ids: NDArray[Any], id_type: Any) -> NDArray[Any]:
    """[M, K] the first id of each row, then each one's distance from the one before."""
    return np.diff(ids.astype(np.int64), axis=1, prepend=0).astype(id_type)


def _cumulated(differences: NDArray[Any]) -> NDArray[np.int32]:
    ids = np.empty(differences.shape, np.int32)
    for rows in _row_blocks(*differences.shape):
        np.add.accumulate(differences[rows], axis=1, dtype=np.int32, out=ids[rows])
    return ids


def _runs(positions: Ragged) -> tuple[Ragged, Ragged]:
    """Where each run of consecutive positions starts, and how long it is."""
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
    # neither a head nor a tail that has mass may lose all of it; an empty tail stays empty
    smallest = np.where(log_tail > -np.inf, 1, 0)
    return np.clip(angle, smallest, _widest(head)).astype(np.uint16)


def _widest(head: int) -> int:
    """The largest angle: all mass outside only where there is no head."""
    return _ANGLES - 1 if head else _ANGLES


def _steps(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    scaled = np.rint(values.astype(np.float64) * _STEPS)
    return np.clip(scaled, 0, np.iinfo(np.uint16).max).astype(np.uint16)


def _from_steps(steps: NDArray[np.uint16], sign: int) -> NDArray[np.float32]:
    return np.multiply(steps, np.float32(sign / _STEPS), dtype=np.float32)


_PER_RADIAN = _ANGLES / (math.pi / 2)
with np.errstate(divide="ignore"):  # a tail, or a head, that holds nothing
    _sines = np.sin(np.arange(_ANGLES + 1) / _PER_RADIAN)
    _LOG_TAIL = (2.0 * np.log(_sines)).astype(np.float32)
    _LOG_HEAD_MASS = (2.0 * np.log(_sines[::-1])).astype(np.float32)
