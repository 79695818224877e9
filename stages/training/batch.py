"""Batches: sequences as a model reads them, with the targets of their supervised positions.

This file never imports a teacher.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from ...data.schema import Block
from ..models.branching import branch_inputs
from ..models.inputs import NO_WINDOWS, flat_positions, map_inputs, model_inputs
from ..targets.tensors import TargetTensors

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from ..models.inputs import Isolation

Rows = tuple[Block, ...]
"""The same sequences with the targets of each teacher; the first teacher leads."""


@dataclass(frozen=True, slots=True, eq=False)
class BranchBatch:
    """X tokens of branches that are learned (`data/branches.py`)."""

    positions: torch.Tensor
    """[X] indices of the positions that predict them in the flattened `B * T`."""
    targets: TargetTensors
    """Their ids as `labels`, and the weights of their branches; no distribution."""
    columns: int
    """Last columns of the inputs, which hold branches and no text."""

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> BranchBatch:
        """Apply a function to every tensor."""
        return BranchBatch(change(self.positions), self.targets.map(change), self.columns)


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """B sequences of up to T tokens with their M supervised positions and targets."""

    inputs: dict[str, Any]
    """The keyword arguments of the model's forward, besides `use_cache`: `input_ids` `[B, T]` and
    what keeps documents apart (`position_ids`, `attention_mask`). All are tensors, or tables of
    tensors."""
    positions: torch.Tensor
    """[M] indices of the supervised positions in the flattened `B * T`."""
    targets: TargetTensors
    """The targets at `positions`, in the same order."""
    sequence_ids: tuple[int, ...]
    """[B] the id of each sequence in its corpus split, for messages."""
    branches: BranchBatch | None = None
    """The words beside the text, if they are read."""

    @property
    def text_tokens(self) -> int:
        """Tokens of the text, with its padding."""
        ids: torch.Tensor = self.inputs["input_ids"]
        rows, width = ids.shape
        return rows * (width - (0 if self.branches is None else self.branches.columns))

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """The same batch on another device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """The same batch in pinned memory. torch's DataLoader calls this."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        return replace(
            self,
            inputs=map_inputs(self.inputs, change),
            positions=change(self.positions),
            targets=self.targets.map(change),
            branches=self.branches and self.branches.map(change),
        )


def collate(
    rows: Rows | Sequence[Rows],
    isolation: Isolation = "positions",
    dtype: torch.dtype = torch.float32,
    *,
    branches: bool = False,
    windows: Mapping[str, int | None] = NO_WINDOWS,
) -> Batch:
    """Make a batch of what `StoreDataset` returns; use it as a DataLoader's `collate_fn`.

    Sequences are padded on the right to T, the length of the longest one.

    rows       sequences that were read together, or a list of sequences that were read one by one
    isolation  how the model keeps documents of one sequence apart: "positions" restarts the
               position ids at each document, which most models of transformers follow if they are
               called with `use_cache=False`; "mask" adds a 4-d attention mask; "single" is for
               stores with one document per sequence
    dtype      dtype of the model, for the additive mask `[B, 1, T, T]`
    branches   whether the branches of the first store are read behind the sequences, in further
               columns of the inputs; `models.branching.expect_branching` tests whether a model can
    windows    the sliding windows of the model (`models.inputs.attention_windows`), for masks
    """
    by_store = [rows] if isinstance(rows[0], Block) else rows
    first, *others = (Block.concatenate(parts) for parts in zip(*by_store, strict=True))
    beside = None
    if branches and (drawn := first.sequences.branches) is not None:
        read = branch_inputs(first.sequences, drawn, dtype, windows)
        inputs = read.inputs
        labels_X, weights_X = map(torch.from_numpy, (read.labels_X, read.weights_X))
        targets = TargetTensors.of_labels(labels_X, weights_X)
        beside = BranchBatch(read.flat_positions(), targets, read.columns)
    else:
        inputs = model_inputs(first.sequences, isolation, dtype, windows)
    return Batch(
        inputs=inputs,
        positions=flat_positions(first.sequences, inputs["input_ids"].shape[1]),
        targets=replace(
            TargetTensors.from_block(first),
            others=tuple(TargetTensors.from_block(other) for other in others),
        ),
        sequence_ids=tuple(first.sequences.ids.tolist()),
        branches=beside,
    )
