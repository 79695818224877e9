"""Sequences and targets: what is known of a corpus, and of a teacher at each position.

Every other file refers to this one for shapes, dtypes and units.

Axes: N sequences, T tokens of one sequence, S tokens of all sequences, M supervised positions of
all sequences, K head, R tail samples, J distinct tail samples of all positions, C captured
temperatures, V real vocabulary (no padding rows).

Log-probabilities are natural logarithms under the softmax over the whole *real* vocabulary, at
temperature 1 unless a name states another one. Everything at position `t` describes token `t + 1`.
`data/alignment.py` is the only file that shifts by one.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

from .ragged import Ragged, Rows, join

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from .branches import Branches

LONGEST_CHUNK = 127
"""Most positions of a chunk (`TargetFields.chunk_sizes`)."""

Array = TypeVar("Array")
Samples = TypeVar("Samples")


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
    chunks: bool = False
    """Whether the tokens of the store are not the teacher's, so that the store holds `chunk_sizes`:
    the teacher's distribution is known where a chunk begins, and estimated inside. Written only if
    true."""
    branches: bool = False
    """Whether the store has `Sequences.branches`; its tokens are a student's. Written only if
    true."""
    guessed_labels: bool = False
    """Whether some labels were stored without their log-probability, and without an entry in the
    record that has it, so that `label_logprob` is a guess. Written only if true."""
    mass: bool = True
    """Whether the mass outside the head is known. It is not where another program renormalised the
    head over its own tokens: then `head_logprobs` sum to 1, and `log_tail` says nothing."""

    @property
    def keeps_tail_logprobs(self) -> bool:
        """Whether the store holds `tail_logprobs`: samples drawn at temperature 1 can be
        reweighted to another temperature only if their probabilities are known."""
        return self.tail > 0 and (self.tail_logprobs or bool(self.temperatures))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sequences(Rows):
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
    branches: Branches | None = None
    """Words of the teacher beside the text, or None (`Capture.branches`)."""

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TailFields(Generic[Array]):
    """The tokens that were drawn outside the head at M positions: each once, with its count.

    A sure teacher draws the same few tokens again and again, so that J is far below M * R. Position
    after position, the tokens of one position in any order.
    """

    ids: Array
    """[J] the tokens."""
    counts: Array
    """[J] how often each was drawn; those of a position sum to R, and each draw stands for
    `tail mass / R`."""
    logprobs: Array | None = None
    """[J] their log-probabilities; None if the capture does not keep them."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Tail(TailFields["NDArray[Any]"]):
    """The tail samples as numpy arrays: ids int32, counts of any integer type, the rest float32."""

    offsets: NDArray[np.int64]
    """[M + 1] position `m` has the entries `offsets[m]` to `offsets[m + 1]`."""

    def __len__(self) -> int:
        """M, the number of positions."""
        return len(self.offsets) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """[M] number of distinct tokens at each position."""
        return np.diff(self.offsets)

    def rows(self) -> NDArray[np.int64]:
        """[J] the position of each entry."""
        return np.repeat(np.arange(len(self)), self.lengths)

    def sums(self, values_J: NDArray[Any]) -> NDArray[np.float64]:
        """[M] the sum of a value over the entries of each position."""
        sums: NDArray[Any] = np.bincount(self.rows(), weights=values_J, minlength=len(self))
        return sums

    def take(self, rows: NDArray[np.int64]) -> Tail:
        """The chosen positions in the order given."""
        chosen = Ragged(self.ids, self.offsets).take(rows)
        entries = Ragged(self.ids, self.offsets).flat_indices(rows)
        return Tail(
            ids=chosen.values,
            counts=self.counts[entries],
            logprobs=None if self.logprobs is None else self.logprobs[entries],
            offsets=chosen.offsets,
        )

    @classmethod
    def gather(cls, chosen: Sequence[tuple[Tail, slice]]) -> Tail:
        """Consecutive positions of several parts, in the order given."""
        borders = [part.offsets[own.start : own.stop + 1] for part, own in chosen]
        lengths = np.concatenate([each[1:] - each[:-1] for each in borders])
        entries = [
            (part, slice(each[0], each[-1]))
            for (part, _), each in zip(chosen, borders, strict=True)
        ]
        logprobs = [None if part.logprobs is None else part.logprobs[own] for part, own in entries]
        return cls(
            ids=np.concatenate([part.ids[own] for part, own in entries]),
            counts=np.concatenate([part.counts[own] for part, own in entries]),
            logprobs=join(logprobs),
            offsets=np.append(0, np.cumsum(lengths, dtype=np.int64)),
        )

    @classmethod
    def concatenate(cls, parts: Sequence[Tail]) -> Tail:
        """All positions of all parts, in order."""
        ids = Ragged.concatenate([Ragged(part.ids, part.offsets) for part in parts])
        return cls(
            ids=ids.values,
            counts=np.concatenate([part.counts for part in parts]),
            logprobs=join([part.logprobs for part in parts]),
            offsets=ids.offsets,
        )

    @classmethod
    def empty(cls, positions: int, *, logprobs: bool = False) -> Tail:
        """No sample at any position."""
        return cls(
            ids=np.zeros(0, np.int32),
            counts=np.zeros(0, np.uint8),
            logprobs=np.zeros(0, np.float32) if logprobs else None,
            offsets=np.zeros(positions + 1, np.int64),
        )

    @classmethod
    def from_draws(cls, ids_MR: NDArray[Any], logprobs_MR: NDArray[Any] | None = None) -> Tail:
        """Count the draws of each position, which may be in any order.

        logprobs_MR  their log-probabilities; of equal tokens, that of the first draw is kept
        """
        count, draws = ids_MR.shape
        if draws == 0:
            return cls.empty(count, logprobs=logprobs_MR is not None)
        if (np.diff(ids_MR, axis=1) < 0).any():
            order = np.argsort(ids_MR, axis=1, kind="stable")
            ids_MR = np.take_along_axis(ids_MR, order, axis=1)
            if logprobs_MR is not None:
                logprobs_MR = np.take_along_axis(logprobs_MR, order, axis=1)
        first_MR = np.diff(ids_MR, axis=1, prepend=-1) != 0
        first_MR[:, 0] = True  # an id of -1 is refused later, by the rules of a record
        places = np.flatnonzero(first_MR)
        ends = np.cumsum(first_MR.sum(1), dtype=np.int64)
        return cls(
            ids=ids_MR.ravel()[places],
            counts=np.diff(places, append=count * draws).astype(count_type(draws)),
            logprobs=None if logprobs_MR is None else logprobs_MR.ravel()[places],
            offsets=np.concatenate([np.zeros(1, np.int64), ends]),
        )

    def expect_draws(self, count: int) -> None:
        """Raises ValueError if the counts of a position do not sum to R.  count  R"""
        if len(self) and (self.sums(self.counts) != count).any():
            raise ValueError(f"column 'tail_counts': those of a position do not sum to {count}")

    def draws(self, count: int) -> NDArray[Any]:
        """[M, R] indices of entries: each as often as it was drawn. Raises ValueError as
        `expect_draws`.  count  R"""
        self.expect_draws(count)
        return np.repeat(np.arange(len(self.ids)), self.counts).reshape(len(self), count)


