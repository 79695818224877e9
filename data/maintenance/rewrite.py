"""Writes a store again: with another codec or format, in part, or with smaller targets.

`ShardWriter` writes shard by shard. Memory holds one shard, and the same command continues a run
that was killed.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import ColdstillError
from ..fingerprint import json_sha256
from ..places.local import LocalPlace
from ..places.opening import place_at
from ..schema import Block
from ..store.layout import MEASUREMENTS, TOKENIZER, TOKENIZER_FILES
from ..store.manifest import Manifest, Part, format_settings
from ..store.reader import StoreReader, open_store
from ..store.statistics import block_statistics
from ..store.writer import ShardWriter, blocks_of, with_error
from . import Notify, quiet
from .gather import StoreRows, block_of, columns_of, sums_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from ..fidelity import CodecError
    from ..schema import Capture
    from ..store.statistics import ShardStatistics

Settings = dict[str, Any]


def convert(
    path: str,
    to: str,
    codec: Settings | str | None,
    store: Settings | str | None,
    *,
    notify: Notify = quiet,
) -> Manifest:
    """Write a store with another codec or store format; None keeps the present one.

    Raises
        ColdstillError: the source is incomplete, the codec or format is unknown, or `to` is the
            source or not a store of the same content
    """
    source = open_source(path, to)
    manifest = reformatted(source.manifest, codec, store)
    return rewrite(to, manifest, [source], _from(source), notify)


def take(path: str, to: str, rows: NDArray[np.int64], *, notify: Notify = quiet) -> Manifest:
    """Write the chosen sequences of a store, in their order.

    Raises
        ColdstillError: as `convert`, or no sequence was chosen
    """
    source = open_source(path, to)
    if len(rows) == 0:
        raise ColdstillError(f"{path}: no sequence was chosen")
    old = source.manifest
    manifest = replace(
        old,
        sequences=len(rows),
        packing=replace(
            old.packing, fingerprint=json_sha256([old.packing.fingerprint, rows.tolist()])
        ),
        parts=_parts_of_slice(old.parts, rows),
    )
    return rewrite(to, manifest, [source], _from(source, rows), notify)


def change(
    path: str,
    to: str,
    capture_of: Callable[[Manifest], Capture],
    how: Callable[[Block, Capture], Block],
    *,
    notify: Notify = quiet,
) -> Manifest:
    """Write a store with every block changed in the same way, to fit another capture.

    Raises
        ColdstillError: as `convert`, and as `capture_of` does
    """
    source = open_source(path, to)
    capture = capture_of(source.manifest)
    manifest = reformatted(replace(source.manifest, capture=capture), None, None)

    def changed(block: Block) -> Block:
        return how(block, capture)

    return rewrite(to, manifest, [source], _from(source), notify, changed)


def _from(
    source: StoreReader, chosen: NDArray[np.int64] | None = None
) -> Callable[[range], list[StoreRows]]:
    """The rows of `source` for a range of rows of a new store, which takes all or the chosen
    ones."""

    def pieces(rows: range) -> list[StoreRows]:
        part = np.array(rows) if chosen is None else chosen[rows.start : rows.stop]
        return [StoreRows(source, part)]

    return pieces


def open_source(path: str, to: str) -> StoreReader:
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
    """The same name for every spelling of a place."""
    place = place_at(path)
    return str(place.root.resolve() if isinstance(place, LocalPlace) else place).rstrip("/")


def reformatted(
    manifest: Manifest, codec: Settings | str | None, store: Settings | str | None
) -> Manifest:
    """The manifest with another codec or format; unspecified settings are kept if compatible."""
    size, capture = manifest.tokenizer.size, manifest.capture
    wanted = codec
    if codec is None:
        wanted = {k: v for k, v in manifest.codec.items() if k in ("name", "levels")}
    kept_store: Settings | str = manifest.store["name"] if codec is not None else manifest.store
    if isinstance(store, dict):
        store = {"name": manifest.store["name"], **store}
    made = format_settings(wanted or {}, kept_store if store is None else store, size, capture)
    return replace(manifest, codec=made["codec"], store=made["store"])


def rewrite(
    to: str,
    manifest: Manifest,
    sources: Sequence[StoreReader],
    pieces: Callable[[range], list[StoreRows]],
    notify: Notify,
    changed: Callable[[Block], Block] | None = None,
) -> Manifest:
    """Write the missing shards of `to`.

    manifest  the new store's, with the error of its sources
    pieces    the source rows for a range of rows of the new store
    changed   changes a block; without it, and with the same codec, columns are copied, so that
              rounded numbers are not rounded again
    """
    copies = changed is None and all(s.manifest.codec == manifest.codec for s in sources)
    size = manifest.block_sequences

    def read(rows: range) -> tuple[Block, ShardStatistics]:
        where = pieces(rows)
        block = block_of(where)
        sums = sums_of(where, block)
        if changed is None:
            return block, sums
        block = Block.concatenate([changed(part) for part in blocks_of(block, size)])
        return block, _with_head_of(block, sums, manifest)

    # Before `to` is created, as this may find damage.
    first, _ = read(range(min(size, manifest.sequences)))
    if not copies:
        # the error of the sources' codecs, and what this one adds
        error = _stated(manifest.error, sources).plus(with_error(manifest, first).error)
        manifest = replace(manifest, error=error)
    with ShardWriter(to, manifest) as writer:
        _copy_beside(sources[0], writer)
        missing = writer.missing()
        total = sum(len(manifest.shard_rows(shard)) for shard in missing)
        done = 0
        for shard in missing:
            rows = manifest.shard_rows(shard)
            block, sums = read(rows)
            encoded = columns_of(pieces(rows), size) if copies else None
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


def _parts_of_slice(parts: tuple[Part, ...], rows: NDArray[np.int64]) -> tuple[Part, ...]:
    """The parts of a slice of a merged store."""
    made, start = [], 0
    for part in parts:
        inside = rows[(rows >= start) & (rows < start + part.sequences)] - start
        start += part.sequences
        if 0 < len(inside) < part.sequences:
            packing = json_sha256([part.packing, inside.tolist()])
            made.append(replace(part, packing=packing, sequences=len(inside)))
        elif len(inside):
            made.append(part)
    return tuple(made)


def _stated(error: CodecError, sources: Sequence[StoreReader]) -> CodecError:
    """The error of the sources: at least what their codecs can make, whatever was measured."""
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


def _copy_beside(source: StoreReader, writer: ShardWriter) -> None:
    """Copy the tokenizer and the measurements."""
    if source.place.exists(TOKENIZER) and not writer.place.exists(TOKENIZER_FILES):
        with writer.place.scratch() as folder:
            shutil.copytree(source.tokenizer_folder(), folder / TOKENIZER)
            writer.add_tokenizer(folder / TOKENIZER)
    if source.place.exists(MEASUREMENTS) and not writer.place.exists(MEASUREMENTS):
        writer.place.write(MEASUREMENTS, source.place.read(MEASUREMENTS))
