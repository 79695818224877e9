"""Reads a store from its path or address."""

from __future__ import annotations

import heapq
from collections import OrderedDict, deque
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from ..columns import check_hashes
from ..errors import ColdstillError
from ..order import MIXED_BLOCKS, WINDOW, epoch_windows, joined, regrouped
from ..places.place import place_at
from ..schema import Block
from .commit import Commit, ShardStatistics, Totals, expect_size, parse_commit
from .layout import MANIFEST, SHARDS, TOKENIZER, commit_name, committed, shard_name
from .manifest import Manifest, read_manifest

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from ..columns import Columns
    from ..formats import Shard
    from ..places.cache import CacheSettings
    from ..places.place import Place

_KEPT_BLOCKS = MIXED_BLOCKS + 2
"""Decoded blocks that are kept in memory: those that an epoch mixes, and the next ones."""
_KEPT_COMMITS = 1024
"""Commit records that are kept in memory, about a kilobyte each."""
_READS_AT_ONCE = 16
"""Commit records of a remote store that are fetched at the same time."""
_OPEN_SHARDS = 32
"""Shards that stay open: more than a window of the seeded order, but not all of a large store."""


class StoreReader:
    """An open store: its length, any sequences with their targets, and batches.

    All data are numpy arrays. Log-probabilities and entropies are in nats.

    store = coldstill.open_store("runs/demo/logits")
    block = store.read(np.array([0, 7]))
    block.sequences.tokens[0]  # [T] token ids of the first sequence
    block.targets.head_logprobs  # [M, K]; `data/schema.py` describes all fields
    """

    def __init__(self, place: Place, manifest: Manifest, done: list[int]) -> None:
        """Use `open_store` instead, which checks the arguments."""
        self.place = place
        """The folder or object store with the files."""
        self.manifest = manifest
        """Teacher, tokenizer, corpus, packing, capture, codec and format."""
        self.done = done
        """Indices of the shards that exist, in order."""
        self._codec = manifest.make_codec(place)
        self._store = manifest.make_store(place)
        self._commits: OrderedDict[int, Commit] = OrderedDict()
        self._totals: Totals | None = None
        self._open: OrderedDict[int, tuple[Path, Shard]] = OrderedDict()
        self._blocks: OrderedDict[tuple[int, int], Block] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict(), "_blocks": OrderedDict()}

    def __len__(self) -> int:
        """N, the number of sequences of the complete store."""
        return self.manifest.sequences

    def commits(self) -> Iterator[Commit]:
        """The commit records of all existing shards, in order."""
        totals = Totals()
        for commit in self._all_commits():
            totals.add(commit)
            yield commit
        # kept, because each pass over a large remote store takes minutes
        self._totals = totals

    def _all_commits(self) -> Iterator[Commit]:
        if self.place.room is None:
            yield from map(self.commit, self.done)
            return
        with ThreadPoolExecutor(_READS_AT_ONCE) as pool:
            for start in range(0, len(self.done), 4 * _READS_AT_ONCE):
                yield from pool.map(self.commit, self.done[start : start + 4 * _READS_AT_ONCE])

    @property
    def totals(self) -> Totals:
        """Counts, bytes and statistics of all existing shards. Reads every commit record, once."""
        if self._totals is None:
            deque(self.commits(), maxlen=0)
        assert self._totals is not None
        return self._totals

    @property
    def positions(self) -> int:
        """Number of supervised positions. Reads every commit record, once."""
        return self.totals.positions

    @property
    def statistics(self) -> ShardStatistics:
        """Sums over all positions. Reads every commit record, once."""
        return self.totals.statistics

    def tokenizer_folder(self) -> Path:
        """A local folder with the tokenizer. The folder may not exist if the store has none."""
        return self.place.folder(TOKENIZER)

    def commit(self, index: int) -> Commit:
        """The commit record of one shard, compared with the manifest. Safe to call from threads.
        Raises ColdstillError if the record is missing, damaged, or of another shard."""
        commit = self._commits.get(index)
        if commit is None:
            commit = self._commits[index] = read_commit(self.place, self.manifest, index)
            if len(self._commits) > _KEPT_COMMITS:
                self._commits.popitem(last=False)
        return commit

    def expect_sizes(self) -> None:
        """Compare the size of every file with its commit record, as a check before a long run.
        Raises ColdstillError if a file is missing or has another size (which)."""
        sizes = self.place.sizes(SHARDS)
        for commit in self.commits():
            for file in commit.files:
                name = file.path(shard_name(commit.shard, self._store.suffix))
                expect_size(self.place.path(name), sizes.get(name), file)

    def read(self, rows: NDArray[np.integer[Any]]) -> Block:
        """The chosen sequences with their targets, in the order given.

        rows  [B] indices of sequences, from 0 to N - 1; at least one, and repeats are allowed

        Raises
            IndexError: `rows` is empty, or a sequence does not exist
            ColdstillError: a shard is missing or damaged (which, and how)
        """
        rows = np.asarray(rows)
        if rows.dtype.kind not in "iu" or rows.ndim != 1:
            raise IndexError(f"sequences {rows.tolist()}: expected a list of whole numbers")
        if len(rows) == 0 or rows.min() < 0 or rows.max() >= len(self):
            raise IndexError(f"sequences {rows.tolist()}: expected some of 0 to {len(self) - 1}")
        shard_N, place_N = np.divmod(rows, self.manifest.shard_sequences)
        block_N, within_N = np.divmod(place_N, self.manifest.block_sequences)
        places = dict.fromkeys(zip(shard_N.tolist(), block_N.tolist(), strict=True))
        found: dict[int, tuple[Block, int]] = {}
        # in the given order, so that a window of shards is finished before the next one begins
        for shard, number in places:
            block = self.block(shard, number)
            chosen = np.flatnonzero((shard_N == shard) & (block_N == number)).tolist()
            own = within_N[chosen].tolist()
            if len(places) > _KEPT_BLOCKS:  # what is not kept in memory is not held as a whole
                block, own = Block.gather([(block, row) for row in own]), range(len(own))
            found |= {place: (block, row) for place, row in zip(chosen, own, strict=True)}
        return Block.gather([found[place] for place in range(len(rows))])

    def batches(self, size: int, *, seed: int | None = None, epoch: int = 0) -> Iterator[Block]:
        """Every sequence once, in blocks of `size`: in store order, or shuffled with a seed.

        size   sequences in a block; the last block may hold fewer
        seed   seed of the order; None keeps the order of the store
        epoch  each epoch has its own order under one seed

        Raises
            ColdstillError: a shard is missing or damaged (which, and how)
        """

        def parts() -> Iterator[NDArray[np.int64]]:
            if seed is not None:
                return self.windows(seed, epoch)
            ranges = map(self.manifest.shard_rows, range(self.manifest.shards))
            return (np.arange(rows.start, rows.stop) for rows in ranges)

        self.will_read(parts())
        for rows in regrouped(parts(), size):
            yield self.read(rows)

    def order(self, seed: int, epoch: int) -> NDArray[np.int64]:
        """[N] every sequence once, in the order of a training epoch. It takes 8 bytes a sequence;
        `windows` gives the same order in parts."""
        return joined(self.windows(seed, epoch))

    def windows(self, seed: int, epoch: int, seen: int = 0) -> Iterator[NDArray[np.int64]]:
        """The order of a training epoch, a few shards at a time (`data.order.epoch_windows`).

        seen  sequences at the start of the order that are left out
        """
        rows, block_rows = self.manifest.shard_sequences, self.manifest.block_sequences
        return epoch_windows(seed, epoch, len(self), rows, block_rows, seen=seen)

    def will_read(self, parts: Iterable[NDArray[np.int64]]) -> None:
        """Announce the next sequences, so that a remote store can fetch their shards ahead.

        parts  indices of sequences, in the order in which they will be read. A shard of one part
               counts as in use until the part ends, and is not announced again for later parts.
               Iterated in another thread if the store is remote, otherwise not at all.
        """

        def wanted() -> Iterator[tuple[Commit, str, int]]:
            announced = np.zeros(self.manifest.shards, np.bool_)
            for rows in parts:
                shards = rows // self.manifest.shard_sequences
                first = np.sort(np.unique(shards, return_index=True)[1])
                last = np.sort(len(shards) - 1 - np.unique(shards[::-1], return_index=True)[1])
                in_use = np.arange(1, len(first) + 1) - np.searchsorted(last, first)
                for i, count in zip(shards[first].tolist(), in_use.tolist(), strict=True):
                    if not announced[i]:
                        announced[i] = True
                        yield self.commit(i), shard_name(i, self._store.suffix), count

        self.place.prefetch(wanted())

    def expect_room(self) -> None:
        """Refuse a cache in which a seeded order would fetch the same shards again and again.
        Raises ColdstillError if the cache is too small (the size it needs)."""
        if self.place.room is None:
            return
        needed = sum(heapq.nlargest(WINDOW, self.totals.shard_bytes))
        if self.place.room < needed:
            raise ColdstillError(
                f"{self.place}: logits.cache: {self.place.room:,} bytes are too few: training "
                f"shuffles {WINDOW} shards together; set it to at least {needed:,}, twice that to "
                "fetch ahead"
            )

    def block(self, shard: int, number: int) -> Block:
        """One decoded and checked block of a shard. The last blocks are kept in memory.

        Raises ColdstillError if the shard is missing or damaged (which, and how)."""
        key = (shard, number)
        if key in self._blocks:
            self._blocks.move_to_end(key)
            return self._blocks[key]
        where = self.place.path(shard_name(shard, self._store.suffix))
        columns = self.columns(shard, number)
        try:
            block = self._codec.decode(columns, self.manifest.capture)
            expected = len(self.manifest.block_rows(shard, number))
            if len(block) != expected:
                raise ValueError(f"holds {len(block)} sequences, expected {expected}")
            check_hashes(block.sequences)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise ColdstillError(f"{where}: block {number}: {error}") from error
        self._blocks[key] = block
        if len(self._blocks) > _KEPT_BLOCKS:
            self._blocks.popitem(last=False)
        return block

    def columns(self, shard: int, number: int) -> Columns:
        """One block of a shard as columns, before decoding."""
        commit, name = self.commit(shard), shard_name(shard, self._store.suffix)
        while True:
            # `place.shard` compares every byte with the commit record before the first open
            path = self._open[shard][0] if shard in self._open else self.place.shard(commit, name)
            with self.place.reading(commit, name) as is_there:
                if is_there:
                    return self._shard(shard, path).read(number)
            # the cache of a remote store has dropped the shard: fetch it again
            self._open.pop(shard, None)

    def _shard(self, index: int, path: Path) -> Shard:
        if index in self._open:
            self._open.move_to_end(index)
            return self._open[index][1]
        name, blocks = shard_name(index, self._store.suffix), self.manifest.blocks(index)
        opened = self._store.open(path)
        if opened.blocks != blocks:
            raise ColdstillError(
                f"{self.place.path(name)}: has {opened.blocks} blocks, expected {blocks}"
            )
        # close shards that the cache has deleted, so that their disk space is freed
        self._open = OrderedDict((i, old) for i, old in self._open.items() if old[0].exists())
        self._open[index] = path, opened
        if len(self._open) > _OPEN_SHARDS:
            self._open.popitem(last=False)
        return opened


