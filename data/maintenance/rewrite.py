"""A store written anew: in another form, in part, or with a smaller record.

Everything goes through `ShardWriter`, shard by shard: memory holds one shard, and a run that was
killed goes on where it was when the same command is given again.
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
from ..store.manifest import Manifest, format_settings
from ..store.reader import StoreReader, open_store
from ..store.statistics import block_statistics
from ..store.writer import ShardWriter, blocks_of, with_error
from . import Tell, quiet
from .gather import Piece, block_of, columns_of, sums_of
from .parts import parts_of_slice

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
    tell: Tell = quiet,
) -> Manifest:
    """The same record in another codec or store; None keeps what it has.

    Raises
        ColdstillError: a source that is not whole, an unknown codec or store, or a `to` that is
            the source or something else
    """
    source = open_source(path, to)
    manifest = reformatted(source.manifest, codec, store)
    return write_anew(to, manifest, [source], _from(source), tell)


def take(path: str, to: str, rows: NDArray[np.int64], *, tell: Tell = quiet) -> Manifest:
    """A part of a store: the chosen sequences, in their order.

    Raises
        ColdstillError: as `convert`; or nothing was chosen
    """
    source = open_source(path, to)
    if len(rows) == 0:
        raise ColdstillError(f"{path}: no sequence of it was chosen")
    old = source.manifest
    manifest = replace(
        old,
        sequences=len(rows),
        packing=replace(
            old.packing, fingerprint=json_sha256([old.packing.fingerprint, rows.tolist()])
        ),
        parts=parts_of_slice(old.parts, rows),
    )
    return write_anew(to, manifest, [source], _from(source, rows), tell)


def change(
    path: str,
    to: str,
    capture_of: Callable[[Manifest], Capture],
    how: Callable[[Block, Capture], Block],
    *,
    tell: Tell = quiet,
) -> Manifest:
    """Every record changed in the same way, to fit another capture.

    Raises
        ColdstillError: as `convert`, and as `capture_of` does
    """
    source = open_source(path, to)
    capture = capture_of(source.manifest)
    manifest = reformatted(replace(source.manifest, capture=capture), None, None)

    def changed(block: Block) -> Block:
        return how(block, capture)

    return write_anew(to, manifest, [source], _from(source), tell, changed)


def _from(
    source: StoreReader, chosen: NDArray[np.int64] | None = None
) -> Callable[[range], list[Piece]]:
    """Where the sequences of a new store lie that takes all, or the chosen ones, of one."""

    def pieces(rows: range) -> list[Piece]:
        part = np.array(rows) if chosen is None else chosen[rows.start : rows.stop]
        return [Piece(source, part)]

    return pieces


def open_source(path: str, to: str) -> StoreReader:
    """The whole store to read; raises ColdstillError if `to` is the same one, or inside it."""
    one, other = _whole_name(path), _whole_name(to)
    if other == one or other.startswith(one + "/"):
        raise ColdstillError(f"{to}: is the store that is read; choose another place")
    source = open_store(path)
    if len(source) == 0:
        raise ColdstillError(f"{path}: holds no sequence")
    if source.place.exists(TOKENIZER) and not source.tokenizer_folder().is_dir():
        raise ColdstillError(f"{source.place.path(TOKENIZER)}: damaged: no folder")
    return source


def _whole_name(path: str) -> str:
    """One name for a place, however it was given."""
    place = place_at(path)
    return str(place.root.resolve() if isinstance(place, LocalPlace) else place).rstrip("/")


def reformatted(
    manifest: Manifest, codec: Settings | str | None, store: Settings | str | None
) -> Manifest:
    """The manifest with another codec or store; what is not named stays, where it fits."""
    size, capture = manifest.tokenizer.size, manifest.capture
    wanted = codec
    if codec is None:
        wanted = {k: v for k, v in manifest.codec.items() if k in ("name", "levels")}
    kept_store: Settings | str = manifest.store["name"] if codec is not None else manifest.store
    if isinstance(store, dict):
        store = {"name": manifest.store["name"], **store}
    made = format_settings(wanted or {}, kept_store if store is None else store, size, capture)
    return replace(manifest, codec=made["codec"], store=made["store"])


def write_anew(
    to: str,
    manifest: Manifest,
    sources: Sequence[StoreReader],
    pieces: Callable[[range], list[Piece]],
    tell: Tell,
    changed: Callable[[Block], Block] | None = None,
) -> Manifest:
    """Write what is missing of `to`; `manifest` is the new store's, with its sources' error.

    pieces   where the sequences of some rows of the new store lie
    changed  what becomes of their record; without it, and with the codec that they have, columns
             are copied as they are: what is rounded is never rounded twice
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

    first, _ = read(range(min(size, manifest.sequences)))  # damage there leaves no trace of `to`
    if not copies:
        # what the sources' codecs did, and what this one adds
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
            tell("write", done, total)
    return manifest


def _stated(error: CodecError, sources: Sequence[StoreReader]) -> CodecError:
    """The sources' error: no less than their codecs make, whatever was measured at the time."""
    codecs = [(s.manifest.make_codec(s.place), s.manifest.capture) for s in sources]
    return replace(
        error,
        maximum=max(error.maximum, *(codec.maximum_error(capture) for codec, capture in codecs)),
        rounding=max(error.rounding, *(codec.rounding for codec, _ in codecs)),
    )


def _with_head_of(block: Block, sums: ShardStatistics, manifest: Manifest) -> ShardStatistics:
    """The sums of a record whose head was changed. What its codec has cost is a bound from then on:
    tokens that are told apart no longer cost no more than before."""
    own = block_statistics(block, manifest.packing.separator, np.zeros(len(block.targets)))
    return replace(sums, head_mass=own.head_mass, mass_bins=own.mass_bins, correct=own.correct)


def _copy_beside(source: StoreReader, writer: ShardWriter) -> None:
    """The tokenizer and the measurements."""
    if source.place.exists(TOKENIZER) and not writer.place.exists(TOKENIZER_FILES):
        with writer.place.scratch() as folder:
            shutil.copytree(source.tokenizer_folder(), folder / TOKENIZER)
            writer.add_tokenizer(folder / TOKENIZER)
    if source.place.exists(MEASUREMENTS) and not writer.place.exists(MEASUREMENTS):
        writer.place.write(MEASUREMENTS, source.place.read(MEASUREMENTS))
