"""The teacher's targets as tensors, and their probabilities at a temperature."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ...data.alignment import labels
from ...data.schema import Capture, Tail, TailFields, TargetFields, Targets, count_type

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from ...data.schema import Block


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TailTensors(TailFields["torch.Tensor"]):
    """The tail samples at M positions as tensors on one device.

    Unlike on disk, an entry may have a count of 0: it changes nothing. Selection marks repeated
    draws in this way, so that a device need not wait until their number is known.
    """

    lengths: torch.Tensor
    """[M] int32, number of entries of each position."""
    offsets: torch.Tensor
    """[M + 1] int64, first entry of each position. It stays on the CPU, where slices are made."""

    def rows(self) -> torch.Tensor:
        """[J] int64, the position of each entry."""
        positions = torch.arange(len(self.lengths), device=self.lengths.device)
        return positions.repeat_interleave(self.lengths, output_size=len(self.ids))

    def slice(self, start: int, end: int) -> TailTensors:
        """Positions `start` to `end`, as views, with ids as int64."""
        offsets = self.offsets[start : end + 1]
        first, last = int(offsets[0]), int(offsets[-1])
        return TailTensors(
            ids=self.ids[first:last].long(),
            counts=self.counts[first:last],
            logprobs=None if self.logprobs is None else self.logprobs[first:last],
            lengths=self.lengths[start:end],
            offsets=offsets - first,
        )

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> TailTensors:
        """Apply a function to every tensor but the offsets."""
        return TailTensors(
            ids=change(self.ids),
            counts=change(self.counts),
            logprobs=None if self.logprobs is None else change(self.logprobs),
            lengths=change(self.lengths),
            offsets=self.offsets,
        )

    @classmethod
    def from_tail(cls, tail: Tail) -> TailTensors:
        """Copy samples, which may be read-only views of a mapped file."""
        logprobs = tail.logprobs
        return cls(
            ids=torch.from_numpy(tail.ids.astype(np.int32)),
            counts=_counts(tail.counts),
            logprobs=None if logprobs is None else torch.from_numpy(logprobs.astype(np.float32)),
            lengths=torch.from_numpy(tail.lengths.astype(np.int32)),
            offsets=torch.from_numpy(tail.offsets.astype(np.int64)),
        )

    @classmethod
    def from_draws(
        cls, ids_MR: torch.Tensor, logprobs_MR: torch.Tensor | None = None
    ) -> TailTensors:
        """Count draws in increasing order. Repeats stay, with a count of 0."""
        count, draws = ids_MR.shape
        first_MR = torch.ones_like(ids_MR, dtype=torch.bool)
        first_MR[:, 1:] = ids_MR[:, 1:] != ids_MR[:, :-1]
        # a draw counts until the next first one: the distance between their places
        places = torch.arange(draws, device=ids_MR.device).expand(count, draws)
        later = torch.where(first_MR, places, draws).flip(1).cummin(1).values.flip(1)
        following = torch.cat([later[:, 1:], later.new_full((count, min(1, draws)), draws)], 1)
        counts_MR = torch.where(first_MR, following - places, 0)
        return cls(
            ids=ids_MR.flatten(),
            counts=counts_MR.flatten(),
            logprobs=None if logprobs_MR is None else logprobs_MR.flatten(),
            lengths=torch.full((count,), draws, dtype=torch.int32, device=ids_MR.device),
            offsets=torch.arange(count + 1, device="cpu") * draws,
        )

    @classmethod
    def concatenate(cls, parts: Sequence[TailTensors]) -> TailTensors:
        """All positions of all parts, in order."""
        lengths = torch.cat([part.offsets.diff() for part in parts])
        logprobs = [part.logprobs for part in parts if part.logprobs is not None]
        return cls(
            ids=torch.cat([part.ids for part in parts]),
            counts=torch.cat([part.counts for part in parts]),
            logprobs=torch.cat(logprobs) if logprobs else None,
            lengths=torch.cat([part.lengths for part in parts]),
            offsets=torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]),
        )

    def to_tail(self, draws: int) -> Tail:
        """Copy to the host, without entries that count 0. draws  R"""
        counts = self.counts.cpu().numpy()
        drawn = np.flatnonzero(counts)
        ends = np.searchsorted(drawn, self.offsets.numpy())
        logprobs = self.logprobs
        return Tail(
            ids=self.ids.cpu().numpy()[drawn].astype(np.int32),
            counts=counts[drawn].astype(count_type(draws)),
            logprobs=None if logprobs is None else logprobs.float().cpu().numpy()[drawn],
            offsets=ends.astype(np.int64),
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TargetTensors(TargetFields["torch.Tensor", TailTensors]):
    """The targets at M supervised positions as tensors on one device.

    Selection produces this type, the loss consumes it. Ids are int32 where targets are read and
    moved, and int64 in `rows`, since torch gathers by int64 only.
    """

    labels: torch.Tensor
    """[M] the token that follows each position in the corpus."""
    capture: Capture = field(default_factory=Capture)
    """Which part of the distribution these targets hold."""
    others: tuple[TargetTensors, ...] = ()
    """The targets of further teachers at the same positions."""
    weights: torch.Tensor | None = None
    """[M] weight of each label, of branches; None if every label counts once."""

    def __post_init__(self) -> None:
        given: Any = self.chunk_sizes
        if given is None:
            empty = torch.zeros(len(self.labels), 0, dtype=torch.int32, device=self.labels.device)
            object.__setattr__(self, "chunk_sizes", empty)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def known(self) -> torch.Tensor | None:
        """[M] whether the teacher's distribution is known; None if it is at every position."""
        return self.chunk_sizes[:, 0] > 0 if self.capture.chunks else None

    @property
    def begins(self) -> torch.Tensor | None:
        """[M] whether a chunk begins; None if each position is a chunk."""
        return self.chunk_sizes[:, 0] != 0 if self.capture.chunks else None

    @property
    def sources(self) -> tuple[TargetTensors, ...]:
        """The targets of every teacher: the first teacher's, then `others`."""
        return (self, *self.others)

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> TargetTensors:
        """Apply a function to every tensor of every teacher."""
        return self._with(change, self.tail.map(change), tuple(o.map(change) for o in self.others))

    def rows(self, start: int, end: int) -> TargetTensors:
        """Positions `start` to `end` for a loss: as views, with ids as int64."""

        def part(tensor: torch.Tensor) -> torch.Tensor:
            rows = tensor[start:end]
            return rows if rows.is_floating_point() else rows.long()

        others = tuple(other.rows(start, end) for other in self.others)
        return self._with(part, self.tail.slice(start, end), others)

    def _with(
        self,
        change: Callable[[torch.Tensor], torch.Tensor],
        tail: TailTensors,
        others: tuple[TargetTensors, ...],
    ) -> TargetTensors:
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        for name, value in values.items():
            if isinstance(value, torch.Tensor):
                values[name] = change(value)
        return TargetTensors(**{**values, "tail": tail, "others": others})

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> TargetTensors:
        """The same targets on another device."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    @classmethod
    def from_block(cls, block: Block) -> TargetTensors:
        """Copy the targets of a block, which may be read-only views of a mapped file."""
        targets = block.targets
        arrays = {f.name: getattr(targets, f.name) for f in fields(targets) if f.name != "tail"}
        arrays["labels"] = labels(block.sequences)
        tensors: dict[str, Any] = {
            name: torch.from_numpy(array.astype("float32" if array.dtype.kind == "f" else "int32"))
            for name, array in arrays.items()
        }
        return cls(**tensors, tail=TailTensors.from_tail(targets.tail), capture=block.capture)

    @classmethod
    def of_labels(cls, labels_M: torch.Tensor, weights_M: torch.Tensor) -> TargetTensors:
        """Weighted labels without a distribution."""
        empty = Targets.empty(len(labels_M))
        arrays = {f.name: getattr(empty, f.name) for f in fields(empty) if f.name != "tail"}
        tensors: dict[str, Any] = {name: torch.from_numpy(array) for name, array in arrays.items()}
        return cls(
            **tensors,
            tail=TailTensors.from_tail(empty.tail),
            labels=labels_M,
            weights=weights_M,
            capture=Capture(tail=0, branches=True),
        )

    @classmethod
    def concatenate(cls, parts: Sequence[TargetTensors]) -> TargetTensors:
        """All positions of all parts, in order. The parts have one capture and no `others`."""
        values = {f.name: [getattr(part, f.name) for part in parts] for f in fields(cls)}
        joined: dict[str, Any] = {
            name: torch.cat(tensors)
            for name, tensors in values.items()
            if isinstance(tensors[0], torch.Tensor)
        }
        return replace(parts[0], **joined, tail=TailTensors.concatenate(values["tail"]))

    def to_targets(self) -> Targets:
        """Copy to the host, as `Targets`. Labels are left out: they follow from the sequences."""

        def array(tensor: torch.Tensor) -> Any:
            kind = torch.float32 if tensor.is_floating_point() else torch.int32
            return tensor.to(kind).cpu().numpy()

        dense = {f.name: array(getattr(self, f.name)) for f in fields(Targets) if f.name != "tail"}
        return Targets(**dense, tail=self.tail.to_tail(self.capture.tail))


def _counts(counts_J: NDArray[Any]) -> torch.Tensor:
    """Counts as the smallest type that torch computes with."""
    kind = np.uint8 if counts_J.dtype == np.uint8 else np.int32
    return torch.from_numpy(counts_J.astype(kind))


@dataclass(frozen=True, slots=True, eq=False)
class Tempered:
    """The teacher's probabilities at one temperature."""

    head: torch.Tensor
    """[M, K] exact probabilities of the head."""
    tail: torch.Tensor
    """[J] the weight of each tail entry; its expectation over samples is the tail itself."""
    rest: torch.Tensor
    """[M] exact mass outside the head."""
    log_head: torch.Tensor
    """[M, K] log of `head`."""


