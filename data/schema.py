"""Sequences and targets, and the table of columns that codecs and formats exchange.

Every other file refers to this one for shapes, dtypes and units.

Axes: N sequences, T tokens of one sequence, S tokens of all sequences, M supervised positions of
all sequences, K head, R tail samples, C captured temperatures, V real vocabulary (no padding rows).

Log-probabilities are natural logarithms under the softmax over the whole *real* vocabulary, at
temperature 1 unless a name states another one. Everything at position `t` describes token `t + 1`.
`data/alignment.py` is the only file that shifts by one.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar, cast

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, eq=False)
class Ragged:
    """`len(offsets) - 1` rows; row `i` is `values[offsets[i]:offsets[i + 1]]`.

    values  [S]      all rows, one after the other
    offsets [N + 1]  int64, `offsets[0] == 0`, `offsets[-1] == S`
    """

    values: NDArray[Any]
    offsets: NDArray[np.int64]

    @classmethod
    def from_rows(cls, rows: Sequence[Any], dtype: Any) -> Ragged:
        """Lay out a list of array-likes. An empty list gives no rows."""
        offsets = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum([len(row) for row in rows], out=offsets[1:])
        values = np.empty(int(offsets[-1]), dtype=dtype)
        for row, start, end in zip(rows, offsets[:-1], offsets[1:], strict=True):
            values[start:end] = row
        return cls(values, offsets)

    @classmethod
    def concatenate(cls, parts: Sequence[Ragged]) -> Ragged:
        """All rows of all parts, in order."""
        lengths = np.concatenate([part.lengths for part in parts])
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
        return cls(np.concatenate([part.values for part in parts]), offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> NDArray[Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.values[self.offsets[index] : self.offsets[index + 1]]

    def __iter__(self) -> Iterator[NDArray[Any]]:
        return (self[index] for index in range(len(self)))

    @property
    def lengths(self) -> NDArray[np.int64]:
        """[N] length of each row."""
        return np.diff(self.offsets)

    def flat_indices(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Indices of the chosen rows in `values`, row after row."""
        lengths = self.lengths[rows]
        starts = self.offsets[:-1][rows]
        ends = np.cumsum(lengths)
        within = np.arange(int(ends[-1]) if len(ends) else 0) - np.repeat(ends - lengths, lengths)
        return np.repeat(starts, lengths) + within

    def take(self, rows: NDArray[np.int64]) -> Ragged:
        """The chosen rows in the order given. A row may be chosen more than once."""
        offsets = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum(self.lengths[rows], out=offsets[1:])
        return Ragged(self.values[self.flat_indices(rows)], offsets)


Array = TypeVar("Array")


@dataclass(frozen=True, slots=True, kw_only=True)
class Capture:
    """Which part of the teacher's distribution is kept at each position."""

    head: int = 0
    """K: how many of the most probable tokens are kept with their log-probabilities. The default
    is 0: at the same bytes, samples of the whole distribution give a better gradient."""
    tail: int = 50
    """R: how many ids are sampled from outside the head. Each stands for `tail mass / R`."""
    temperatures: tuple[float, ...] = ()
    """Temperatures besides 1 at which the target must be exact. `log_norm` is stored for each."""
    tail_logprobs: bool = False
    """Whether the log-probability of each tail sample is kept. Temperatures imply it."""
    seed: int = 0
    """Seed of the tail samples, together with the sequence id and the position."""

    @property
    def keeps_tail_logprobs(self) -> bool:
        """Whether the store holds `tail_logprobs`: samples drawn at temperature 1 can be
        reweighted to another temperature only if their probabilities are known."""
        return self.tail > 0 and (self.tail_logprobs or bool(self.temperatures))