def count_type(draws: int) -> Any:
    """The smallest integer type for the counts of R draws."""
    return np.min_scalar_type(draws)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TargetFields(Generic[Array, Samples]):
    """The fields of the teacher's sparse distribution at M supervised positions.

    This is the only list of these fields. `Targets` holds them as numpy arrays (ids int32, the rest
    float32), `stages.targets.tensors.TargetTensors` as tensors.
    """

    head_ids: Array
    """[M, K] ids of the most probable tokens, most probable first."""
    head_logprobs: Array
    """[M, K] log-probabilities of the head."""
    log_tail: Array
    """[M] log of the probability outside the head: a logsumexp of the complement, never 1 - sum."""
    tail: Samples
    """R tokens at each position, drawn from outside the head by systematic sampling."""
    label_logprob: Array
    """[M] the teacher's log-probability of the token that follows in the corpus."""
    entropy: Array
    """[M] the teacher's entropy, in nats."""
    log_norm: Array
    """[M, C] `logsumexp(log p / T)` over the whole vocabulary, per captured temperature T."""
    chunk_sizes: Array = None  # type: ignore[assignment]  # an array of width 0 if not passed
    """[M, 1] int32 if the tokens are not the teacher's, otherwise [M, 0]: the number of positions
    of the chunk that begins here, 0 inside a chunk. A chunk is the shortest stretch of text between
    two borders that the teacher's tokens share with these. Its first position has the teacher's
    distribution, and in `label_logprob` the teacher's log-probability of the whole chunk. The size
    is negative if nothing of the distribution could be mapped: then the record says at all
    positions of the chunk that the label is certain. Inside other chunks it holds an estimate of
    the next token, which forward KL learns and other losses that compare distributions leave out;
    in stores of earlier versions the label is certain there, too."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Targets(Rows, TargetFields["NDArray[Any]", Tail]):
    """The teacher's sparse distribution at M supervised positions, as numpy arrays."""

    def __post_init__(self) -> None:
        given: Any = self.chunk_sizes
        if given is None:
            object.__setattr__(self, "chunk_sizes", np.zeros((len(self.log_tail), 0), np.int32))

    def __len__(self) -> int:
        return len(self.log_tail)

    @classmethod
    def empty(cls, positions: int) -> Targets:
        """The targets of a capture that keeps neither head nor tail; all numbers are zero."""
        shapes = target_shapes(Capture(tail=0), positions)
        zeros: dict[str, Any] = {name: np.zeros(*shape) for name, shape in shapes.items()}
        return cls(**zeros, tail=Tail.empty(positions))


