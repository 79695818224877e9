"""Checks one shard against its commit record, and the commit record against the manifest."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import ColdstillError, DamageError
from ..store.commit import (
    ENTROPY_BIN_WIDTH,
    ENTROPY_BINS,
    MASS_BINS,
    Commit,
    ShardStatistics,
    block_statistics,
    commit_json,
    known_positions,
    parse_commit,
)
from ..store.layout import commit_name, shard_name
from .checks import Finding, Rules, check_block

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from ..formats import Shard
    from ..places.place import Place
    from ..schema import Block
    from ..store.manifest import Manifest

_FLOAT = 1e-6
_ANGLE = 1e-3
"""Largest change of the head's mass by rounding the tail's mass."""
_EDGES = {
    "entropy_bins": np.arange(1, ENTROPY_BINS) * ENTROPY_BIN_WIDTH,
    "mass_bins": np.arange(1, MASS_BINS) / MASS_BINS,
}


class Account:
    def __init__(self, separator: tuple[int, ...], rules: Rules) -> None:
        self._separator = separator
        self._rules = rules
        self._counts = {"documents": 0, "tokens": 0, "positions": 0}
        self._sums = ShardStatistics()
        # lower and upper bounds of the number of values below each border between two bins
        self._below = {name: np.zeros((2, len(edges)), int) for name, edges in _EDGES.items()}

    def add(self, block: Block) -> None:
        """Add a block that has passed `check_block`."""
        self._counts["documents"] += len(block.sequences.document_ids.values)
        self._counts["tokens"] += len(block.sequences.tokens.values)
        self._counts["positions"] += len(block.targets)
        none = np.zeros(len(block.targets))
        self._sums = self._sums.plus(block_statistics(block, self._separator, none))
        known_M = known_positions(block)
        mass_M = np.exp(block.targets.head_logprobs[known_M].astype(np.float64)).sum(1)
        self._count_below("entropy_bins", block.targets.entropy[known_M], self._rules.rounding)
        # |p - q| is |sqrt p - sqrt q| times their sum, and K roots sum to sqrt K at most
        slack = 2.0 * self._rules.maximum * math.sqrt(self._rules.capture.head)
        self._count_below("mass_bins", mass_M, min(1.0, slack))

    def differences(self, commit: Commit) -> Iterator[str]:
        """The differences from a commit record, one line each."""
        for name, count in self._counts.items():
            recorded = getattr(commit, name)
            if recorded != count:
                yield f"its commit record has {recorded:,} {name}, the shard {count:,}"
        for field in fields(ShardStatistics):
            recorded, summed = (getattr(s, field.name) for s in (commit.statistics, self._sums))
            if not self._agree(field.name, recorded, summed):
                yield f"its commit record has {field.name} = {recorded}, the shard {summed}"

    def _agree(self, name: str, recorded: Any, summed: Any) -> bool:
        if name in _EDGES:
            return self._agree_on_bins(name, recorded)
        if isinstance(recorded, int) and isinstance(summed, int):
            return recorded == summed
        if name == "distortion":  # the captured targets are not known here
            return bool(recorded >= 0.0)
        slack = self._counts["positions"] * self._rules.rounding
        if name == "head_mass":
            slack = self._counts["positions"] * min(_ANGLE, self._rules.maximum)
        return bool(abs(recorded - summed) <= slack + 1e-9 * abs(summed) + 1e-9)

    def _agree_on_bins(self, name: str, recorded: tuple[int, ...]) -> bool:
        """Rounded values may be in a neighbouring bin if they are near its border; none may be
        lost."""
        if sum(recorded) != self._sums.known:
            return False
        least, most = self._below[name]
        bins = np.zeros(len(_EDGES[name]) + 1, np.int64)
        bins[: len(recorded)] = recorded
        below = bins.cumsum()[:-1]
        return bool(((least <= below) & (below <= most)).all())

    def _count_below(self, name: str, values_M: NDArray[Any], slack: float) -> None:
        ordered, edges = np.sort(values_M.astype(np.float64)), _EDGES[name]
        slack += _FLOAT
        self._below[name][0] += np.searchsorted(ordered, edges - slack)
        self._below[name][1] += np.searchsorted(ordered, edges + slack, side="right")


_DAMAGED = (ColdstillError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError)
"""Exceptions of reading a damaged block whose bytes are those of the commit record."""
_UNORDERED = "a sequence id that is not above the one before"


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One fault of a store, and where it is."""

    shard: int | None = None
    sequence: int | None = None
    """Index of the sequence in the store."""
    position: int | None = None
    """Index of the position in the sequence."""
    what: str
    missing: bool = False
    """Whether the shard was never written, rather than damaged."""

    @property
    def where(self) -> str:
        """The parts that are known, such as `shard 3, sequence 812, position 17`."""
        places = {"shard": self.shard, "sequence": self.sequence, "position": self.position}
        return ", ".join(f"{name} {place}" for name, place in places.items() if place is not None)

    def __str__(self) -> str:
        """`shard 3, sequence 812, position 17: what`."""
        return f"{self.where}: {self.what}" if self.where else self.what


