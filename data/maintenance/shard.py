"""Is one shard what its commit record says, and is that record what was written?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import ColdstillError, DamageError
from ..store.commit import Commit, commit_json, parse_commit
from ..store.layout import commit_name, shard_name
from .account import Account
from .checks import Finding, Rules, check_block
from .problem import Problem, one_line

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..formats import Shard
    from ..places.place import Place
    from ..store.manifest import Manifest
    from .sequence_order import SequenceOrder

_DAMAGED = (ColdstillError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError)
"""What reading a block raises, of bytes that are those of the commit record, when something in it
is not what it should be."""


def check_shard(
    place: Place, manifest: Manifest, index: int, order: SequenceOrder
) -> list[Problem]:
    """Everything that is wrong with one shard that has a commit record.

    Raises
        ColdstillError, OSError: it cannot be read now, which says nothing of what it is
    """
    found: list[Problem] = []
    try:
        found.extend(_shard(place, manifest, index, order))
    except DamageError as error:
        found.append(Problem(what=one_line(error), shard=index))
    return found


def _shard(place: Place, manifest: Manifest, index: int, order: SequenceOrder) -> Iterator[Problem]:
    commit = _commit(place, manifest, index)
    store = manifest.make_store(place)
    name = shard_name(index, store.suffix)
    listed = {file.path(name) for file in commit.files}
    for extra in sorted(set(place.sizes(name)) - listed) if store.is_folder else ():
        yield Problem(what=f"{place.path(extra)}: not in its commit record", shard=index)
    path = place.shard(commit, name)
    with place.reading(commit, name):  # a distant one stays in the cache meanwhile
        try:
            shard = store.open(path)
        except ColdstillError as error:
            raise DamageError(str(error)) from error
        yield from _data(shard, commit, manifest, order)


def _commit(place: Place, manifest: Manifest, index: int) -> Commit:
    name = commit_name(index)
    where = place.path(name)
    try:
        content = place.read(name)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise DamageError(f"{where}: damaged: no file") from error
    try:
        commit = parse_commit(content, where)
    except ColdstillError as error:
        raise DamageError(str(error)) from error
    if content != commit_json(commit):
        raise DamageError(f"{where}: damaged: not the bytes that were written")
    rows = len(manifest.shard_rows(index))
    if (commit.shard, commit.sequences) != (index, rows):
        raise DamageError(
            f"{where}: speaks of shard {commit.shard} with {commit.sequences} sequences, not of "
            f"shard {index} with {rows}"
        )
    return commit


def _data(
    shard: Shard, commit: Commit, manifest: Manifest, order: SequenceOrder
) -> Iterator[Problem]:
    """What is wrong with the blocks, or else with the record of them."""
    index = commit.shard
    expected = -(-commit.sequences // manifest.block_sequences)
    if shard.blocks != expected:
        yield Problem(what=f"has {shard.blocks} blocks, expected {expected}", shard=index)
        return
    codec, rules, is_sound = manifest.make_codec("manifest"), _rules(manifest), True
    account = Account(manifest.packing.separator, rules)
    for number in range(shard.blocks):
        rows = manifest.block_rows(index, number)
        try:
            block = codec.decode(shard.read(number), manifest.capture)
        except _DAMAGED as error:
            yield Problem(what=one_line(error), shard=index, sequence=rows.start)
            is_sound = False
            continue
        found = check_block(block, len(rows), rules)
        if not found:
            account.add(block)
            row = order.first_break(rows.start, block.sequences.ids)
            found = [] if row is None else [Finding(_UNORDERED, row)]
        is_sound = is_sound and not found
        for finding in found:
            yield _problem(finding, index, rows)
    if is_sound:  # sums over wrong numbers say nothing
        for what in account.complaints(commit):
            yield Problem(what=what, shard=index)


_UNORDERED = "a sequence id that is not above the one before"


def _problem(finding: Finding, shard: int, rows: range) -> Problem:
    several = f" (and {finding.count - 1} more)" if finding.count > 1 else ""
    return Problem(
        what=finding.what + several,
        shard=shard,
        sequence=rows.start + (finding.row or 0),
        position=finding.position,
    )


def _rules(manifest: Manifest) -> Rules:
    codec = manifest.make_codec("manifest")
    return Rules(
        vocabulary=manifest.tokenizer.size,
        sequence_length=manifest.packing.sequence_length,
        capture=manifest.capture,
        maximum=max(manifest.error.maximum, codec.maximum_error(manifest.capture)),
        rounding=max(manifest.error.rounding, codec.rounding),
    )
