"""A store written anew: in another form, in part, or several as one.

Everything goes through `StoreWriter`, shard by shard: memory holds one shard, and a run that was
killed goes on where it was when the same command is given again.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from itertools import chain, repeat
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import ColdstillError
from ..fidelity import CodecError
from ..fingerprint import json_sha256
from ..layout import MEASUREMENTS, TOKENIZER
from ..manifest import Manifest, Part, difference, format_settings
from ..place import LocalPlace, place_at
from ..ragged import Ragged
from ..reader import StoreReader, open_store
from ..schema import Block
from ..writer import StoreWriter, with_error
from . import Tell, quiet

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from ..columns import Columns
    from ..schema import Capture
    from ..statistics import ShardStatistics

Settings = dict[str, Any]
_Copied = tuple["list[Columns] | None", "ShardStatistics | None"]


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
    source = _open(path, to)
    manifest = _reformatted(source.manifest, codec, store)
    same_codec = manifest.codec == source.manifest.codec

    def copied(shard: int) -> _Copied:
        # with the same codec columns are copied as they are: rounding twice would cost twice
        encoded = _encoded(source, shard) if same_codec else None
        # the source's sums are of what was captured; writing adds what another rounding costs
        return encoded, source.commit(shard).statistics

    def read(rows: range) -> Block:
        return source.read(np.array(rows))

    if same_codec:
        return _write(to, manifest, source, read, tell, copied, error=manifest.error)
    return _write(to, manifest, source, read, tell, copied)


def _encoded(source: StoreReader, shard: int) -> list[Columns]:
    """The columns of each block, in the order and with the shared borders that their codec gives
    them: a store may give back neither, and the next one may lay them out accordingly."""
    first = source.block(shard, 0).take(np.array([0]))
    like = source.manifest.make_codec(source.place).encode(first)
    blocks = blocks_of_shard(source.manifest, shard)
    return [_ordered(source.columns(shard, number), like) for number in blocks]


def _ordered(columns: Columns, like: Columns) -> Columns:
    made: Columns = {}
    borders: dict[int, NDArray[np.int64]] = {}
    for name, pattern in like.items():
        column = columns[name]
        if isinstance(column, Ragged) and isinstance(pattern, Ragged):
            shared = borders.setdefault(id(pattern.offsets), column.offsets)
            if np.array_equal(shared, column.offsets):
                column = Ragged(column.values, shared)
        made[name] = column
    return made


def blocks_of_shard(manifest: Manifest, shard: int) -> range:
    """The blocks of one shard, by number."""
    return range(-(-len(manifest.shard_rows(shard)) // manifest.block_sequences))


def take(path: str, to: str, rows: NDArray[np.int64], *, tell: Tell = quiet) -> Manifest:
    """A part of a store: the chosen sequences, in their order.

    Raises
        ColdstillError: as `convert`; or nothing was chosen
    """
    source = _open(path, to)
    if len(rows) == 0:
        raise ColdstillError(f"{path}: no sequence of it was chosen")
    old = source.manifest
    manifest = replace(
        old,
        sequences=len(rows),
        packing=replace(
            old.packing, fingerprint=json_sha256([old.packing.fingerprint, rows.tolist()])
        ),
        parts=_parts_of(old.parts, rows),
    )
    return _write(
        to, manifest, source, lambda part: source.read(rows[part.start : part.stop]), tell
    )


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
    source = _open(path, to)
    capture = capture_of(source.manifest)
    manifest = _reformatted(replace(source.manifest, capture=capture), None, None)

    def read(rows: range) -> Block:
        return how(source.read(np.array(rows)), capture)

    return _write(to, manifest, source, read, tell)


def merge(
    paths: Sequence[str],
    to: str,
    codec: Settings | str | None,
    store: Settings | str | None,
    *,
    tell: Tell = quiet,
) -> Manifest:
    """Several stores of one teacher as one, in the order given.

    Raises
        ColdstillError: as `convert`; stores of different teachers, tokenizers, packings or
            captures (the first field that differs), or the same sequence in two of them
    """
    sources = [_open(path, to) for path in paths]
    first = sources[0].manifest
    for source in sources[1:]:
        if differing := difference(first, _as_if(source.manifest, first)):
            raise ColdstillError(
                f"{source.place}: cannot be merged with {sources[0].place}: {differing}"
            )
    _expect_distinct(sources, tell)
    parts = tuple(part for source in sources for part in _parts(source.manifest))
    manifest = replace(
        first,
        corpus=replace(
            first.corpus,
            # parts of one corpus count its documents once
            documents=sum({part.corpus: part.documents for part in parts}.values()),
            fingerprint=_joined([part.corpus for part in parts]),
        ),
        packing=replace(first.packing, fingerprint=_joined([part.packing for part in parts])),
        sequences=sum(len(source) for source in sources),
        error=_worst([source.manifest.error for source in sources]),
        parts=parts if len(parts) > 1 else (),
    )
    ends = np.cumsum([len(source) for source in sources])

    def read(rows: range) -> Block:
        found = []
        for source, end in zip(sources, ends.tolist(), strict=True):
            begin = end - len(source)
            inside = np.arange(max(rows.start, begin), min(rows.stop, end)) - begin
            if len(inside):
                found.append(source.read(inside))
        return Block.concatenate(found)

    return _write(to, _reformatted(manifest, codec, store), sources[0], read, tell)


def _open(path: str, to: str) -> StoreReader:
    one, other = _whole_name(path), _whole_name(to)
    if other == one or other.startswith(one + "/"):
        raise ColdstillError(f"{to}: is the store that is read; choose another place")
    return open_store(path)


def _whole_name(path: str) -> str:
    """One name for a place, however it was given."""
    place = place_at(path)
    return str(place.root.resolve() if isinstance(place, LocalPlace) else place).rstrip("/")


def _reformatted(
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


def _write(
    to: str,
    manifest: Manifest,
    source: StoreReader,
    read: Callable[[range], Block],
    tell: Tell,
    copied: Callable[[int], _Copied] = lambda shard: (None, None),
    error: CodecError | None = None,
) -> Manifest:
    """Write what is missing of `to`.

    read    the sequences of some rows of the new store
    copied  what is at hand of a shard already: its blocks' columns, and the sums of its capture
    error   the new manifest's, where nothing is rounded anew
    """
    first = read(range(min(manifest.block_sequences, manifest.sequences)))
    manifest = replace(manifest, error=error or _both_errors(manifest, first))
    with StoreWriter(to, manifest) as writer:
        _copy_beside(source, writer)
        missing = writer.missing()
        total = sum(len(manifest.shard_rows(shard)) for shard in missing)
        done = 0
        for shard in missing:
            rows = manifest.shard_rows(shard)
            block = read(rows)
            encoded, statistics = copied(shard)
            writer.write(shard, block, encoded=encoded, statistics=statistics)
            done += len(rows)
            tell("write", done, total)
    return manifest


def _both_errors(manifest: Manifest, first: Block) -> CodecError:
    """What the source's codec did and what this one adds, by the manifest with the source's."""
    return manifest.error.plus(with_error(manifest, first).error)


def _copy_beside(source: StoreReader, writer: StoreWriter) -> None:
    """The tokenizer and the measurements."""
    if source.place.exists(TOKENIZER) and not writer.place.exists(TOKENIZER):
        with writer.place.scratch() as folder:
            shutil.copytree(source.tokenizer_folder(), folder / TOKENIZER)
            writer.place.adopt(folder / TOKENIZER, TOKENIZER)
    if source.place.exists(MEASUREMENTS) and not writer.place.exists(MEASUREMENTS):
        writer.place.write(MEASUREMENTS, source.place.read(MEASUREMENTS))


def _as_if(other: Manifest, first: Manifest) -> Manifest:
    """The other manifest with everything that may differ between the parts of a merger alike."""
    return replace(
        other,
        corpus=replace(
            other.corpus,
            fingerprint=first.corpus.fingerprint,
            documents=first.corpus.documents,
        ),
        packing=replace(other.packing, fingerprint=first.packing.fingerprint),
        sequences=first.sequences,
        shard_sequences=first.shard_sequences,
        block_sequences=first.block_sequences,
        codec=first.codec,
        store=first.store,
        parts=first.parts,
    )


def _expect_distinct(sources: Sequence[StoreReader], tell: Tell) -> None:
    seen: dict[tuple[str, int, int], int] = {}
    total = sum(len(source) for source in sources)
    for number, source in enumerate(sources):
        corpora = chain(*(repeat(part.corpus, part.sequences) for part in _parts(source.manifest)))
        for block in source.batches(source.manifest.block_sequences):
            ids, hashes = block.sequences.ids.tolist(), block.sequences.hashes.tolist()
            # strict would take one corpus too many from those to come
            for *sequence, corpus in zip(ids, hashes, corpora, strict=False):
                key = (corpus, *sequence)
                if seen.setdefault(key, number) != number:
                    raise ColdstillError(
                        f"{source.place}: its sequence {key[1]} is in "
                        f"{sources[seen[key]].place} too"
                    )
            tell("compare", len(seen), total)


def _parts(manifest: Manifest) -> tuple[Part, ...]:
    """What a store was merged from, or itself as the only part."""
    whole = Part(
        corpus=manifest.corpus.fingerprint,
        documents=manifest.corpus.documents,
        packing=manifest.packing.fingerprint,
        sequences=manifest.sequences,
    )
    return manifest.parts or (whole,)


def _parts_of(parts: tuple[Part, ...], rows: NDArray[np.int64]) -> tuple[Part, ...]:
    """What each part gives to a slice of the whole."""
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


def _joined(fingerprints: Sequence[str]) -> str:
    return fingerprints[0] if len(set(fingerprints)) == 1 else json_sha256(list(fingerprints))


def _worst(errors: Sequence[CodecError]) -> CodecError:
    return CodecError(
        maximum=max(error.maximum for error in errors),
        measured=max(error.measured for error in errors),
        kl=max(error.kl for error in errors),
        rounding=max(error.rounding for error in errors),
    )
