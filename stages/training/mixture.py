"""Several teachers of one student: stores of the same sequences, read side by side.

What several teachers say of a position can be mixed only if it is the same position of the same
tokens. The first store, the run's own, decides the order; the others are read row by row beside it,
and every sequence's id and hash are compared on every read.
"""

from __future__ import annotations

import heapq
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from torch.utils.data import Dataset

from ...data.errors import ColdstillError
from ...data.order import WINDOW
from ...data.store.manifest import difference
from .feed import MixedRows

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from ...data.schema import Block
    from ...data.store.reader import StoreReader


class MixedDataset(Dataset[MixedRows]):
    """Sequences with what several teachers say of them."""

    def __init__(self, stores: Sequence[StoreReader]) -> None:
        """Read from open stores, compared by `expect_same_sequences`; the first one leads."""
        self._first, *self._others = stores

    def __len__(self) -> int:
        return len(self._first)

    def order(self, seed: int, epoch: int, seen: int = 0) -> NDArray[np.int64]:
        """[N - seen] the sequences of an epoch of the first store, all but the first `seen`;
        distant stores begin to send them."""
        order = self._first.order(seed, epoch)[seen:]
        for store in (self._first, *self._others):
            store.will_read(order)
        return order

    def __getitem__(self, index: int) -> MixedRows:
        """One sequence."""
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> MixedRows:
        """A batch.

        Raises
            ColdstillError: the stores hold different sequences in one of these rows (which)
        """
        rows = np.array(indices)
        own, targets = self._first.read(rows), []
        for store in self._others:
            block = store.read(rows)
            _expect_same_rows(self._first, own, store, block)
            targets.append(block.targets)
        return own.sequences, own.targets, targets


def mixed_stores(
    stores: Sequence[StoreReader], shares: Sequence[float], where: str
) -> tuple[list[StoreReader], list[float]]:
    """The first store, and of the others those that have a share; all are compared.

    Raises
        ColdstillError: they do not hold the same sequences, or a cache is too small for all
    """
    first, *others = stores
    for other in others:
        expect_same_sequences(first, other, where)
    kept = [(store, share) for store, share in zip(stores, shares, strict=True) if share > 0]
    if not kept or kept[0][0] is not first:
        kept.insert(0, (first, 0.0))
    expect_room([store for store, _ in kept])
    return [store for store, _ in kept], [share for _, share in kept]


def expect_same_sequences(first: StoreReader, other: StoreReader, where: str) -> None:
    """Compare what two manifests say of tokenizer, corpus, packing and number of sequences.

    Teachers may differ, and how they kept documents apart; so may what was kept of them, its codec,
    its store and the size of shards.

    Raises
        ColdstillError: what differs
    """
    ours, theirs = first.manifest, other.manifest
    packing = replace(theirs.packing, isolation=ours.packing.isolation)
    # a merged store says where its sequences are from instead of one corpus and packing
    same = replace(
        ours,
        tokenizer=theirs.tokenizer,
        corpus=theirs.corpus,
        packing=packing,
        parts=theirs.parts,
        sequences=theirs.sequences,
    )
    sides = (f"in {first.place}", f"in {other.place}")
    if changed := difference(ours, same, sides):
        raise ColdstillError(
            f"{where}: these stores hold different sequences: {changed}; capture both teachers "
            "over one corpus, with one tokenizer and packing"
        )


def expect_room(stores: Sequence[StoreReader]) -> None:
    """Refuse a cache in which the order of the first store would fetch shards again and again.

    Raises
        ColdstillError: it is too small for the shards of all stores that are mixed at a time
    """
    for store in stores:
        store.expect_room()
    distant = [store for store in stores if store.place.room is not None]
    if len(distant) < 2:
        return
    needed = 0
    for store in distant:
        count = WINDOW * _shards_beside(stores[0], store)
        needed += sum(heapq.nlargest(count, (commit.bytes for commit in store.commits())))
    room = min(store.place.room or 0 for store in distant)
    if room < needed:
        names = " and ".join(str(store.place) for store in distant)
        raise ColdstillError(
            f"{names}: logits.cache: {room:,} bytes are too few for the shards of {len(distant)} "
            f"stores that a student mixes at a time; set it to at least {needed:,}, twice that to "
            "fetch ahead"
        )


def _shards_beside(first: StoreReader, other: StoreReader) -> int:
    """How many shards of another store one of the first can lie across."""
    ours, theirs = first.manifest.shard_sequences, other.manifest.shard_sequences
    if ours % theirs == 0 or theirs % ours == 0:
        return max(1, ours // theirs)
    return -(-ours // theirs) + 1


def _expect_same_rows(first: StoreReader, own: Block, other: StoreReader, found: Block) -> None:
    ours, theirs = own.sequences, found.sequences
    differs = (ours.ids != theirs.ids) | (ours.hashes != theirs.hashes)
    if differs.any():
        row = int(np.flatnonzero(differs)[0])
        raise ColdstillError(
            f"{first.place} and {other.place}: sequence {int(ours.ids[row])} of the first is not "
            f"what the second holds in its place (sequence {int(theirs.ids[row])}): other tokens, "
            "document borders or supervised positions; capture both over one corpus"
        )
