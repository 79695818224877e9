"""Targets as tensors, and what they say at a temperature."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import torch

from ...data.alignment import labels
from ...data.schema import Capture

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ...data.schema import Sequences, Targets


@dataclass(frozen=True, slots=True, eq=False)
class TargetTensors:
    """`data.schema.Targets` and the labels, on the device of the logits. Ids are int64."""

    labels: torch.Tensor
    head_ids: torch.Tensor
    head_logprobs: torch.Tensor
    log_tail: torch.Tensor
    tail_ids: torch.Tensor
    entropy: torch.Tensor
    log_norm: torch.Tensor
    tail_logprobs: torch.Tensor | None = None
    capture: Capture = field(default_factory=Capture)
    others: tuple[TargetTensors, ...] = ()
    """What further teachers say of the same positions."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def sources(self) -> tuple[TargetTensors, ...]:
        """What every teacher says: this one, then the others."""
        return (self, *self.others)

    def rows(self, start: int, end: int) -> TargetTensors:
        """Positions `start` to `end`."""
        return TargetTensors(
            **{f.name: _cut(getattr(self, f.name), start, end) for f in fields(self)}
        )

    def to(self, device: torch.device) -> TargetTensors:
        """The same on another device."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        for name, value in moved.items():
            if isinstance(value, torch.Tensor):
                moved[name] = value.to(device)
        moved["others"] = tuple(other.to(device) for other in self.others)
        return TargetTensors(**moved)

    @classmethod
    def of(cls, tensors: Mapping[str, Any]) -> TargetTensors:
        """Pick the fields out of a batch."""
        return cls(**{f.name: tensors[f.name] for f in fields(cls) if f.name in tensors})


def target_tensors(sequences: Sequences, targets: Targets | None) -> dict[str, Any]:
    """The tensors of a batch; without targets, those of a capture that kept nothing."""
    labels_M = torch.from_numpy(labels(sequences).astype("int64"))
    if targets is None:
        nothing, flat = torch.zeros(len(labels_M), 0), torch.zeros(len(labels_M))
        return {
            "labels": labels_M,
            "head_ids": nothing.long(),
            "head_logprobs": nothing,
            "log_tail": flat,
            "tail_ids": nothing.long(),
            "entropy": flat,
            "log_norm": nothing,
        }
    tensors = {
        "labels": labels_M,
        "head_ids": torch.from_numpy(targets.head_ids.astype("int64")),
        "head_logprobs": _tensor(targets.head_logprobs),
        "log_tail": _tensor(targets.log_tail),
        "tail_ids": torch.from_numpy(targets.tail_ids.astype("int64")),
        "entropy": _tensor(targets.entropy),
        "log_norm": _tensor(targets.log_norm),
    }
    if targets.tail_logprobs is not None:
        tensors["tail_logprobs"] = _tensor(targets.tail_logprobs)
    return tensors


@dataclass(frozen=True, slots=True, eq=False)
class Tempered:
    """The target's probabilities at one temperature."""

    head: torch.Tensor
    """[M, K] exact probabilities of the head."""
    tail: torch.Tensor
    """[M, R] what each tail sample stands for; its expectation over samples is the tail itself."""
    rest: torch.Tensor
    """[M] exact mass outside the head."""
    log_head: torch.Tensor
    """[M, K] log of `head`."""


def tempered(target: TargetTensors, temperature: float) -> Tempered:
    """What the target says at `temperature`, exactly (head, rest) and without bias (tail).

    At T: `p_T(i) = exp(log p(i) / T - log_norm(T))`. A sample drawn with probability `p(i) / rest`
    stands for `rest / R * p_T(i) / p(i)`: the importance weight that keeps it unbiased.
    """
    samples = max(1, target.tail_ids.shape[1])
    rest = target.log_tail.exp()
    shape = target.tail_ids.shape
    if temperature == 1.0:
        head = target.head_logprobs.exp()
        tail = (rest / samples)[:, None].expand(shape)
        return Tempered(head, tail, rest, target.head_logprobs)
    log_norm = target.log_norm[:, target.capture.temperatures.index(temperature), None]
    log_head = target.head_logprobs / temperature - log_norm
    if target.tail_logprobs is None:
        tail = rest.new_zeros(shape)
    else:
        log_ratio = target.tail_logprobs * (1.0 / temperature - 1.0) - log_norm
        # one exponential of the sum: near nothing, each factor alone would be 0 or infinite
        tail = (log_ratio + target.log_tail[:, None]).exp() / samples
    head = log_head.exp()
    # exact up to the rounding of the head's own sum; a tail that is empty at T = 1 is empty at any
    left = (1.0 - head.sum(1)).clamp_(min=0.0)
    return Tempered(head, tail, torch.where(rest > 0, left, torch.zeros_like(left)), log_head)


def _tensor(array: Any) -> torch.Tensor:
    # a copy: the array may be a read-only view of a mapped file
    return torch.from_numpy(array.copy())


def _cut(value: Any, start: int, end: int) -> Any:
    if isinstance(value, tuple):
        return tuple(other.rows(start, end) for other in value)
    return value[start:end] if isinstance(value, torch.Tensor) else value
