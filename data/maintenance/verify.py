"""Is a store what it says it is? Every byte, every record, every rule of the format."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from ..commit import Commit, commit_json, parse_commit
from ..errors import ColdstillError
from ..files import SCRATCH_PREFIX, json_bytes
from ..fingerprint import tokens_sha256
from ..layout import MANIFEST, SHARDS, TOKENIZER, commit_name, committed, shard_name
from ..manifest import Manifest, parse_manifest
from ..place import place_at
from ..statistics import ShardStatistics, block_statistics, total
from . import Tell, quiet
from .checks import Rules, check_block

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..place import Place
    from ..schema import Block
    from ..stores import Shard

_DAMAGED = (ColdstillError, ValueError, LookupError, TypeError, AttributeError)
"""What reading a block raises when something in it is not what it should be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One thing that is wrong, and where."""

    what: str
    shard: int | None = None
    sequence: int | None = None
    """Its place in the store."""
    position: int | None = None
    """In the sequence."""
    missing: bool = False
    """Whether this is a shard that was never written, rather than damage."""

    def __str__(self) -> str:
        """`shard 3, sequence 812, position 17: what`."""
        places = {"shard": self.shard, "sequence": self.sequence, "position": self.position}
        where = ", ".join(f"{name} {place}" for name, place in places.items() if place is not None)
        return f"{where}: {self.what}" if where else self.what


def verify(path: str, tell: Tell = quiet) -> Iterator[Problem]:
    """Everything that is wrong with a store, shard by shard.

    Raises
        ColdstillError: there is no store
    """
    place = place_at(path)
    if not place.exists(MANIFEST):
        raise ColdstillError(f"{place}: no manifest.json there, so not a store")
    try:
        manifest = checked_manifest(place)
    except ColdstillError as error:
        yield Problem(what=str(error))
        return
    yield from _tokenizer(place, manifest)
    names = place.names(SHARDS)
    for stray in stray_names(manifest, names):
        yield Problem(what=f"{place.path(f'{SHARDS}/{stray}')}: belongs to no shard")
    done = set(committed(names))
    for index in range(manifest.shards):
        if index in done:
            yield from check_shard(place, manifest, index)
        elif index < _last(done) + _NAMED_GAPS:
            yield Problem(what="not there", shard=index, missing=True)
        else:
            gap = f"not there, nor the {manifest.shards - index - 1} after it"
            yield Problem(what=gap, shard=index, missing=True)
            return
        rows = manifest.shard_rows(index)
        tell("verify", rows.stop, manifest.sequences)


_NAMED_GAPS = 20
"""So many missing shards are named one by one after the last that is there: a damaged promise may
be of any number."""


def _last(done: set[int]) -> int:
    return max(done, default=-1) + 1


def checked_manifest(place: Place) -> Manifest:
    """The manifest, byte for byte as it was written; raises ColdstillError otherwise."""
    content = place.read(MANIFEST)
    manifest = parse_manifest(content, place.path(MANIFEST))
    if content != json_bytes(manifest.to_json()):
        raise ColdstillError(f"{place.path(MANIFEST)}: damaged: not the bytes that were written")
    codec = manifest.make_codec(place)
    promised = getattr(codec, "vocabulary", manifest.tokenizer.size)
    if promised != manifest.tokenizer.size:
        raise ColdstillError(
            f"{place.path(MANIFEST)}: its codec is for {promised:,} tokens, its tokenizer has "
            f"{manifest.tokenizer.size:,}"
        )
    return manifest


def stray_names(manifest: Manifest, names: set[str]) -> list[str]:
    """What lies among the shards and belongs to none; leftovers of a crash are not counted."""
    suffix = manifest.make_store("store").suffix
    ours = set()
    for index in committed(names):
        if index < manifest.shards:
            ours |= {_name(commit_name(index)), _name(shard_name(index, suffix))}
    return sorted(name for name in names - ours if not name.startswith(SCRATCH_PREFIX))


def check_shard(place: Place, manifest: Manifest, index: int) -> list[Problem]:
    """Everything that is wrong with one shard that has a commit record."""
    try:
        return list(_shard(place, manifest, index))
    except _DAMAGED as error:
        return [Problem(what=_one_line(error), shard=index)]


def _shard(place: Place, manifest: Manifest, index: int) -> Iterator[Problem]:
    commit = _commit(place, manifest, index)
    store = manifest.make_store(place)
    name = shard_name(index, store.suffix)
    listed = {file.path(name) for file in commit.files}
    for extra in sorted(set(place.sizes(name)) - listed) if store.is_folder else ():
        yield Problem(what=f"{place.path(extra)}: not in its commit record", shard=index)
    path = place.shard(commit, name)
    with place.reading(commit, name):  # a distant one stays in the cache meanwhile
        yield from _data(store.open(path), commit, manifest)


def _data(shard: Shard, commit: Commit, manifest: Manifest) -> Iterator[Problem]:
    """What is wrong with the blocks, or else with the record of them."""
    index = commit.shard
    expected = -(-commit.sequences // manifest.block_sequences)
    if shard.blocks != expected:
        yield Problem(what=f"has {shard.blocks} blocks, expected {expected}", shard=index)
        return
    codec = manifest.make_codec("manifest")
    rules = _rules(manifest)
    counts, sums = np.zeros(3, np.int64), []
    for number in range(shard.blocks):
        rows = manifest.block_rows(index, number)
        block = codec.decode(shard.read(number), manifest.capture)
        found = check_block(block, len(rows), rules)
        for finding in found:
            several = f" (and {finding.count - 1} more)" if finding.count > 1 else ""
            yield Problem(
                what=finding.what + several,
                shard=index,
                sequence=rows.start if finding.row is None else rows.start + finding.row,
                position=finding.position,
            )
        if found:
            return  # sums over wrong numbers say nothing
        counts += _counts(block)
        separator = manifest.packing.separator
        sums.append(block_statistics(block, separator, np.zeros(len(block.targets))))
    yield from _record(commit, counts, total(sums), rules)


def _rules(manifest: Manifest) -> Rules:
    codec = manifest.make_codec("manifest")
    return Rules(
        vocabulary=manifest.tokenizer.size,
        sequence_length=manifest.packing.sequence_length,
        capture=manifest.capture,
        maximum=max(manifest.error.maximum, codec.maximum_error(manifest.capture)),
        rounding=max(manifest.error.rounding, codec.rounding),
    )


def _commit(place: Place, manifest: Manifest, index: int) -> Commit:
    name = commit_name(index)
    where = place.path(name)
    content = place.read(name)
    commit = parse_commit(content, where)
    if content != commit_json(commit):
        raise ColdstillError(f"{where}: damaged: not the bytes that were written")
    rows = len(manifest.shard_rows(index))
    if (commit.shard, commit.sequences) != (index, rows):
        raise ColdstillError(
            f"{where}: speaks of shard {commit.shard} with {commit.sequences} sequences, not of "
            f"shard {index} with {rows}"
        )
    return commit


def _counts(block: Block) -> Any:
    sequences = block.sequences
    return [len(sequences.document_ids.values), len(sequences.tokens.values), len(block.targets)]


def _record(commit: Commit, counts: Any, found: ShardStatistics, rules: Rules) -> Iterator[Problem]:
    """What the commit record says, against what the data add up to."""
    for name, count in zip(("documents", "tokens", "positions"), counts.tolist(), strict=True):
        said = getattr(commit, name)
        if said != count:
            what = f"its commit record says {said:,} {name}, it holds {count:,}"
            yield Problem(what=what, shard=commit.shard)
    for field in fields(ShardStatistics):
        said, summed = (getattr(s, field.name) for s in (commit.statistics, found))
        if not _agree(field.name, said, summed, commit.positions, rules):
            what = f"its commit record says a {field.name} of {said}, it sums to {summed}"
            yield Problem(what=what, shard=commit.shard)


def _agree(name: str, said: Any, summed: Any, positions: int, rules: Rules) -> bool:
    if name == "distortion":  # what was captured is not here to compare with
        return bool(said >= 0.0)
    if isinstance(said, tuple):
        # a rounded value may have crossed a border; none may be lost
        return sum(said) == sum(summed) and (rules.rounding > 0 or said == summed)
    if isinstance(said, int):
        return bool(said == summed)
    # each position may be off by a rounding, or by what an angle is rounded by
    slack = positions * max(rules.rounding, min(1e-3, rules.maximum)) + 1e-9 * abs(summed)
    return bool(abs(said - summed) <= slack + 1e-9)


def _tokenizer(place: Place, manifest: Manifest) -> Iterator[Problem]:
    if "tokenizer.json" not in place.names(TOKENIZER):
        if place.exists(TOKENIZER):
            return  # of a kind that has no table in a file of its own
        what = f"{place.path(TOKENIZER)}: not there; its ids can no longer be read as text"
        yield Problem(what=what)
        return
    from tokenizers import Tokenizer

    try:
        file = place.folder(TOKENIZER) / "tokenizer.json"
        table = Tokenizer.from_file(str(file)).get_vocab(with_added_tokens=True)
    except Exception as error:  # the library raises bare exceptions
        yield Problem(what=f"{place.path(TOKENIZER)}: {_one_line(error)}")
        return
    if tokens_sha256(table) != manifest.tokenizer.fingerprint:
        what = f"{place.path(TOKENIZER)}: not the tokenizer that the manifest names"
        yield Problem(what=what)


def _name(path: str) -> str:
    return path.rpartition("/")[2]


def _one_line(error: Exception) -> str:
    text = f"lacks {error}" if isinstance(error, KeyError) else str(error)
    return " ".join(text.split()) or type(error).__name__