class _Rows:
    """Base of dataclasses whose fields all have one row per sequence, or per position."""

    __slots__ = ()

    def take(self, rows: NDArray[np.int64]) -> Self:
        """The chosen rows in the order given."""
        values = {f.name: getattr(self, f.name) for f in fields(cast("Any", self))}
        return type(self)(**{name: _take(value, rows) for name, value in values.items()})

    @classmethod
    def concatenate(cls, parts: Sequence[Self]) -> Self:
        """All rows of all parts, in order."""
        names = [f.name for f in fields(cast("Any", cls))]
        return cls(**{name: _join([getattr(part, name) for part in parts]) for name in names})


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sequences(_Rows):
    """N packed token sequences, without targets."""

    ids: NDArray[np.int64]
    """[N] index of each sequence in its corpus split."""
    tokens: Ragged
    """[N][T] int32 token ids."""
    document_starts: Ragged
    """[N][D] int32 position at which each document (or piece of one) begins; the first is 0."""
    document_ids: Ragged
    """[N][D] int64 index of each document in the corpus."""
    positions: Ragged
    """[N][M] int32 supervised positions, increasing: the positions that have a target."""
    hashes: NDArray[np.uint64]
    """[N] `sequence_hash` of each sequence."""

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TargetFields(Generic[Array]):
    """The fields of the teacher's sparse distribution at M supervised positions.

    This is the only list of these fields. `Targets` holds them as numpy arrays (ids int32, the rest
    float32), `stages.targets.tensors.TargetTensors` as tensors (ids int64).
    """

    head_ids: Array
    """[M, K] ids of the most probable tokens, most probable first."""
    head_logprobs: Array
    """[M, K] log-probabilities of the head."""
    log_tail: Array
    """[M] log of the probability outside the head: a logsumexp of the complement, never 1 - sum."""
    tail_ids: Array
    """[M, R] ids drawn from outside the head by systematic sampling, increasing; repeats count."""
    tail_logprobs: Array | None = None
    """[M, R] log-probabilities of the tail samples; None if the capture does not keep them."""
    label_logprob: Array
    """[M] the teacher's log-probability of the token that follows in the corpus."""
    entropy: Array
    """[M] the teacher's entropy, in nats."""
    log_norm: Array
    """[M, C] `logsumexp(log p / T)` over the whole vocabulary, per captured temperature T."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Targets(_Rows, TargetFields["NDArray[Any]"]):
    """The teacher's sparse distribution at M supervised positions, as numpy arrays."""

    def __len__(self) -> int:
        return len(self.log_tail)

    @classmethod
    def empty(cls, positions: int) -> Targets:
        """The targets of a capture that keeps neither head nor tail; all numbers are zero."""
        shapes = target_shapes(Capture(tail=0), positions)
        return cls(**{name: np.zeros(shape, dtype) for name, (shape, dtype) in shapes.items()})


def target_shapes(capture: Capture, positions: int) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Shape and dtype of each field that `Targets` has under this capture."""
    widths = {
        "head_ids": capture.head,
        "head_logprobs": capture.head,
        "tail_ids": capture.tail,
        "tail_logprobs": capture.tail,
        "log_norm": len(capture.temperatures),
    }
    return {
        f.name: (
            (positions, widths[f.name]) if f.name in widths else (positions,),
            np.int32 if f.name.endswith("_ids") else np.float32,
        )
        for f in fields(Targets)
        if f.name != "tail_logprobs" or capture.keeps_tail_logprobs
    }


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Block:
    """Sequences and the targets at their supervised positions."""

    sequences: Sequences
    targets: Targets
    """`len(targets) == len(sequences.positions.values)`, in the same order."""
    capture: Capture = field(default_factory=Capture)

    def __len__(self) -> int:
        return len(self.sequences)

    def take(self, rows: NDArray[np.int64]) -> Block:
        return Block(
            sequences=self.sequences.take(rows),
            targets=self.targets.take(self.sequences.positions.flat_indices(rows)),
            capture=self.capture,
        )

    @classmethod
    def concatenate(cls, parts: Sequence[Block]) -> Block:
        """All sequences of all parts, in order; a single part is returned as it is."""
        if len(parts) == 1:
            return parts[0]
        return cls(
            sequences=Sequences.concatenate([p.sequences for p in parts]),
            targets=Targets.concatenate([p.targets for p in parts]),
            capture=parts[0].capture,
        )


def sequence_hash(
    tokens_T: NDArray[Any], document_starts_D: NDArray[Any], positions_M: NDArray[Any]
) -> int:
    """64 bits of BLAKE2b over the tokens, the document borders and the supervised positions.

    The hash is stored with every sequence and checked on every read, so that targets are never
    paired with other tokens, other document borders or other positions.
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in (tokens_T, document_starts_D, positions_M):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(np.ascontiguousarray(part, dtype="<i4").tobytes())
    return int.from_bytes(digest.digest(), "little")


