"""Collects the sequences of a new shard from existing stores: as blocks, columns or statistics."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..ragged import Ragged
from ..schema import Block
from ..store.statistics import ShardStatistics, block_statistics, total

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from ..columns import Columns
    from ..store.reader import StoreReader


@dataclass(frozen=True, slots=True, eq=False)
class StoreRows:
    """Some sequences of one store."""

    store: StoreReader
    rows: NDArray[np.int64]
    """[N] their indices in the store, increasing; at least one."""


def block_of(pieces: Sequence[StoreRows]) -> Block:
    """The decoded sequences of all pieces, in order."""
    return Block.concatenate([piece.store.read(piece.rows) for piece in pieces])


def columns_of(pieces: Sequence[StoreRows], size: int) -> list[Columns]:
    """The encoded columns of all pieces, in blocks of `size` sequences.

    Columns are copied, so that rounded numbers are not rounded again: each row of a codec's columns
    is independent of the others. All pieces must have the same codec.
    """
    like = _pattern(pieces[0])
    parts = [part for piece in pieces for part in _stored(piece)]
    lengths = [_count(part) for part in parts]
    ends = np.cumsum(lengths)
    blocks = []
    for start in range(0, int(ends[-1]), size):
        inside = [
            _rows(part, max(0, start - begin), min(length, start + size - begin))
            for part, length, begin in zip(parts, lengths, (ends - lengths).tolist(), strict=True)
            if begin < start + size and begin + length > start
        ]
        blocks.append(_joined(inside, like))
    return blocks


def sums_of(pieces: Sequence[StoreRows], block: Block) -> ShardStatistics:
    """The statistics of all pieces; `block` holds their decoded sequences.

    A shard that is taken whole keeps the statistics of its capture. Those of a part of a shard are
    computed from its decoded sequences, with a proportional share of the shard's distortion.
    """
    sums, done = [], 0
    for piece in pieces:
        separator = piece.store.manifest.packing.separator
        for shard, rows in _runs(piece.rows // piece.store.manifest.shard_sequences):
            commit = piece.store.commit(shard)
            if len(rows) == commit.sequences:
                sums.append(commit.statistics)
            else:
                part = block.take(np.arange(done, done + len(rows)))
                own = block_statistics(part, separator, np.zeros(len(part.targets)))
                share = len(part.targets) / max(1, commit.positions)
                sums.append(replace(own, distortion=commit.statistics.distortion * share))
            done += len(rows)
    return total(sums)


def _runs(keys: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Each key with the indices at which it occurs; `keys` do not decrease."""
    borders = np.flatnonzero(np.diff(keys)) + 1
    for places in np.split(np.arange(len(keys)), borders):
        yield int(keys[places[0]]), places


def _stored(piece: StoreRows) -> Iterator[Columns]:
    """The wanted rows of each block that holds some of them, as columns."""
    manifest = piece.store.manifest
    for shard, places in _runs(piece.rows // manifest.shard_sequences):
        within = piece.rows[places] % manifest.shard_sequences
        for number, inner in _runs(within // manifest.block_sequences):
            columns = piece.store.columns(shard, number)
            rows = within[inner] % manifest.block_sequences
            if len(rows) < _count(columns):
                columns = {name: _taken(column, rows) for name, column in columns.items()}
            yield columns


def _rows(columns: Columns, start: int, end: int) -> Columns:
    if (start, end) == (0, _count(columns)):
        return columns
    return {name: _taken(column, np.arange(start, end)) for name, column in columns.items()}


def _count(columns: Columns) -> int:
    return len(next(iter(columns.values())))


def _taken(column: NDArray[Any] | Ragged, rows: NDArray[np.int64]) -> NDArray[Any] | Ragged:
    return column.take(rows) if isinstance(column, Ragged) else column[rows]


def _pattern(piece: StoreRows) -> Columns:
    """One sequence as the codec encodes it, for the order and the shared offsets of columns."""
    codec = piece.store.manifest.make_codec(piece.store.place)
    return codec.encode(piece.store.read(piece.rows[:1]))


def _joined(parts: Sequence[Columns], like: Columns) -> Columns:
    """Join blocks, with the column order and the shared offsets that their codec uses.

    A store format may keep neither, and the next one may depend on both.
    """
    made: Columns = {}
    borders: dict[int, NDArray[np.int64]] = {}
    for name, pattern in like.items():
        columns: list[Any] = [part[name] for part in parts]
        column = columns[0]
        if len(columns) > 1:
            join: Any = Ragged.concatenate if isinstance(column, Ragged) else np.concatenate
            column = join(columns)
        if isinstance(column, Ragged) and isinstance(pattern, Ragged):
            shared = borders.setdefault(id(pattern.offsets), column.offsets)
            if np.array_equal(shared, column.offsets):
                column = Ragged(column.values, shared)
        made[name] = column
    return made
