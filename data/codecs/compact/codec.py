"""A small encoding: exact ids, rounded probabilities, and nothing that follows from the rest.

Ids are replaced by their rank, the most frequent token first, and packed as gaps (`gaps.py`).
Probabilities of the head are rounded to levels of sqrt(p) (`rounding.py`).

Tail samples are packed as the distinct ids of a position, each with one bit: whether it was drawn
more than once. The counts of those that were are stored, but for the last of a position, which
follows from R.

A label is mostly among the tokens of its record. Then its place there is stored instead of its id,
and its log-probability as the difference to what the record says of it. The entropy is stored as
the difference to that of the samples.
"""

from __future__ import annotations

import functools
import math
import operator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ...alignment import label_indices, labels
from ...columns import (
    expect_column,
    from_positions,
    from_sequences,
    list_offsets,
    to_positions,
    to_sequences,
)
from ...ragged import Ragged
from ...schema import Block, Capture, Tail, Targets, count_type, target_shapes
from .drawn import Drawn
from .gaps import LARGEST, GapPacking, Sets
from .rounding import (
    ANGLE_ERROR,
    STEPS,
    Levels,
    from_steps,
    log_masses,
    tail_mass,
    tail_steps,
    to_angle,
    to_steps,
    widest_angle,
)
from .runs import from_runs, to_runs

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ...columns import Columns

_HEAD = GapPacking("head_ids", flags=False)
_BEHIND = 2 * STEPS
"""A label outside the head, where no sample tells its probability: -log of its share of the tail's
mass, in steps."""
_SPREAD = 4.0
"""The entropy of what is outside the head, in nats, where no sample tells it."""
_LARGEST_POWER = 6.0
"""At a larger temperature, the weight of the lowest level would underflow float32."""
_MOST_FREQUENT = 16_384
"""Most tokens that the manifest lists by frequency; the others follow by id. Measured, bytes of the
ids of a position: V = 49,152: 17.9 with none, 16.8 with 1,024, 15.9 with 4,096, 15.4 with all;
V = 128,256, the whole record: 23.3 with 8,192, 23.0 with 16,384, 22.6 with 32,768."""


