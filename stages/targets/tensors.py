"""The teacher's targets as tensors, and their probabilities at a temperature."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import torch

from ...data.alignment import labels
from ...data.schema import Capture, TargetFields, Targets

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ...data.schema import Block


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TargetTensors(TargetFields["torch.Tensor"]):
    """The targets at M supervised positions as tensors on one device; ids are int64.

    Selection produces this type, the loss consumes it.
    """

    labels: torch.Tensor
    """[M] the token that follows each position in the corpus."""
    capture: Capture = field(default_factory=Capture)
    """Which part of the distribution these targets hold."""
    others: tuple[TargetTensors, ...] = ()
    """The targets of further teachers at the same positions."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def sources(self) -> tuple[TargetTensors, ...]:
        """The targets of every teacher: the first teacher's, then `others`."""
        return (self, *self.others)

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> TargetTensors:
        """Apply a function to every tensor of every teacher."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        for name, value in values.items():
            if isinstance(value, torch.Tensor):
                values[name] = change(value)
        values["others"] = tuple(other.map(change) for other in self.others)
        return TargetTensors(**values)

    def rows(self, start: int, end: int) -> TargetTensors:
        """Positions `start` to `end`, as views."""
        return self.map(lambda tensor: tensor[start:end])

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> TargetTensors:
        """The same targets on another device."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    @classmethod
    def from_block(cls, block: Block) -> TargetTensors:
        """Copy the targets of a block, which may be read-only views of a mapped file."""
        arrays = {f.name: getattr(block.targets, f.name) for f in fields(block.targets)}
        arrays["labels"] = labels(block.sequences)
        tensors: dict[str, Any] = dict.fromkeys(arrays)
        for name, array in arrays.items():
            if array is not None:
                kind = "float32" if array.dtype.kind == "f" else "int64"
                tensors[name] = torch.from_numpy(array.astype(kind))
        return cls(**tensors, capture=block.capture)

    @classmethod
    def concatenate(cls, parts: Sequence[TargetTensors]) -> TargetTensors:
        """All positions of all parts, in order. The parts have one capture and no `others`."""
        values = {f.name: [getattr(part, f.name) for part in parts] for f in fields(cls)}
        joined: dict[str, Any] = {
            name: torch.cat(tensors)
            for name, tensors in values.items()
            if isinstance(tensors[0], torch.Tensor)
        }
        return replace(parts[0], **joined)

    def to_targets(self) -> Targets:
        """Copy to the host, as `Targets`. Labels are left out: they follow from the sequences."""

        def array(tensor: torch.Tensor | None) -> Any:
            if tensor is None:
                return None
            kind = torch.float32 if tensor.is_floating_point() else torch.int32
            return tensor.to(kind).cpu().numpy()

        return Targets(**{f.name: array(getattr(self, f.name)) for f in fields(Targets)})


@dataclass(frozen=True, slots=True, eq=False)
class Tempered:
    """The teacher's probabilities at one temperature."""

    head: torch.Tensor
    """[M, K] exact probabilities of the head."""
    tail: torch.Tensor
    """[M, R] the weight of each tail sample; its expectation over samples is the tail itself."""
    rest: torch.Tensor
    """[M] exact mass outside the head."""
    log_head: torch.Tensor
    """[M, K] log of `head`."""


def tempered(target: TargetTensors, temperature: float) -> Tempered:
    """The target at `temperature`: head and rest are exact, the tail is unbiased.

    At T, `p_T(i) = exp(log p(i) / T - log_norm(T))`. A sample drawn with probability `p(i) / rest`
    has the importance weight `rest / R * p_T(i) / p(i)`, which keeps it unbiased.
    """
    samples = max(1, target.tail_ids.shape[1])
    rest = target.log_tail.exp()
    shape = target.tail_ids.shape
    if temperature == 1.0:
        head = target.head_logprobs.exp()
        tail = (rest / samples)[:, None].expand(shape)
        return Tempered(head, tail, rest, target.head_logprobs)
    log_norm = log_norm_at(target, temperature)
    log_head = target.head_logprobs / temperature - log_norm
    if target.tail_logprobs is None:
        tail = rest.new_zeros(shape)
    else:
        log_ratio = target.tail_logprobs * (1.0 / temperature - 1.0) - log_norm
        # one exponential of the sum: each factor alone could underflow to 0 or overflow
        tail = (log_ratio + target.log_tail[:, None]).exp() / samples
    head = log_head.exp()
    # exact up to rounding of the head's sum; a tail that is empty at T = 1 is empty at every T
    left = (1.0 - head.sum(1)).clamp_(min=0.0)
    return Tempered(head, tail, torch.where(rest > 0, left, torch.zeros_like(left)), log_head)


def tail_logprobs_at(target: TargetTensors, temperature: float) -> torch.Tensor:
    """[M, R] the teacher's log-probabilities of the tail samples at `temperature`."""
    assert target.tail_logprobs is not None  # losses refuse captures without them
    if temperature == 1.0:
        return target.tail_logprobs
    return target.tail_logprobs / temperature - log_norm_at(target, temperature)


def log_norm_at(target: TargetTensors, temperature: float) -> torch.Tensor:
    """[M, 1] `logsumexp(log p / T)` at a captured temperature."""
    return target.log_norm[:, target.capture.temperatures.index(temperature), None]
