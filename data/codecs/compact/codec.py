"""A small encoding: exact ids, rounded probabilities, and nothing that follows from the rest.

Ids are replaced by their rank, in an order that is learned (`ordering.py`), and packed as gaps
(`gaps.py`).
Probabilities of the head are rounded to levels of sqrt(p) (`rounding.py`).

Tail samples are packed as the distinct ids of a position, each with one bit: whether it was drawn
more than once. The counts of those that were are stored, but for the last of a position, which
follows from R.

A label is mostly among the tokens of its record. Then its place there is stored instead of its id,
and its log-probability as the difference to what the record says of it. The entropy is stored as
the difference to that of the samples.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ...alignment import label_indices, labels
from ...columns import (
    expect_column,
    expect_lists,
    from_positions,
    from_sequences,
    to_positions,
    to_sequences,
)
from ...schema import Block, Capture, Tail, Targets, count_type, target_shapes
from . import compiled
from .drawn import Drawn
from .gaps import LARGEST, GapPacking, Sets
from .ordering import ordered
from .record import Record, kept, ranks_of, with_labels
from .rounding import (
    ANGLE_ERROR,
    STEPS,
    levels_of,
    log_masses,
    to_angle,
    to_steps,
    widest_angle,
)
from .runs import from_runs, to_runs

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ...columns import Columns
    from .rounding import Levels

_HEAD = GapPacking("head_ids", flags=False)
_LARGEST_POWER = 6.0
"""At a larger temperature, the weight of the lowest level would underflow float32."""
_MOST_FREQUENT = 16_384
"""Most tokens that the manifest lists in their order; the others follow by id. Measured, bytes of
the ids of a position, V = 49,152: 17.9 with none, 16.8 with 1,024, 15.9 with 4,096, 15.4 with all.
At V = 128,256, 32,768 tokens save 0.4 bytes in the block that they were learned from, and 0.01 in
the next one."""


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
    """The tokens of the first ranks. The ranks of the others follow, by id."""

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
        """The codec with an order of the tokens of a block. Tokens that were given are kept."""
        if self.frequent:
            return self
        tokens = block.sequences.tokens.values
        order = ordered(block.targets, tokens, self.vocabulary, _MOST_FREQUENT)
        return replace(self, frequent=tuple(order))

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
        positions, ranks = sequences.positions, ranks_of(self.vocabulary, self.frequent)
        columns: Columns = {}
        arrays: dict[str, NDArray[Any]] = {}
        record = Record(len(targets))
        if capture.head:
            ids, levels = self._levels.by_id(ranks.of(targets.head_ids), levels_MK)
            sizes = np.full(len(targets), capture.head)
            columns |= _HEAD.pack(Sets(ids.ravel(), sizes), positions.offsets)
            angle = to_angle(targets.log_tail, capture.head)
            arrays |= {"head_levels": levels, "tail_angle": angle}
            record.set_head(self._levels, ids, levels, angle, ranks.tokens)
        if capture.tail:
            record.drawn = Drawn.of(targets.tail, ranks.of(targets.tail.ids), capture.tail)
            columns |= record.drawn.pack(ranks.of(record.drawn.ids), positions.offsets)
            arrays["tail_sizes"] = record.drawn.sizes.astype(count_type(capture.tail))
        code_M = record.codes(labels(sequences))
        arrays["label_code"] = code_M
        arrays["label_logprob"], arrays["entropy"] = record.folded(
            code_M,
            to_steps(-targets.label_logprob, "-label_logprob"),
            to_steps(targets.entropy, "entropy"),
        )
        arrays |= {"log_norm": targets.log_norm} if capture.temperatures else {}
        arrays |= {"chunk_sizes": targets.chunk_sizes.astype(np.int8)} if capture.chunks else {}
        starts, lengths = to_runs(positions)
        shown = np.ones(len(sequences.tokens.values), np.bool_)
        shown[label_indices(sequences.tokens.offsets, positions)[code_M > 0]] = False
        own: Columns = {
            "token_ids": kept(sequences.tokens, shown, self._id_type),
            "run_starts": starts,
            "run_lengths": lengths,
        }
        named = from_sequences(sequences)
        del named["token_ids"], named["positions"]
        return named | own | columns | from_positions(arrays, positions)

    def decode(self, columns: Columns, capture: Capture) -> Block:
        """The block. Heads are most probable first; of equal levels, the token of the smaller rank
        comes first. Samples are by rank."""
        return self._decode(columns, capture)[0]

    def _decode(self, columns: Columns, capture: Capture) -> tuple[Block, NDArray[np.uint8]]:
        """The block, and [M, K] the levels of its heads."""
        stored: dict[str, Any] = columns
        positions = from_runs(stored["run_starts"], stored["run_lengths"])
        count, ranks = len(positions.values), ranks_of(self.vocabulary, self.frequent)
        loops = compiled.loops(count)
        arrays = to_positions(columns, positions)
        shapes = target_shapes(capture, count)

        def column(name: str, dtype: Any, field: str = "entropy") -> NDArray[Any]:
            return expect_column(arrays, name, shapes[field][0], dtype)

        record = Record(count, loops)
        if capture.head:
            sizes = np.full(count, capture.head)
            sets = _HEAD.unpack(
                columns, sizes, positions.offsets, ranks.tokens, ranks=True, loops=loops
            )
            levels = column("head_levels", np.uint8, "head_ids")
            angle = column("tail_angle", np.uint16)
            if angle.max(initial=0) > widest_angle(capture.head):
                raise ValueError(f"column 'tail_angle' reaches {angle.max()}, beyond a right angle")
            ids = sets.ids.reshape(levels.shape)
            record.set_head(self._levels, ids, levels, angle, ranks.tokens)
        tail = Tail.empty(count, logprobs=capture.keeps_tail_logprobs)
        if capture.tail:
            record.drawn = Drawn.unpack(
                columns,
                column("tail_sizes", count_type(capture.tail)).astype(np.int64),
                positions.offsets,
                draws=capture.tail,
                logprobs=capture.keeps_tail_logprobs,
                tokens_V=ranks.tokens,
                loops=loops,
            )
            tail = record.drawn.tail()
        code_M = column("label_code", np.uint8)
        label_ids, label_logprob, entropy = record.unfolded(
            code_M, column("label_logprob", np.uint16), column("entropy", np.uint16)
        )
        log_tail, log_head = log_masses(record.angle)
        targets = Targets(
            head_ids=record.ids,
            head_logprobs=self._levels.logprobs(record.levels, log_head, record.sums, loops),
            log_tail=log_tail,
            tail=tail,
            label_logprob=label_logprob,
            entropy=entropy,
            log_norm=column("log_norm", np.float32, "log_norm"),
            chunk_sizes=column("chunk_sizes", np.int8, "chunk_sizes").astype(np.int32),
        )
        shown = expect_lists(columns, "token_ids", self._id_type)
        tokens = with_labels(shown, positions, code_M, label_ids, loops)
        sequences = to_sequences(columns | {"token_ids": tokens, "positions": positions})
        return Block(sequences=sequences, targets=targets, capture=capture), record.levels

    @property
    def _id_type(self) -> Any:
        return np.uint16 if self.vocabulary <= 1 << 16 else np.uint32

    @property
    def _levels(self) -> Levels:
        return levels_of(self.levels, self.temperature)