@dataclass(frozen=True, slots=True)
class CompactCodec:
    """Exact ids, and probabilities rounded to `levels` steps."""

    name: ClassVar[str] = "compact"
    compress: ClassVar[bool] = True
    rounding: ClassVar[float] = 0.5 / STEPS
    largest: ClassVar[int] = LARGEST

    vocabulary: int
    """V. Up to 65,536 tokens, an id takes two bytes before compression, otherwise four."""
    levels: int = 127
    """Steps of sqrt(p) between 0 and 1."""
    temperature: float = 1.0
    """T, the largest captured temperature, 1 to 6. Steps are uniform in p^(1 / 2T)."""
    frequent: tuple[int, ...] = ()
    """The most frequent tokens, most frequent first. The ranks of the others follow, by id."""

    def __post_init__(self) -> None:
        for name in ("vocabulary", "levels"):
            operator.index(getattr(self, name))  # raises TypeError unless it is a whole number
        if not 1 <= self.vocabulary <= self.largest:
            raise ValueError(f"vocabulary {self.vocabulary}: 1 to {self.largest}")
        if not 15 <= self.levels <= 254:
            raise ValueError(f"levels {self.levels}: 15 to 254")
        if not 1.0 <= self.temperature <= _LARGEST_POWER:
            raise ValueError(f"temperature {self.temperature}: 1 to {_LARGEST_POWER:g}")
        object.__setattr__(self, "frequent", tuple(map(operator.index, self.frequent)))
        inside = all(0 <= token < self.vocabulary for token in self.frequent)
        if len(set(self.frequent)) < len(self.frequent) or not inside:
            raise ValueError("frequent: expected different tokens of the vocabulary")

    @classmethod
    def fitting(cls, *, vocabulary: int, capture: Capture, **settings: Any) -> CompactCodec:
        """The codec for every captured temperature. `levels` may be set."""
        temperature = min(_LARGEST_POWER, float(max((1.0, *capture.temperatures))))
        return cls(vocabulary=vocabulary, temperature=temperature, **settings)

    def learned(self, block: Block) -> CompactCodec:
        """The codec with the frequent tokens of a block: of its heads and samples, by how often
        they occur, then of its text. Tokens that were given are kept."""
        if self.frequent:
            return self
        targets, tokens = block.targets, block.sequences.tokens.values
        size = self.vocabulary
        found_V = np.bincount(targets.head_ids.ravel(), minlength=size).astype(np.float64)
        found_V += np.bincount(targets.tail.ids, minlength=size)
        found_V += np.bincount(tokens, minlength=size) / (2 * len(tokens) + 1)
        most = min(_MOST_FREQUENT, np.count_nonzero(found_V))
        order = np.argsort(-found_V, kind="stable")[:most]
        return replace(self, frequent=tuple(order.tolist()))

    def maximum_error(self, capture: Capture) -> float:
        """Half a step for rounding, plus one step for the first entry, plus the error of scaling.

        Scaling divides by the norm of the rounded head. It moves an entry by at most the norm of
        all rounding errors, which is half a step times sqrt(K + 3).
        """
        if capture.head == 0:
            return 0.0
        step = self.temperature / self.levels
        return step * (1.0 + 0.5 * math.sqrt(capture.head + 3)) + ANGLE_ERROR

    def encode(self, block: Block) -> Columns:
        return self._encode(block, self._levels.of(block.targets.head_logprobs))

    def rounds_as(self, other: object) -> bool:
        return isinstance(other, CompactCodec) and self._rounds() == other._rounds()

    def _rounds(self) -> tuple[int, int, float]:
        return self.vocabulary, self.levels, self.temperature

    def recode(self, columns: Columns, capture: Capture, other: object) -> Columns:
        if other == self:
            return columns
        assert isinstance(other, CompactCodec)  # it rounds alike
        block, levels_MK = other._decode(columns, capture)
        return self._encode(block, levels_MK)

    def _encode(self, block: Block, levels_MK: NDArray[np.uint8]) -> Columns:
        """The columns of a block, with the levels of its heads."""
        sequences, targets, capture = block.sequences, block.targets, block.capture
        positions, ranks = sequences.positions, _ranks_of(self.vocabulary, self.frequent)
        columns: Columns = {}
        arrays: dict[str, NDArray[Any]] = {}
        record = _Record(positions=len(targets))
        if capture.head:
            ids, levels = self._levels.by_id(ranks.of(targets.head_ids), levels_MK)
            sizes = np.full(len(targets), capture.head)
            columns |= _HEAD.pack(Sets(ids.ravel(), sizes), positions.offsets)
            angle = to_angle(targets.log_tail, capture.head)
            arrays |= {"head_levels": levels, "tail_angle": angle}
            record.set_head(self._levels, ids, levels, angle)
        if capture.tail:
            record.drawn = Drawn.of(targets.tail, ranks.of(targets.tail.ids), capture.tail)
            columns |= record.drawn.pack(positions.offsets)
            arrays["tail_sizes"] = record.drawn.sizes.astype(count_type(capture.tail))
        code_M = record.codes(ranks.of(labels(sequences)))
        record.set_labels(code_M)
        arrays["label_code"] = code_M
        arrays["label_logprob"] = _less(
            to_steps(-targets.label_logprob, "-label_logprob"), record.label_steps()
        )
        arrays["entropy"] = _less(to_steps(targets.entropy, "entropy"), record.entropy_steps())
        arrays |= {"log_norm": targets.log_norm} if capture.temperatures else {}
        arrays |= {"chunk_sizes": targets.chunk_sizes.astype(np.int8)} if capture.chunks else {}
        starts, lengths = to_runs(positions)
        shown = np.ones(len(sequences.tokens.values), np.bool_)
        shown[label_indices(sequences.tokens.offsets, positions)[code_M > 0]] = False
        own: Columns = {
            "token_ids": _kept(sequences.tokens, shown, self._id_type),
            "run_starts": starts,
            "run_lengths": lengths,
        }
        named = from_sequences(sequences)
        del named["token_ids"], named["positions"]
        return named | own | columns | from_positions(arrays, positions)

    def decode(self, columns: Columns, capture: Capture) -> Block:
        """The block. Heads are most probable first; of equal levels, the more frequent token comes
        first. Samples are in the order of their frequency."""
        return self._decode(columns, capture)[0]

    def _decode(self, columns: Columns, capture: Capture) -> tuple[Block, NDArray[np.uint8]]:
        """The block, and [M, K] the levels of its heads."""
        stored: dict[str, Any] = columns
        positions = from_runs(stored["run_starts"], stored["run_lengths"])
        count, ranks = len(positions.values), _ranks_of(self.vocabulary, self.frequent)
        arrays = to_positions(columns, positions)
        shapes = target_shapes(capture, count)

        def column(name: str, dtype: Any, field: str = "entropy") -> NDArray[Any]:
            return expect_column(arrays, name, shapes[field][0], dtype)

        record = _Record(positions=count)
        if capture.head:
            sets = _HEAD.unpack(columns, np.full(count, capture.head), positions.offsets)
            levels = column("head_levels", np.uint8, "head_ids")
            angle = column("tail_angle", np.uint16)
            if angle.max(initial=0) > widest_angle(capture.head):
                raise ValueError(f"column 'tail_angle' reaches {angle.max()}, beyond a right angle")
            record.set_head(self._levels, sets.ids.reshape(levels.shape), levels, angle)
        tail = Tail.empty(count, logprobs=capture.keeps_tail_logprobs)
        if capture.tail:
            record.drawn = Drawn.unpack(
                columns,
                column("tail_sizes", count_type(capture.tail)).astype(np.int64),
                positions.offsets,
                draws=capture.tail,
                logprobs=capture.keeps_tail_logprobs,
            )
            tail = record.drawn.tail(ranks.ids(record.drawn.ranks))
        code_M = column("label_code", np.uint8)
        record.set_labels(code_M)
        label_steps = _plus(column("label_logprob", np.uint16), record.label_steps())
        entropy_steps = _plus(column("entropy", np.uint16), record.entropy_steps())
        log_tail, log_head = log_masses(record.angle)
        targets = Targets(
            head_ids=ranks.ids(record.ranks),
            head_logprobs=self._levels.logprobs(record.levels, log_head, record.sums),
            log_tail=log_tail,
            tail=tail,
            label_logprob=from_steps(label_steps, -1),
            entropy=from_steps(entropy_steps, 1),
            log_norm=column("log_norm", np.float32, "log_norm"),
            chunk_sizes=column("chunk_sizes", np.int8, "chunk_sizes").astype(np.int32),
        )
        tokens = _with_labels(
            stored["token_ids"], positions, code_M > 0, ranks.ids(record.label_ranks())
        )
        sequences = to_sequences(columns | {"token_ids": tokens, "positions": positions})
        return Block(sequences=sequences, targets=targets, capture=capture), record.levels

    @property
    def _id_type(self) -> Any:
        return np.uint16 if self.vocabulary <= 1 << 16 else np.uint32

    @property
    def _levels(self) -> Levels:
        return Levels(self.levels, self.temperature)