def open_store(
    path: str | Path, *, incomplete: bool = False, cache: CacheSettings | None = None
) -> StoreReader:
    """Open a store without reading its data.

    path        folder, or address such as s3://bucket/store
    incomplete  also open a store with missing shards; reading their sequences is an error
    cache       folder and size of the local cache of a remote store

    Raises
        ColdstillError: no store, an incomplete store, or a malformed manifest
    """
    place = place_at(path, cache)
    manifest = read_manifest(place)
    done = finished_shards(place, manifest)
    if len(done) < manifest.shards and not incomplete:
        raise ColdstillError(
            f"{place}: incomplete, {len(done)} of {manifest.shards} shards; finish it with "
            "coldstill teacher-logits"
        )
    return StoreReader(place, manifest, done)


def finished_shards(place: Place, manifest: Manifest) -> list[int]:
    """Indices of the shards that have a commit record, in order.

    They are listed from the records, since a damaged manifest may promise any number.

    Raises
        ColdstillError: the data of a committed shard is missing
    """
    names = place.names(SHARDS)
    suffix = manifest.make_store(place).suffix
    done = [index for index in committed(names) if index < manifest.shards]
    for index in done:
        name = shard_name(index, suffix)
        if name.rpartition("/")[2] not in names:
            raise ColdstillError(
                f"{place.path(name)}: damaged: missing, though its commit record is there; run "
                "coldstill store repair, then teacher-logits again"
            )
    return done


def is_complete(place: Place) -> bool:
    """Whether a place has a store with all of its shards. Raises as `finished_shards`."""
    if not place.exists(MANIFEST):
        return False
    manifest = read_manifest(place)
    return len(finished_shards(place, manifest)) == manifest.shards


def read_commit(place: Place, manifest: Manifest, index: int) -> Commit:
    """The commit record of one shard; raises ColdstillError if it is missing or another shard's."""
    name = commit_name(index)
    try:
        commit = parse_commit(place.read(name), place.path(name))
    except FileNotFoundError as error:
        raise ColdstillError(
            f"{place.path(name)}: shard {index} is missing; finish the store with coldstill "
            "teacher-logits"
        ) from error
    rows = len(manifest.shard_rows(index))
    if (commit.shard, commit.sequences) != (index, rows):
        raise ColdstillError(
            f"{place.path(name)}: damaged: it describes shard {commit.shard} with "
            f"{commit.sequences} sequences, expected shard {index} with {rows}"
        )
    return commit
