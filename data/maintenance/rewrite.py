"""Writes a store again: with another codec or format, in part, or with smaller targets.

`ShardWriter` writes shard by shard. Memory holds one shard, and the same command continues a run
that was killed.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import ColdstillError
from ..places.local import LocalPlace
from ..places.place import place_at
from ..ragged import Ragged
from ..schema import Block
from ..store.commit import ShardStatistics, block_statistics, total
from ..store.layout import MEASUREMENTS, TOKENIZER, TOKENIZER_FILES
from ..store.manifest import FORMAT_VERSION, Manifest, Part, format_settings, settings_of
from ..store.reader import StoreReader, open_store
from ..store.writer import ShardWriter, blocks_of, fitted
from . import Notify, no_progress

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from ..codecs import Codec, CodecError
    from ..columns import Columns


@dataclass(frozen=True, slots=True, eq=False)
class StoreRows:
    """Some sequences of one store."""

    store: StoreReader
    rows: NDArray[np.int64]
    """[N] their indices in the store, increasing; at least one."""


def block_of(pieces: Sequence[StoreRows]) -> Block:
    return Block.concatenate([piece.store.read(piece.rows) for piece in pieces])


def columns_of(pieces: Sequence[StoreRows], size: int, codec: Codec) -> list[Columns]:
    """The columns of all pieces under a codec, in blocks of `size` sequences.

    Rounded numbers are not rounded again: each row of a codec's columns is independent of the
    others, and the codecs of all pieces must round as this one.
    """
    like = codec.encode(pieces[0].store.read(pieces[0].rows[:1]))
    parts = [part for piece in pieces for part in _stored(piece, codec)]
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


def _stored(piece: StoreRows, codec: Codec) -> Iterator[Columns]:
    """The wanted rows of each block that holds some of them, as columns of this codec."""
    manifest = piece.store.manifest
    own = manifest.make_codec(piece.store.place)
    for shard, places in _runs(piece.rows // manifest.shard_sequences):
        within = piece.rows[places] % manifest.shard_sequences
        for number, inner in _runs(within // manifest.block_sequences):
            columns = piece.store.columns(shard, number)
            rows = within[inner] % manifest.block_sequences
            if len(rows) < _count(columns):
                columns = {name: _taken(column, rows) for name, column in columns.items()}
            yield codec.recode(columns, manifest.capture, own)


def _rows(columns: Columns, start: int, end: int) -> Columns:
    if (start, end) == (0, _count(columns)):
        return columns
    return {name: _taken(column, np.arange(start, end)) for name, column in columns.items()}


def _count(columns: Columns) -> int:
    return len(next(iter(columns.values())))


def _taken(column: NDArray[Any] | Ragged, rows: NDArray[np.int64]) -> NDArray[Any] | Ragged:
    return column.take(rows) if isinstance(column, Ragged) else column[rows]


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


Settings = dict[str, Any]


def convert(
    path: str,
    to: str,
    codec: Settings | str | None,
    store: Settings | str | None,
    *,
    notify: Notify = no_progress,
) -> Manifest:
    """Write a store with another codec or store format; None keeps the present one. Raises
    ColdstillError if the source is incomplete, the codec or format is unknown, or `to` is the
    source or not a store of the same content."""
    source = open_original(path, to)
    manifest = reformatted(source.manifest, codec, store)
    return rewrite(to, manifest, [source], rows_from(source), notify)


def rows_from(
    source: StoreReader, chosen: NDArray[np.int64] | None = None
) -> Callable[[range], list[StoreRows]]:
    """The rows of `source` for a range of rows of a new store, which takes all or the chosen
    ones."""

    def pieces(rows: range) -> list[StoreRows]:
        part = np.array(rows) if chosen is None else chosen[rows.start : rows.stop]
        return [StoreRows(source, part)]

    return pieces


def open_original(path: str, to: str) -> StoreReader:
    """Open the complete store to read; raises ColdstillError if `to` is the same or inside it."""
    one, other = _whole_name(path), _whole_name(to)
    if other == one or other.startswith(one + "/"):
        raise ColdstillError(f"{to}: is the store that is read; choose another place")
    source = open_store(path)
    if len(source) == 0:
        raise ColdstillError(f"{path}: holds no sequence")
    if source.place.exists(TOKENIZER) and not source.tokenizer_folder().is_dir():
        raise ColdstillError(f"{source.place.path(TOKENIZER)}: damaged: not a folder")
    return source


def _whole_name(path: str) -> str:
    place = place_at(path)
    return str(place.root.resolve() if isinstance(place, LocalPlace) else place).rstrip("/")


def reformatted(
    manifest: Manifest, codec: Settings | str | None, store: Settings | str | None
) -> Manifest:
    """The manifest with another codec or format; unspecified settings are kept if compatible."""
    size, capture = manifest.tokenizer.size, manifest.capture
    named = codec if isinstance(codec, dict) else {"name": codec or manifest.codec["name"]}
    # the temperature and the vocabulary follow from the capture and the tokenizer
    kept = {k: v for k, v in manifest.codec.items() if k in {"levels", "frequent"}}
    wanted = {**kept, **named} if named["name"] == manifest.codec["name"] else named
    kept_store: Settings | str = manifest.store
    if codec is not None or (manifest.version, manifest.store.get("zstd")) == (2, 3):
        kept_store = manifest.store["name"]  # with the level that suits the codec
    if isinstance(store, dict):
        store = {"name": manifest.store["name"], **store}
    made = format_settings(wanted, kept_store if store is None else store, size, capture)
    return replace(manifest, codec=made["codec"], store=made["store"], version=FORMAT_VERSION)


def rewrite(
    to: str,
    manifest: Manifest,
    sources: Sequence[StoreReader],
    pieces: Callable[[range], list[StoreRows]],
    notify: Notify,
    changed: Callable[[Block], Block] | None = None,
    tokenizer: Path | None = None,
) -> Manifest:
    """Write the missing shards of `to`.

    manifest  the new store's, with the error of its sources
    pieces    the source rows for a range of rows of the new store
    changed   changes a block; without it, and with codecs that round alike, columns are copied, so
              that rounded numbers are not rounded again
    tokenizer  folder of the new store's tokenizer, if its tokens are others
    """
    codec = manifest.make_codec("manifest")
    copies = changed is None and all(
        codec.rounds_as(source.manifest.make_codec(source.place)) for source in sources
    )
    size = manifest.block_sequences

    def read(rows: range) -> tuple[Block, ShardStatistics]:
        where = pieces(rows)
        block = block_of(where)
        sums = sums_of(where, block)
        if changed is None:
            return block, sums
        block = Block.concatenate([changed(part) for part in blocks_of(block, size)])
        if tokenizer is not None:
            own = block_statistics(block, manifest.packing.separator, np.zeros(len(block.targets)))
            return block, replace(own, distortion=sums.distortion)  # mapping never increases it
        return block, _with_head_of(block, sums, manifest)

    # Before `to` is created, as this may find damage.
    first, _ = read(range(min(size, manifest.sequences)))
    if copies and "frequent" not in sources[0].manifest.codec:
        # of version 2, whose codec learns nothing
        manifest = replace(manifest, codec=settings_of(codec.learned(first)))
    if not copies:
        # the error of the sources' codecs, and what this one adds
        made = fitted(manifest, first)
        manifest = replace(made, error=_stated(manifest.error, sources).plus(made.error))
    with ShardWriter(to, manifest) as writer:
        _copy_beside(sources[0], writer, tokenizer)
        # an interrupted rewrite is continued with the codec that began it
        manifest = writer.manifest
        codec = manifest.make_codec(writer.place)
        missing = writer.missing()
        total = sum(len(manifest.shard_rows(shard)) for shard in missing)
        done = 0
        for shard in missing:
            rows = manifest.shard_rows(shard)
            block, sums = read(rows)
            encoded = columns_of(pieces(rows), size, codec) if copies else None
            writer.write(shard, block, encoded=encoded, statistics=sums)
            done += len(rows)
            notify("write", done, total)
    return manifest


def parts_of(manifest: Manifest) -> tuple[Part, ...]:
    """The parts that a store was merged from, or the store itself as the only part."""
    whole = Part(
        corpus=manifest.corpus.fingerprint,
        documents=manifest.corpus.documents,
        packing=manifest.packing.fingerprint,
        sequences=manifest.sequences,
    )
    return manifest.parts or (whole,)


def _stated(error: CodecError, sources: Sequence[StoreReader]) -> CodecError:
    """The error of the sources: the larger of the recorded bound and that of their codecs."""
    codecs = [(s.manifest.make_codec(s.place), s.manifest.capture) for s in sources]
    return replace(
        error,
        maximum=max(error.maximum, *(codec.maximum_error(capture) for codec, capture in codecs)),
        rounding=max(error.rounding, *(codec.rounding for codec, _ in codecs)),
    )


def _with_head_of(block: Block, sums: ShardStatistics, manifest: Manifest) -> ShardStatistics:
    """The statistics of a block whose head was changed.

    The distortion becomes an upper bound: tokens that are no longer in the head do not add to it.
    """
    own = block_statistics(block, manifest.packing.separator, np.zeros(len(block.targets)))
    return replace(sums, head_mass=own.head_mass, mass_bins=own.mass_bins, correct=own.correct)


def _copy_beside(source: StoreReader, writer: ShardWriter, tokenizer: Path | None) -> None:
    own = source.tokenizer_folder() if source.place.exists(TOKENIZER) else None
    made = tokenizer or own
    if made is not None and not writer.place.exists(TOKENIZER_FILES):
        with writer.place.scratch() as folder:
            shutil.copytree(made, folder / TOKENIZER)
            writer.add_tokenizer(folder / TOKENIZER)
    if source.place.exists(MEASUREMENTS) and not writer.place.exists(MEASUREMENTS):
        writer.place.write(MEASUREMENTS, source.place.read(MEASUREMENTS))