class SequenceOrder:
    """Checks that sequence ids increase through a store, shard by shard; gaps are allowed.

    Increasing ids cannot repeat. In a merged store the ids increase within each part: another
    corpus has other sequences with the same ids.
    """

    def __init__(self, manifest: Manifest) -> None:
        self._ends = np.cumsum([part.sequences for part in manifest.parts], dtype=np.int64)
        self._last: tuple[int, int] | None = None

    def first_break(self, start: int, ids_N: NDArray[np.int64]) -> int | None:
        """Index of the first of these ids that is not above the one before; None if all are.

        start  index of the first of these sequences in the store
        """
        if len(ids_N) == 0:
            return None
        before = [] if self._last is None else [self._last]
        rows = np.concatenate([[row for row, _ in before], np.arange(start, start + len(ids_N))])
        ids = np.concatenate([np.array([i for _, i in before], np.int64), ids_N])
        part = np.searchsorted(self._ends, rows, side="right")
        back = (ids[1:] <= ids[:-1]) & (np.diff(part) == 0)
        self._last = start + len(ids_N) - 1, int(ids_N[-1])
        return int(back.argmax()) + 1 - len(before) if back.any() else None


def check_shard(
    place: Place, manifest: Manifest, index: int, order: SequenceOrder
) -> list[Problem]:
    """All faults of one shard that has a commit record. Raises ColdstillError or OSError if the
    shard cannot be read now, which does not mean that it is damaged."""
    found: list[Problem] = []
    try:
        found.extend(_shard(place, manifest, index, order))
    except DamageError as error:
        found.append(Problem(what=one_line(error), shard=index))
    return found


def one_line(error: Exception) -> str:
    text = f"lacks {error}" if isinstance(error, KeyError) else str(error)
    return " ".join(text.split()) or type(error).__name__


def _shard(place: Place, manifest: Manifest, index: int, order: SequenceOrder) -> Iterator[Problem]:
    commit = _commit(place, manifest, index)
    store = manifest.make_store(place)
    name = shard_name(index, store.suffix)
    listed = {file.path(name) for file in commit.files}
    for extra in sorted(set(place.sizes(name)) - listed) if store.is_folder else ():
        yield Problem(what=f"{place.path(extra)}: not in its commit record", shard=index)
    path = place.shard(commit, name)
    with place.reading(commit, name):
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
            f"{where}: names shard {commit.shard} with {commit.sequences} sequences, expected "
            f"shard {index} with {rows}"
        )
    return commit


def _data(
    shard: Shard, commit: Commit, manifest: Manifest, order: SequenceOrder
) -> Iterator[Problem]:
    """The faults of the blocks; if there are none, those of the commit record's sums."""
    index = commit.shard
    expected = -(-commit.sequences // manifest.block_sequences)
    if shard.blocks != expected:
        yield Problem(what=f"has {shard.blocks} blocks, expected {expected}", shard=index)
        return
    codec, is_sound = manifest.make_codec("manifest"), True
    rules = Rules(
        vocabulary=manifest.tokenizer.size,
        sequence_length=manifest.packing.sequence_length,
        capture=manifest.capture,
        maximum=max(manifest.error.maximum, codec.maximum_error(manifest.capture)),
        rounding=max(manifest.error.rounding, codec.rounding),
    )
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
            several = f" (and {finding.count - 1} more)" if finding.count > 1 else ""
            yield Problem(
                what=finding.what + several,
                shard=index,
                sequence=rows.start + (finding.row or 0),
                position=finding.position,
            )
    if is_sound:  # sums over wrong numbers mean nothing
        for what in account.differences(commit):
            yield Problem(what=what, shard=index)
