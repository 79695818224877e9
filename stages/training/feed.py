"""Datasets over a store or a corpus, and the order in which training reads them.

This file never imports a teacher.
"""

from __future__ import annotations

import functools
import itertools
from abc import ABC, abstractmethod
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import Dataset, Sampler

from ...data.errors import ColdstillError
from ...data.order import epoch_windows, joined, regrouped
from ...data.prepared import BLOCK_SEQUENCES
from ...data.schema import Block, Capture, Targets
from ...data.store.reader import StoreReader
from .batch import Rows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from ...data.prepared import SequenceFile

_MIXED_ITEMS = 8192
"""Items of a part of a mixture's order."""


class Trainable(Dataset[Rows], ABC):
    """A map-style torch dataset that a model can be trained on."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of sequences."""

    @abstractmethod
    def windows(self, seed: int, epoch: int, seen: int = 0) -> Iterator[NDArray[np.int64]]:
        """The sequences of one epoch in seeded order, without the first `seen`, in parts that fit
        into memory (`data.order.epoch_windows`)."""

    def order(self, seed: int, epoch: int, seen: int = 0) -> NDArray[np.int64]:
        """[N - seen] the sequences of one epoch in seeded order, without the first `seen`. The
        array takes 8 bytes a sequence; `windows` gives the same order in parts."""
        return joined(self.windows(seed, epoch, seen))

    @abstractmethod
    def __getitems__(self, indices: list[int]) -> Rows:
        """Several sequences: one block per store. torch's DataLoader calls this."""

    def __getitem__(self, index: int) -> Rows:
        """One sequence: one block per store."""
        return self.__getitems__([index])


class StoreDataset(Trainable):
    """The sequences of a store with the teacher's targets, as a map-style torch dataset.

    An item is a tuple with one `Block` per store. With further stores, which must hold the same
    sequences, it holds the targets of several teachers. `collate` makes a `Batch` of items.

    loader = DataLoader(coldstill.StoreDataset(store), batch_size=8, collate_fn=coldstill.collate)
    """

    def __init__(self, store: StoreReader, *others: StoreReader) -> None:
        """Read from open stores. `lesson.expect_same_sequences` compares their manifests."""
        for one in (store, *others):
            if not isinstance(one, StoreReader):
                raise ColdstillError(
                    f"StoreDataset: {one!r} is not an open store; use coldstill.open_store(path)"
                )
        self._stores = (store, *others)

    def __len__(self) -> int:
        return len(self._stores[0])

    def windows(self, seed: int, epoch: int, seen: int = 0) -> Iterator[NDArray[np.int64]]:
        """The sequences of one epoch in seeded order, without the first `seen`, a few shards at a
        time. Shards of remote stores are fetched ahead in this order."""
        first = self._stores[0]
        for store in self._stores:
            store.will_read(first.windows(seed, epoch, seen))
        return first.windows(seed, epoch, seen)

    def __getitems__(self, indices: list[int]) -> Rows:
        """Several sequences: one block per store.

        Raises
            ColdstillError: a store is damaged, or the stores hold different sequences
        """
        rows = np.array(indices)
        blocks = tuple(store.read(rows) for store in self._stores)
        for store, block in zip(self._stores[1:], blocks[1:], strict=True):
            _expect_same_rows(self._stores[0], blocks[0], store, block)
        return blocks


def _expect_same_rows(first: StoreReader, own: Block, other: StoreReader, found: Block) -> None:
    ours, theirs = own.sequences, found.sequences
    differs = (ours.ids != theirs.ids) | (ours.hashes != theirs.hashes)
    if differs.any():
        row = int(np.flatnonzero(differs)[0])
        raise ColdstillError(
            f"{first.place} and {other.place}: sequence {int(ours.ids[row])} of the first is not "
            f"the same as sequence {int(theirs.ids[row])}, which the second has in its place: "
            "tokens, document borders or supervised positions differ; capture both over one corpus"
        )


