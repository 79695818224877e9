"""Sequences and targets. Every other file refers to this one for shapes, dtypes and units.

Axes: N sequences, T tokens of one sequence, S tokens of all sequences, M supervised positions of
all sequences, K head, R tail samples, C captured temperatures, V real vocabulary (no padding rows).

Log-probabilities are natural logarithms under the softmax over the whole *real* vocabulary, at
temperature 1 unless a name says otherwise. Everything at position `t` describes token `t + 1`.
`data/alignment.py` is the only file that shifts by one.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

from .ragged import Ragged

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sequences:
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

    def take(self, rows: NDArray[np.int64]) -> Sequences:
        """The chosen sequences in the order given."""
        return Sequences(**{f.name: _take(getattr(self, f.name), rows) for f in fields(self)})

    @classmethod
    def concatenate(cls, parts: Sequence[Sequences]) -> Sequences:
        """All sequences of all parts, in order."""
        return cls(**{f.name: _join([getattr(p, f.name) for p in parts]) for f in fields(cls)})


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
class Targets(TargetFields["NDArray[Any]"]):
    """The teacher's sparse distribution at M supervised positions, as numpy arrays."""

    def __len__(self) -> int:
        return len(self.log_tail)

    def take(self, rows: NDArray[np.int64]) -> Targets:
        """The chosen positions in the order given."""
        return Targets(**{f.name: _take(getattr(self, f.name), rows) for f in fields(self)})

    @classmethod
    def concatenate(cls, parts: Sequence[Targets]) -> Targets:
        """All positions of all parts, in order."""
        return cls(**{f.name: _join([getattr(p, f.name) for p in parts]) for f in fields(cls)})

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
        """The chosen sequences with their targets, in the order given."""
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