def target_shapes(capture: Capture, positions: int) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Shape and dtype of each field of `Targets` under this capture, besides the tail samples."""
    widths = {
        "head_ids": capture.head,
        "head_logprobs": capture.head,
        "log_norm": len(capture.temperatures),
        "chunk_sizes": int(capture.chunks),
    }
    return {
        f.name: (
            (positions, widths[f.name]) if f.name in widths else (positions,),
            np.int32 if f.name.endswith(("_ids", "_sizes")) else np.float32,
        )
        for f in fields(Targets)
        if f.name != "tail"
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
    def gather(cls, chosen: Sequence[tuple[Block, int]]) -> Block:
        """Sequences of several blocks, each named by its block and its index there, in the order
        given. For a batch this takes half the time of `take` and `concatenate`."""
        sequences: dict[str, Any] = {}
        for name in _SEQUENCE_FIELDS:
            values: list[Any] = [(getattr(block.sequences, name), row) for block, row in chosen]
            first: Any = values[0][0]
            if isinstance(first, np.ndarray):
                sequences[name] = np.stack([array[row] for array, row in values])
            elif first is not None:
                sequences[name] = type(first).gather(values)
        borders = [
            (block, block.sequences.positions.offsets[row : row + 2]) for block, row in chosen
        ]
        positions = [(block.targets, slice(*each.tolist())) for block, each in borders]
        targets: dict[str, Any] = {
            name: np.concatenate([getattr(part, name)[own] for part, own in positions])
            for name in _TARGET_FIELDS
        }
        return cls(
            sequences=Sequences(**sequences),
            targets=Targets(
                **targets, tail=Tail.gather([(part.tail, own) for part, own in positions])
            ),
            capture=chosen[0][0].capture,
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


_SEQUENCE_FIELDS = [each.name for each in fields(Sequences)]
_TARGET_FIELDS = [each.name for each in fields(Targets) if each.name != "tail"]


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
