"""From a store or a corpus to the tensors of a training step. Never imports a teacher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from torch.utils.data import Dataset, Sampler

from ...data.order import epoch_order
from ...data.prepared import BLOCK_SEQUENCES
from ..models.isolation import Isolation, flat_positions, model_inputs
from ..targets.tensors import target_tensors

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from numpy.typing import NDArray

    from ...data.prepared import SequenceFile
    from ...data.schema import Sequences, Targets
    from ...data.store.reader import StoreReader

Rows = tuple["Sequences", "Targets | None"]
MixedRows = tuple["Sequences", "Targets | None", list["Targets"]]
"""With what further teachers say of the same positions."""


class Trainable(Protocol):
    """What a model can be trained on."""

    def __len__(self) -> int:
        """How many sequences there are."""
        ...

    def order(self, seed: int, epoch: int, seen: int = 0) -> NDArray[np.int64]:
        """[N - seen] the sequences of an epoch, all but the first `seen`."""
        ...

    def __getitem__(self, index: int) -> Any:
        """One sequence, as `Rows` or `MixedRows`."""
        ...

    def __getitems__(self, indices: list[int]) -> Any:
        """A batch, likewise."""
        ...


class StoreDataset(Dataset[Rows]):
    """Sequences with the teacher's targets."""

    def __init__(self, store: StoreReader) -> None:
        """Read from an open store."""
        self._store = store

    def __len__(self) -> int:
        return len(self._store)

    def order(self, seed: int, epoch: int, seen: int = 0) -> NDArray[np.int64]:
        """[N - seen] the sequences of an epoch, all but the first `seen`; a distant store begins to
        send them."""
        order = self._store.order(seed, epoch)[seen:]
        self._store.will_read(order)
        return order

    def __getitem__(self, index: int) -> Rows:
        """One sequence."""
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> Rows:
        """A batch: the data loader asks for it whole, so neighbours are read together."""
        block = self._store.read(np.array(indices))
        return block.sequences, block.targets


class CorpusDataset(Dataset[Rows]):
    """Sequences without targets, for models that learn from the text itself."""

    def __init__(self, sequences: SequenceFile) -> None:
        """Read from a prepared corpus."""
        self._sequences = sequences

    def __len__(self) -> int:
        return len(self._sequences)

    def order(self, seed: int, epoch: int, seen: int = 0) -> NDArray[np.int64]:
        """[N - seen] the sequences of an epoch, all but the first `seen`."""
        return epoch_order(seed, epoch, len(self._sequences), 1024, BLOCK_SEQUENCES)[seen:]

    def __getitem__(self, index: int) -> Rows:
        """One sequence."""
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> Rows:
        """A batch."""
        return self._sequences.read(np.array(indices)), None


class Collate:
    """Rows to what the model's forward takes, besides `use_cache`."""

    def __init__(self, isolation: Isolation, dtype: torch.dtype, capture: Any) -> None:
        """Build inputs in the way that keeps this model's documents apart."""
        self._isolation, self._dtype, self._capture = isolation, dtype, capture

    def __call__(self, rows: Rows | MixedRows) -> dict[str, Any]:
        """Inputs `[B, T]`; `positions` `[M]`, indices into the flattened `B * T`; targets, and
        under `others` those of further teachers."""
        sequences, targets = rows[0], rows[1]
        inputs = model_inputs(sequences, self._isolation, self._dtype)
        batch = {
            **inputs,
            "positions": flat_positions(sequences, inputs["input_ids"].shape[1]),
            **target_tensors(sequences, targets),
        }
        if len(rows) == 3:
            batch["others"] = [target_tensors(sequences, other) for other in rows[2]]
            for other in batch["others"]:
                del other["labels"]  # one and the same
        return batch


class CollateWithIds(Collate):
    """The same, with `sequence_ids` `[B]`: for messages, no model takes them."""

    def __call__(self, rows: Rows | MixedRows) -> dict[str, Any]:
        """Inputs, targets, and of whom."""
        return super().__call__(rows) | {"sequence_ids": rows[0].ids}


@dataclass(frozen=True, slots=True)
class Place:
    """How far training has come in its order: all that a checkpoint must know of it."""

    epoch: int = 0
    sequences: int = 0
    """How many of that epoch were seen."""

    def after(self, count: int, dataset: int) -> Place:
        """The place `count` sequences further on, in a dataset of `dataset`."""
        return Place(*divmod(self.epoch * dataset + self.sequences + count, dataset))


@dataclass(frozen=True, slots=True, kw_only=True)
class StepShape:
    """How the sequences of an optimiser step are shared out."""

    processes: int
    passes: int
    """Forward passes in each process;"""
    micro: int
    """sequences in each of those."""

    @property
    def sequences(self) -> int:
        """Of a whole step."""
        return self.processes * self.passes * self.micro


class StepBatches(Sampler[list[int]]):
    """The sequences of one process's forward passes, step after step.

    All processes follow one order, epoch after epoch without a border: a step is the next so many
    sequences of it, and each process takes its part of the step. So every sequence is seen once an
    epoch, whatever the number of processes, passes and reading workers, and whatever divides what.
    """

    def __init__(
        self, dataset: Trainable, seed: int, shape: StepShape, *, rank: int = 0, steps: int
    ) -> None:
        """Begin with the first epoch.

        rank   which of `shape.processes` this is
        steps  of the whole training
        """
        self._dataset, self._seed, self._shape = dataset, seed, shape
        self._rank, self._steps = rank, steps
        self._done, self._place = 0, Place()

    def go_on(self, step: int, place: Place) -> None:
        """Begin after `step` steps instead, at that place."""
        self._done, self._place = step, place

    def place_after(self, step: int) -> Place:
        """Where the order stands after so many steps of the whole training."""
        count = (step - self._done) * self._shape.sequences
        return self._place.after(count, len(self._dataset))

    def __len__(self) -> int:
        """Forward passes of the whole training, those before the beginning included: the trainer
        takes all of it for a single epoch."""
        return self._steps * self._shape.passes

    def __iter__(self) -> Iterator[list[int]]:
        micro, own = self._shape.micro, self._shape.passes * self._shape.micro
        for step_N in self._in_steps():
            part = step_N[self._rank * own : (self._rank + 1) * own].tolist()
            yield from (part[first : first + micro] for first in range(0, own, micro))

    def _in_steps(self) -> Iterator[NDArray[np.int64]]:
        epoch = self._place.epoch
        left_N = self._dataset.order(self._seed, epoch, self._place.sequences)
        for _ in range(self._done, self._steps):
            parts, missing = [], self._shape.sequences
            while missing:
                if len(left_N) == 0:
                    epoch += 1
                    left_N = self._dataset.order(self._seed, epoch)
                parts.append(left_N[:missing])
                left_N = left_N[missing:]
                missing -= len(parts[-1])
            yield np.concatenate(parts)