class _Ranks:
    """Tokens by frequency: the frequent ones first, then the others by id."""

    def __init__(self, vocabulary: int, frequent: tuple[int, ...]) -> None:
        others = np.ones(vocabulary, np.bool_)
        others[list(frequent)] = False
        self._ids = np.concatenate([np.array(frequent, np.int32), np.flatnonzero(others)])
        self._ids = self._ids.astype(np.int32)
        self._ranks = np.empty(vocabulary, np.int32)
        self._ranks[self._ids] = np.arange(vocabulary, dtype=np.int32)

    def of(self, ids: NDArray[np.int32]) -> NDArray[np.int32]:
        """The ranks of tokens."""
        return self._ranks[ids]

    def ids(self, ranks: NDArray[np.int32]) -> NDArray[np.int32]:
        """The tokens of ranks. Raises ValueError if a rank is not below V."""
        # a negative rank is a large one without its sign
        if ranks.size and ranks.view(np.uint32).max() >= len(self._ids):
            raise ValueError(f"a token's rank is {ranks.max()}, not below {len(self._ids)}")
        return self._ids.take(ranks)


@functools.lru_cache(maxsize=8)
def _ranks_of(vocabulary: int, frequent: tuple[int, ...]) -> _Ranks:
    return _Ranks(vocabulary, frequent)


