"""Adds shards to a store, each whole or not at all."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from ..codecs import distortion, expect_rounded, measure
from ..columns import check_hashes
from ..errors import ColdstillError
from ..files import json_bytes
from ..places.place import place_at
from .commit import Commit, block_statistics, commit_json, files_json, shard_files, total
from .layout import (
    MANIFEST,
    SHARDS,
    TOKENIZER,
    TOKENIZER_FILES,
    claim_name,
    commit_name,
    committed,
    shard_name,
)
from .manifest import MOST_SHARDS, Manifest, difference, read_manifest, settings_of, with_engine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

    from ..codecs import Codec
    from ..columns import Columns
    from ..schema import Block
    from .commit import ShardStatistics

BLOCK_TOKENS = 16_384
"""Tokens of a block inside a shard, the unit of a read. Half as many made decoding 10 % slower."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EncodedBlock:
    columns: Columns
    statistics: ShardStatistics
    sequences: int
    documents: int
    tokens: int
    positions: int


class ShardWriter:
    """Writes the shards of a store whose manifest is known. A context manager that holds its lock.

    Raises, on entering
        ColdstillError: another process writes the store, or the store was made with another
            teacher, tokenizer, corpus, packing or capture (the field, its old and new value)
    """

    def __init__(
        self,
        root: str | Path,
        manifest: Manifest,
        *,
        shared: bool = False,
        save_tokenizer: Callable[[Path], object] | None = None,
        other_engine: bool = False,
    ) -> None:
        """Name the store. Nothing is written before the context is entered.

        shared          several processes may write the store at the same time, each only the shards
                        that it has claimed (`claim`)
        save_tokenizer  saves the tokenizer to a folder; called if the store has none yet
        other_engine    continue a store that differs in the teacher's engine alone; the manifest
                        then names both
        """
        self._shared, self._save_tokenizer = shared, save_tokenizer
        self._other_engine = other_engine
        self.place = place_at(root)
        self.use(manifest)
        self._held = contextlib.ExitStack()

    def use(self, manifest: Manifest) -> None:
        """Write with this manifest, its codec and its format."""
        self.manifest = manifest
        self._codec, self._store = manifest.make_codec(self.place), manifest.make_store(self.place)

    def check(self) -> None:
        """Refuse a store that was made differently. Writes nothing."""
        if not self.place.exists(MANIFEST):
            if self.place.names(SHARDS):
                raise ColdstillError(
                    f"{self.place}: holds shards but no manifest.json; move it away"
                )
            return
        store = read_manifest(self.place)
        if changed := difference(store, self.manifest):
            remedy = (
                "give this run another name to keep the store, or move the folder away to make "
            )
            remedy += "a new one"
            if not difference(store, with_engine(self.manifest, store)):
                if self._other_engine:
                    return
                remedy = "to continue it all the same, add --other-engine"
            raise ColdstillError(f"{self.place}: made differently: {changed}; {remedy}")

    def __enter__(self) -> ShardWriter:
        """Take the lock, write the manifest if it is missing, and delete leftovers of a crash."""
        self.check()
        with contextlib.ExitStack() as held:
            if self._shared:
                held.enter_context(self.place.join(self._begin))
            else:
                held.enter_context(self.place.lock())
                self._begin(alone=True)
            self._held = held.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._held.close()

    def _begin(self, alone: bool) -> None:
        self.check()  # another process may have made the store before the lock was taken
        if alone:
            self.place.clear()
        if not self.place.exists(MANIFEST):
            self.place.write(MANIFEST, json_bytes(self.manifest.to_json()))
        # a store keeps its format version, and what its codec has learned from its first block
        store, engine = read_manifest(self.place), self.manifest.teacher.engine
        if engine not in store.teacher.engines:
            others = (*store.teacher.other_engines, engine)
            store = replace(store, teacher=replace(store.teacher, other_engines=others))
            self.place.write(MANIFEST, json_bytes(store.to_json()))
        self.use(store)
        if self._save_tokenizer is not None and not self.place.exists(TOKENIZER_FILES):
            with self.place.scratch() as folder:
                self._save_tokenizer(folder / TOKENIZER)
                self.add_tokenizer(folder / TOKENIZER)

    @contextlib.contextmanager
    def claim(self, shard: int) -> Iterator[bool]:
        """Claim a shard; False if another process has claimed it or it already exists."""
        with self.place.claim(claim_name(shard)) as mine:
            # another process may have committed it before the claim was taken
            yield mine and not self.place.exists(commit_name(shard))

    def add_tokenizer(self, made: Path) -> None:
        """Move a finished tokenizer folder into the store, with a record of its files."""
        files = shard_files(made)
        self.place.adopt(made, TOKENIZER)
        self.place.write(TOKENIZER_FILES, files_json(files))

    def missing(self) -> list[int]:
        """The shards without a commit record, in order."""
        done = set(committed(self.place.names(SHARDS)))
        return [i for i in range(self.manifest.shards) if i not in done]

    def write(
        self,
        shard: int,
        block: Block,
        *,
        encoded: Sequence[Columns] | None = None,
        statistics: ShardStatistics | None = None,
    ) -> Commit:
        """Write one whole shard and commit it.

        Every block is decoded again and compared before the shard is committed, so that an encoding
        error is found now.

        encoded     the columns of each block, if they are known from a store with the same codec
        statistics  the sums over the captured targets, if `block` was decoded from another store;
                    the distortion of this codec is added
        """
        expected = len(self.manifest.shard_rows(shard))
        if len(block) != expected:
            raise ValueError(f"shard {shard} holds {expected} sequences, got {len(block)}")
        parts = blocks_of(block, self.manifest.block_sequences)
        return self.commit(
            shard,
            (self.encode(p, encoded[i] if encoded else None) for i, p in enumerate(parts)),
            statistics,
        )

    def encode(self, part: Block, columns: Columns | None = None) -> EncodedBlock:
        """Encode one block, decode it again and compare. Safe to call from any thread.

        columns  the encoded columns, if they are known
        """
        if columns is None:
            columns = self._codec.encode(part)
        kept = self._codec.decode(columns, self.manifest.capture)
        check_hashes(kept.sequences)
        expect_rounded(part.targets, kept.targets, self._codec.rounding)
        error_M = distortion(part.targets, kept.targets)
        return EncodedBlock(
            columns=columns,
            statistics=block_statistics(part, self.manifest.packing.separator, error_M),
            sequences=len(part),
            documents=len(part.sequences.document_ids.values),
            tokens=len(part.sequences.tokens.values),
            positions=len(part.targets),
        )

    def commit(
        self, shard: int, blocks: Iterable[EncodedBlock], statistics: ShardStatistics | None = None
    ) -> Commit:
        """Write the blocks of one whole shard, in order, and commit it.

        statistics  as in `write`

        Raises
            ValueError: the blocks do not have the sizes that the manifest gives
        """
        sizes = self.manifest.block_sizes(shard)
        name = shard_name(shard, self._store.suffix)
        sums: list[EncodedBlock] = []
        with self.place.scratch() as folder:
            made = folder / name.rpartition("/")[2]
            with self._store.create(made) as add:
                for block in blocks:
                    add(block.columns)
                    sums.append(replace(block, columns={}))
            if [block.sequences for block in sums] != sizes:
                found = [block.sequences for block in sums]
                raise ValueError(f"shard {shard} holds {sizes} sequences, got {found}")
            files = shard_files(made)
            self.place.adopt(made, name)
        found_sums = total(block.statistics for block in sums)
        if statistics:
            distorted = statistics.distortion + found_sums.distortion
            found_sums = replace(statistics, distortion=distorted)
        commit = Commit(
            shard=shard,
            sequences=sum(block.sequences for block in sums),
            documents=sum(block.documents for block in sums),
            tokens=sum(block.tokens for block in sums),
            positions=sum(block.positions for block in sums),
            files=files,
            statistics=found_sums,
        )
        self.place.write(commit_name(shard), commit_json(commit))
        return commit


