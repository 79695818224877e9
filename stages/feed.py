"""From a store or a corpus to the tensors of a training step. Never imports a teacher."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from ..data.order import epoch_order
from ..data.prepared import BLOCK_SEQUENCES
from .isolation import Isolation, model_inputs
from .targets import target_tensors

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from ..data.prepared import SequenceFile
    from ..data.reader import StoreReader
    from ..data.schema import Sequences, Targets
    from .mixture import MixedDataset

Rows = tuple["Sequences", "Targets | None"]
MixedRows = tuple["Sequences", "Targets | None", list["Targets"]]
"""With what further teachers say of the same positions."""


class StoreDataset(Dataset[Rows]):
    """Sequences with the teacher's targets."""

    def __init__(self, store: StoreReader) -> None:
        """Read from an open store."""
        self._store = store

    def __len__(self) -> int:
        return len(self._store)

    def order(self, seed: int, epoch: int) -> NDArray[np.int64]:
        """[N] the sequences of an epoch; a distant store begins to send them."""
        order = self._store.order(seed, epoch)
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

    def order(self, seed: int, epoch: int) -> NDArray[np.int64]:
        """[N] the sequences of an epoch."""
        return epoch_order(seed, epoch, len(self._sequences), 1024, BLOCK_SEQUENCES)

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


def flat_positions(sequences: Sequences, length: int) -> torch.Tensor:
    """[M] where the supervised positions lie in a flattened `[B * length]` batch."""
    row_M = np.repeat(np.arange(len(sequences)), sequences.positions.lengths)
    return torch.from_numpy(row_M * length + sequences.positions.values.astype(np.int64))


class EpochSampler(Sampler[int]):
    """The dataset's order, epoch by epoch; going on in the middle is the trainer's skip."""

    def __init__(self, dataset: StoreDataset | CorpusDataset | MixedDataset, seed: int) -> None:
        """Order the rows of a dataset."""
        self._dataset, self._seed = dataset, seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer before each epoch."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._dataset)

    def __iter__(self) -> Iterator[int]:
        return iter(self._dataset.order(self._seed, self._epoch).tolist())