class MixedDataset(Trainable):
    """The sequences of a store, mixed with those of further stores that are read as one.

    A share of the items comes from the further stores, spread evenly: of the first `i` items
    `floor(share * i)` are theirs. Each side is read in the seeded order of its own epochs, one
    after another, so the order of all items follows from the seed and the number of an item. What
    this dataset calls an epoch is as many items as there are sequences.
    """

    def __init__(self, store: StoreReader, further: Sequence[StoreReader], share: float) -> None:
        """Read from open stores with equal captures.

        share  share of the items that are from `further`; between 0 and 1

        Raises
            ColdstillError: there is a share without a sequence that it could be read from
        """
        self._stores = (store, *further)
        self._starts = np.cumsum([0, *map(len, self._stores)])
        self._share = Fraction(share).limit_denominator(1_000_000)
        if self._share > 0 and self._starts[-1] == len(store):
            raise ColdstillError(f"{store.place}: no further sequences to mix in")

    def __len__(self) -> int:
        return int(self._starts[-1])

    def windows(self, seed: int, epoch: int, seen: int = 0) -> Iterator[NDArray[np.int64]]:
        """One epoch without its first `seen` items, in parts. Sequences of the first store have its
        own indices, those of the further stores follow."""
        store, old = self._stores[0], len(self._stores[0])
        first, end = epoch * len(self) + seen, (epoch + 1) * len(self)
        before, after = self._theirs(first), self._theirs(end)

        def ours() -> Iterator[NDArray[np.int64]]:
            return _places(functools.partial(store.windows, seed), old, first - before, end - after)

        def theirs() -> Iterator[NDArray[np.int64]]:
            sizes = self._stores[-1].manifest
            shape = len(self) - old, sizes.shard_sequences, sizes.block_sequences

            def windows(epoch: int, seen: int) -> Iterator[NDArray[np.int64]]:
                return epoch_windows(seed, epoch, *shape, seen=seen)

            return (old + part for part in _places(windows, shape[0], before, after))

        store.will_read(ours())
        sides = _Taken(ours()), _Taken(theirs())
        for start in range(first, end, _MIXED_ITEMS):
            places_N = np.arange(start, min(start + _MIXED_ITEMS, end) + 1)
            is_theirs_N = np.diff(self._theirs(places_N)) > 0
            part = np.empty(len(is_theirs_N), np.int64)
            for side, own_N in zip(sides, (~is_theirs_N, is_theirs_N), strict=True):
                part[own_N] = side.take(int(own_N.sum()))
            yield part

    def _theirs(self, items: Any) -> Any:
        """How many of the first `items` items are from the further stores."""
        return items * self._share.numerator // self._share.denominator

    def __getitems__(self, indices: list[int]) -> Rows:
        """Several sequences in one block: first those of the first store, then the others.

        Raises
            ColdstillError: a store is damaged
        """
        rows = np.array(indices)
        owner_N = np.searchsorted(self._starts, rows, side="right") - 1
        parts = [
            self._stores[number].read(rows[owner_N == number] - self._starts[number])
            for number in np.unique(owner_N).tolist()
        ]
        return (Block.concatenate(parts),)


def _places(
    windows: Callable[[int, int], Iterator[NDArray[np.int64]]], count: int, first: int, end: int
) -> Iterator[NDArray[np.int64]]:
    """The sequences with these places in the orders of all epochs, one after another, in parts.

    windows  the order of an epoch without its first sequences, in parts; from both numbers
    count    sequences of an epoch
    """
    while first < end:
        epoch, seen = divmod(first, count)
        for part in windows(epoch, seen):
            yield part[: end - first]
            first += len(part)
            if first >= end:
                return