class _Record:
    """The integers of a record at M positions, in which labels are looked up."""

    def __init__(self, positions: int) -> None:
        self.ranks = np.zeros((positions, 0), np.int32)
        """[M, K] the head, most probable first."""
        self.levels = np.zeros((positions, 0), np.uint8)
        self.sums = np.zeros((2, positions), np.int64)
        self.angle = np.full(positions, widest_angle(0), np.uint16)
        self.drawn: Drawn | None = None
        self._rounding: Levels | None = None
        self._in_head = self._columns = self._in_tail = self._entries = np.zeros(0, np.int64)
        """The positions whose labels are in the head, their columns there, those whose labels were
        drawn, and their entries there."""

    def set_head(
        self,
        rounding: Levels,
        ranks_MK: NDArray[np.int32],
        levels_MK: NDArray[np.uint8],
        angle_M: NDArray[np.uint16],
    ) -> None:
        self.ranks, self.levels = rounding.most_probable_first(ranks_MK, levels_MK)
        self.sums = rounding.sums(self.levels)
        self.angle, self._rounding = angle_M, rounding

    def codes(self, label_ranks_M: NDArray[np.int32]) -> NDArray[np.uint8]:
        """[M] the code of each label: 0 if it is not in the record or beyond the last code, then
        the entries of the head, the sample that was drawn most often, and the other samples."""
        head = self.ranks.shape[1]
        code_M = np.zeros(len(self.angle), np.int64)
        if head:
            is_label = self.ranks == label_ranks_M[:, None]
            code_M = np.where(is_label.any(1), is_label.argmax(1) + 1, 0)
        if self.drawn is not None:
            entry_M = self.drawn.find(label_ranks_M)
            starts_M = self.drawn.offsets[:-1]
            place_M = np.where(entry_M == self.drawn.tops(), 0, entry_M - starts_M + 1)
            code_M = np.where(entry_M >= 0, head + 1 + place_M, code_M)
        return np.where(code_M < 256, code_M, 0).astype(np.uint8)

    def set_labels(self, code_M: NDArray[np.uint8]) -> None:
        """The places of the labels from their codes. Raises ValueError for a code without one."""
        head = self.ranks.shape[1]
        self._in_head = np.flatnonzero((code_M > 0) & (code_M <= head))
        self._columns = code_M[self._in_head].astype(np.int64) - 1
        self._in_tail = rows = np.flatnonzero(code_M > head)
        places = code_M[rows].astype(np.int64) - (head + 1)
        if self.drawn is not None and (places <= self.drawn.sizes[rows]).all():
            others = self.drawn.offsets[rows] + places - 1
            self._entries = np.where(places == 0, self.drawn.tops()[rows], others)
        elif len(rows):
            raise ValueError("column 'label_code' names an entry that its record does not have")

    def label_ranks(self) -> NDArray[np.int32]:
        """[M] the rank of each label with a code; 0 for the others."""
        ranks_M = np.zeros(len(self.angle), np.int32)
        ranks_M[self._in_head] = self.ranks[self._in_head, self._columns]
        if self.drawn is not None:
            ranks_M[self._in_tail] = self.drawn.ranks[self._entries]
        return ranks_M

    def label_steps(self) -> NDArray[np.int64]:
        """[M] about -log p of each label, in steps."""
        steps_M = tail_steps(self.angle)
        if self.drawn is None:
            steps_M += _BEHIND
        else:
            steps_M += self.drawn.unseen_steps
            drawn = self.drawn.steps(self._entries)
            steps_M[self._in_tail] += drawn - self.drawn.unseen_steps
        if self._rounding is not None:
            levels = self.levels[self._in_head, self._columns]
            steps_M[self._in_head] = self._rounding.steps[levels]
        return steps_M

    def entropy_steps(self) -> NDArray[np.int64]:
        """[M] about the entropy, in steps: that of the head and of the samples."""
        if self._rounding is None:
            nothing = np.zeros(len(self.angle), np.int64)
            return nothing if self.drawn is None else self.drawn.entropy_steps()
        tail_M = tail_mass(self.angle)
        inside = _SPREAD if self.drawn is None else self.drawn.entropy_steps() / STEPS
        nats = self._rounding.entropy(self.sums, 1.0 - tail_M)
        nats += tail_M * (inside + tail_steps(self.angle) / STEPS)
        return np.rint(nats * STEPS).astype(np.int64)


def _less(steps: NDArray[np.uint16], expected: NDArray[np.int64]) -> NDArray[np.uint16]:
    """The difference to the expected steps: 0, -1, 1, -2, 2 as 0, 1, 2, 3, 4, in 16 bits."""
    off = (steps.astype(np.int64) - expected).astype(np.uint16).view(np.int16).astype(np.int64)
    return np.where(off < 0, -2 * off - 1, 2 * off).astype(np.uint16)


def _plus(folded: NDArray[np.uint16], expected: NDArray[np.int64]) -> NDArray[np.uint16]:
    """The steps of which `_less` made the difference."""
    half = (folded >> 1).astype(np.int64)
    return (expected + np.where(folded & 1, -half - 1, half)).astype(np.uint16)


def _kept(tokens: Ragged, shown: NDArray[np.bool_], dtype: Any) -> Ragged:
    """The tokens that do not follow from their record."""
    places = np.flatnonzero(shown)
    return Ragged(tokens.values[places].astype(dtype), np.searchsorted(places, tokens.offsets))


def _with_labels(
    shown: Ragged, positions: Ragged, known_M: NDArray[np.bool_], ids_M: NDArray[np.int32]
) -> Ragged:
    """All tokens: those that are stored, and the labels that are known from their records."""
    known = np.flatnonzero(known_M)
    known_N = np.diff(np.searchsorted(known, positions.offsets))
    offsets = list_offsets(shown.lengths + known_N)
    places = label_indices(offsets, positions)[known]
    tokens = np.empty(int(offsets[-1]), np.int32)
    own = np.ones(len(tokens), np.bool_)
    own[places] = False
    tokens[places] = ids_M[known]
    tokens[own] = shown.values
    return Ragged(tokens, offsets)
