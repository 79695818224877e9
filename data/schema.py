"""What a sequence and a target are. Every other file cites this one for shapes, dtypes and units.

Axes: N sequences, T tokens of one sequence, S tokens of all sequences, M supervised positions of
all sequences, K head, R tail samples, C captured temperatures, V real vocabulary (no padding rows).

Log-probabilities are natural logarithms under the softmax over the whole *real* vocabulary, at
temperature 1 unless a name says otherwise. Everything at position `t` is about token `t + 1`;
`data/alignment.py` is the only file that takes that step.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from .ragged import Ragged

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Capture:
    """Which part of the teacher's distribution is kept at each position."""

    head: int = 0
    """K: how many of the most probable tokens are kept with their log-probabilities. None by
    default: at the same bytes, samples of the whole distribution give a better gradient."""
    tail: int = 50
    """R: how many ids are drawn from the rest, each standing for `tail mass / R`."""
    temperatures: tuple[float, ...] = ()
    """Temperatures besides 1 at which the record must be exact: `log_norm` is stored for each."""
    tail_logprobs: bool = False
    """Whether the log-probability of each tail sample is kept; always so with temperatures."""
    seed: int = 0
    """Seeds the tail samples, together with the sequence id and the position."""

    @property
    def keeps_tail_logprobs(self) -> bool:
        """Samples drawn at temperature 1 can only be reweighted to another if they are known."""
        return self.tail > 0 and (self.tail_logprobs or bool(self.temperatures))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sequences:
    """N packed token sequences, without targets."""

    ids: NDArray[np.int64]
    """[N] the place of each sequence in its corpus split."""
    tokens: Ragged
    """[N][T] int32 token ids."""
    document_starts: Ragged
    """[N][D] int32 where in the sequence each document (or piece of one) begins; the first is 0."""
    document_ids: Ragged
    """[N][D] int64 the place of that document in the corpus."""
    positions: Ragged
    """[N][M] int32 the supervised positions, increasing: those that carry a target."""
    hashes: NDArray[np.uint64]
    """[N] `sequence_hash` of each sequence."""

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: NDArray[np.int64]) -> Sequences:
        """The chosen rows in the order given."""
        return Sequences(**{f.name: _take(getattr(self, f.name), rows) for f in fields(self)})

    @classmethod
    def concatenate(cls, parts: Sequence[Sequences]) -> Sequences:
        """All rows of all parts, in order."""
        return cls(**{f.name: _join([getattr(p, f.name) for p in parts]) for f in fields(cls)})


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Targets:
    """The teacher's sparse distribution at M supervised positions."""

    head_ids: NDArray[np.int32]
    """[M, K] token ids, most probable first."""
    head_logprobs: NDArray[np.float32]
    """[M, K] their log-probabilities."""
    log_tail: NDArray[np.float32]
    """[M] log of the probability outside the head: a logsumexp of the complement, never 1 - sum."""
    tail_ids: NDArray[np.int32]
    """[M, R] ids drawn from outside the head by systematic sampling, increasing; repeats count."""
    tail_logprobs: NDArray[np.float32] | None
    """[M, R] their log-probabilities, or None where the capture does not keep them."""
    label_logprob: NDArray[np.float32]
    """[M] the teacher's log-probability of the token that really came next."""
    entropy: NDArray[np.float32]
    """[M] the teacher's entropy, in nats."""
    log_norm: NDArray[np.float32]
    """[M, C] `logsumexp(log p / T)` over the whole vocabulary, per captured temperature T."""

    def __len__(self) -> int:
        return len(self.log_tail)

    def take(self, rows: NDArray[np.int64]) -> Targets:
        """The chosen positions in the order given."""
        return Targets(**{f.name: _take(getattr(self, f.name), rows) for f in fields(self)})

    @classmethod
    def concatenate(cls, parts: Sequence[Targets]) -> Targets:
        """All positions of all parts, in order."""
        return cls(**{f.name: _join([getattr(p, f.name) for p in parts]) for f in fields(cls)})


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Block:
    """Some sequences and, position by position, their targets."""

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
        """All sequences of all parts, in order."""
        return cls(
            sequences=Sequences.concatenate([p.sequences for p in parts]),
            targets=Targets.concatenate([p.targets for p in parts]),
            capture=parts[0].capture,
        )


def sequence_hash(
    tokens_T: NDArray[Any], document_starts_D: NDArray[Any], positions_M: NDArray[Any]
) -> int:
    """64 bits of BLAKE2b over what the teacher read and where it was asked.

    Kept beside every record and checked on every read, so that a target can never be paired with
    other tokens, other document borders or another mask.
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