def tempered(target: TargetTensors, temperature: float) -> Tempered:
    """The target at `temperature`: head and rest are exact, the tail is unbiased.

    At T, `p_T(i) = exp(log p(i) / T - log_norm(T))`. A sample drawn with probability `p(i) / rest`
    has the importance weight `rest / R * p_T(i) / p(i)`, which keeps it unbiased.
    """
    tail, rest = target.tail, target.log_tail.exp()
    draws = max(1, target.capture.tail)
    if temperature == 1.0:
        weights = (rest / draws)[tail.rows()] * tail.counts
        return Tempered(target.head_logprobs.exp(), weights, rest, target.head_logprobs)
    log_norm = log_norm_at(target, temperature)
    log_head = target.head_logprobs / temperature - log_norm[:, None]
    weights = rest.new_zeros(len(tail.ids))
    if tail.logprobs is not None:
        log_ratio = tail.logprobs * (1.0 / temperature - 1.0)
        # one exponential of the sum: each factor alone could underflow to 0 or overflow
        weights = (log_ratio + (target.log_tail - log_norm)[tail.rows()]).exp() / draws
        weights = weights * tail.counts
    head = log_head.exp()
    # exact up to rounding of the head's sum; a tail that is empty at T = 1 is empty at every T
    left = (1.0 - head.sum(1)).clamp_(min=0.0)
    return Tempered(head, weights, torch.where(rest > 0, left, torch.zeros_like(left)), log_head)


def summed(target: TargetTensors, values_J: torch.Tensor) -> torch.Tensor:
    """[M] the sum of a value over the tail entries of each position."""
    return values_J.new_zeros(len(target)).index_add(0, target.tail.rows(), values_J)


def tail_logprobs_at(target: TargetTensors, temperature: float) -> torch.Tensor:
    """[J] the teacher's log-probabilities of the tail samples at `temperature`."""
    assert target.tail.logprobs is not None  # losses refuse captures without them
    if temperature == 1.0:
        return target.tail.logprobs
    return target.tail.logprobs / temperature - log_norm_at(target, temperature)[target.tail.rows()]


def log_norm_at(target: TargetTensors, temperature: float) -> torch.Tensor:
    """[M] `logsumexp(log p / T)` at a captured temperature."""
    return target.log_norm[:, target.capture.temperatures.index(temperature)]