class _Taken:
    """Takes any number of values from an array that comes in parts."""

    def __init__(self, parts: Iterator[NDArray[np.int64]]) -> None:
        self._parts, self._waiting = parts, np.zeros(0, np.int64)

    def take(self, count: int) -> NDArray[np.int64]:
        while len(self._waiting) < count:
            self._waiting = np.concatenate([self._waiting, next(self._parts)])
        found, self._waiting = self._waiting[:count], self._waiting[count:]
        return found


class CorpusDataset(Trainable):
    """The sequences of a prepared corpus with empty targets, for training on the text itself."""

    def __init__(self, sequences: SequenceFile) -> None:
        self._sequences = sequences

    def __len__(self) -> int:
        return len(self._sequences)

    def windows(self, seed: int, epoch: int, seen: int = 0) -> Iterator[NDArray[np.int64]]:
        return epoch_windows(seed, epoch, len(self), 1024, BLOCK_SEQUENCES, seen=seen)

    def __getitems__(self, indices: list[int]) -> Rows:
        sequences = self._sequences.read(np.array(indices))
        targets = Targets.empty(len(sequences.positions.values))
        return (Block(sequences=sequences, targets=targets, capture=Capture(tail=0)),)


@dataclass(frozen=True, slots=True)
class OrderPosition:
    """The position of a training in the order of sequences."""

    epoch: int = 0
    sequences: int = 0
    """Number of sequences of that epoch that were used."""

    def after(self, count: int, dataset: int) -> OrderPosition:
        """The position `count` sequences later, in a dataset of `dataset` sequences."""
        return OrderPosition(*divmod(self.epoch * dataset + self.sequences + count, dataset))


@dataclass(frozen=True, slots=True, kw_only=True)
class StepShape:
    """How the sequences of an optimiser step are divided."""

    processes: int
    """Processes that train together."""
    passes: int
    """Forward passes of each process."""
    micro: int
    """Sequences of each forward pass."""

    @property
    def sequences(self) -> int:
        """Sequences of a whole step."""
        return self.processes * self.passes * self.micro


class StepBatches(Sampler[list[int]]):
    """The sequences of one process's forward passes, step after step.

    All processes follow the same order, and epochs follow one another without a border. A step
    takes the next sequences of the order, and each process takes its part of the step. So every
    sequence is used once per epoch for any number of processes, passes and reading workers.
    """

    def __init__(
        self, dataset: Trainable, seed: int, shape: StepShape, *, rank: int = 0, steps: int
    ) -> None:
        """Start at the first epoch.

        rank   index of this process among `shape.processes`
        steps  optimiser steps of the whole training
        """
        self._dataset, self._seed, self._shape = dataset, seed, shape
        self._rank, self._steps = rank, steps
        self._done, self._start = 0, OrderPosition()

    def resume(self, step: int, position: OrderPosition) -> None:
        """Start after `step` steps instead, at this position of the order."""
        self._done, self._start = step, position

    def position_after(self, step: int) -> OrderPosition:
        """The position in the order after `step` steps of the whole training."""
        count = (step - self._done) * self._shape.sequences
        return self._start.after(count, len(self._dataset))

    def __len__(self) -> int:
        """Forward passes of the whole training, including those before a resumption: the Trainer
        takes the whole training for one epoch."""
        return self._steps * self._shape.passes

    def __iter__(self) -> Iterator[list[int]]:
        micro, own = self._shape.micro, self._shape.passes * self._shape.micro
        for step_N in self._in_steps():
            part = step_N[self._rank * own : (self._rank + 1) * own].tolist()
            yield from (part[first : first + micro] for first in range(0, own, micro))

    def _in_steps(self) -> Iterator[NDArray[np.int64]]:
        steps = self._steps - self._done
        return itertools.islice(regrouped(self._parts(), self._shape.sequences), steps)

    def _parts(self) -> Iterator[NDArray[np.int64]]:
        """The order from the start on, epoch after epoch."""
        seen = self._start.sequences
        for epoch in itertools.count(self._start.epoch):
            yield from self._dataset.windows(self._seed, epoch, seen)
            seen = 0