def shard_sequences(sequences: int, sequence_length: int, shard_tokens: int) -> int:
    """Sequences per shard of a new store.

    shard_tokens  tokens of a shard, `logits.shard_tokens` of the recipe

    Raises
        ColdstillError: that makes more shards than a store may have
    """
    each = max(1, shard_tokens // sequence_length)
    shards = -(-sequences // each)
    if shards > MOST_SHARDS:
        least = -(-sequences // MOST_SHARDS) * sequence_length
        raise ColdstillError(
            f"logits.shard_tokens: {shard_tokens:,} make {shards:,} shards of {sequences:,} "
            f"sequences, a store may have {MOST_SHARDS:,}; set it to at least {least:,}"
        )
    return each


def blocks_of(block: Block, size: int) -> Sequence[Block]:
    """A block in parts of `size` sequences; the last part may hold fewer."""
    rows = np.arange(len(block))
    return [block.take(rows[start : start + size]) for start in range(0, len(rows), size)]


def fitted(manifest: Manifest, block: Block) -> Manifest:
    """The manifest of a new store with what follows from its first block: settings that the codec
    learns, and the codec's error."""
    codec: Codec = manifest.make_codec("manifest").learned(block)
    stored = codec.decode(codec.encode(block), block.capture)
    error = measure(block, stored, codec.maximum_error(block.capture), codec.rounding)
    return replace(manifest, codec=settings_of(codec), error=error)