def _take(value: Any, rows: NDArray[np.int64]) -> Any:
    if isinstance(value, Ragged):
        return value.take(rows)
    return None if value is None else value[rows]


def _join(parts: list[Any]) -> Any:
    if isinstance(parts[0], Ragged):
        return Ragged.concatenate(parts)
    return None if parts[0] is None else np.concatenate(parts)


Columns = dict[str, "NDArray[Any] | Ragged"]
"""Columns by name: one value per sequence `[N]`, or one list per sequence (`Ragged`)."""

_SEQUENCE_COLUMNS = {
    "sequence_id": "ids",
    "token_ids": "tokens",
    "document_starts": "document_starts",
    "document_ids": "document_ids",
    "positions": "positions",
    "sequence_hash": "hashes",
}


def from_sequences(sequences: Sequences) -> Columns:
    """The columns that describe the sequences themselves."""
    return {column: getattr(sequences, name) for column, name in _SEQUENCE_COLUMNS.items()}


def to_sequences(columns: Columns) -> Sequences:
    """The sequences of a block. `check_hashes` compares them with what was written."""
    values: dict[str, Any] = {name: columns[c] for c, name in _SEQUENCE_COLUMNS.items()}
    return Sequences(**values)


def check_hashes(sequences: Sequences) -> None:
    """Compare each sequence with its stored hash. Raises ValueError if a sequence is not what was
    written (which)."""
    for row in range(len(sequences)):
        expected = sequence_hash(
            sequences.tokens[row], sequences.document_starts[row], sequences.positions[row]
        )
        if expected != int(sequences.hashes[row]):
            raise ValueError(
                f"sequence {int(sequences.ids[row])} is not what was written: its tokens, document "
                "borders or positions do not match their hash"
            )


def from_positions(values: Mapping[str, NDArray[Any]], positions: Ragged) -> Columns:
    """Per-position arrays `[M, ...]` as lists with the row borders of the supervised positions."""
    return {name: Ragged(array, positions.offsets) for name, array in values.items()}


def to_positions(columns: Columns, positions: Ragged) -> dict[str, NDArray[Any]]:
    """The per-position arrays `[M, ...]`: the lists with the row borders of the positions."""
    return {
        name: column.values
        for name, column in columns.items()
        if isinstance(column, Ragged) and np.array_equal(column.offsets, positions.offsets)
    }


def expect_column(
    arrays: Mapping[str, NDArray[Any]], name: str, shape: tuple[int, ...], dtype: Any
) -> NDArray[Any]:
    """One per-position array. An array of width 0 is not stored and is made here. Raises ValueError
    if the column is missing, or has another shape or dtype."""
    if 0 in shape[1:]:
        return np.zeros(shape, dtype)
    array = arrays.get(name)
    if array is None or array.shape != shape or array.dtype != dtype:
        found = "nothing" if array is None else f"{array.dtype} {array.shape}"
        raise ValueError(
            f"column '{name}' should be {np.dtype(dtype).name} {shape}, an entry for each "
            f"supervised position: {found}"
        )
    return array
