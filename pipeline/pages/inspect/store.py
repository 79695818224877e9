"""The content of a store by its own records: no sequence is read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ....data.errors import ColdstillError
from ....data.files import parse_json
from ....data.store.commit import ENTROPY_BIN_WIDTH, ENTROPY_BINS, MASS_BINS, total
from ....data.store.layout import MEASUREMENTS
from .shard import ShardColumn, columns_of_shard

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ....data.store.commit import ShardStatistics
    from ....data.store.manifest import Manifest
    from ....data.store.reader import StoreReader
    from .path import Subject


@dataclass(frozen=True, slots=True, kw_only=True)
class Histogram:
    """Numbers of positions by bin; the last bin of the entropy has no upper end."""

    starts: tuple[float, ...]
    """Lower end of each bin."""
    positions: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the histogram as a JSON value."""
        return {"from": [*self.starts], "positions": [*self.positions]}


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreFacts:
    """A store, or one shard of it. All figures are means over positions; None without any."""

    path: str
    note: str
    """How the store was found, or nothing."""
    manifest: Manifest
    done: tuple[int, ...]
    """Finished shards of the store."""
    shard: int | None
    """The only shard that is counted; all finished shards if None."""
    rows: tuple[int, int] | None
    """First sequence of that shard, and the one after its last."""
    columns: tuple[ShardColumn, ...] | None
    """Columns of that shard."""
    sequences: int
    document_pieces: int
    tokens: int
    positions: int
    bytes: int
    sums: ShardStatistics
    measurements: Mapping[str, Any]
    """Speed and memory of the capture; empty if they are missing or damaged."""

    def mean(self, value: float) -> float | None:
        """Return a sum divided by the number of positions."""
        return value / self.positions if self.positions else None

    @property
    def shards_missing(self) -> list[int]:
        """Shards that are not finished."""
        return sorted(set(range(self.manifest.shards)) - set(self.done))

    @property
    def teacher_accuracy(self) -> float | None:
        """Share of positions whose most probable token is the next token; None without a head."""
        return self.mean(self.sums.correct) if self.manifest.capture.head else None

    @property
    def entropy(self) -> Histogram:
        """Positions by the teacher's entropy in nats."""
        starts = tuple(place * ENTROPY_BIN_WIDTH for place in range(ENTROPY_BINS))
        return Histogram(starts=starts, positions=_padded(self.sums.entropy_bins, ENTROPY_BINS))

    @property
    def head_mass(self) -> Histogram:
        """Positions by the probability inside the head."""
        starts = tuple(place / MASS_BINS for place in range(MASS_BINS))
        return Histogram(starts=starts, positions=_padded(self.sums.mass_bins, MASS_BINS))

    def to_json(self) -> dict[str, Any]:
        """Return the facts as a JSON value."""
        loss = self.mean(self.sums.loss)
        facts: dict[str, Any] = {
            "path": self.path,
            "note": self.note,
            "shard": self.shard,
            "manifest": self.manifest.to_json(),
            "shards": self.manifest.shards,
            "shards_done": len(self.done),
            "shards_missing": self.shards_missing,
            "sequences": self.sequences,
            "document_pieces": self.document_pieces,
            "tokens": self.tokens,
            "positions": self.positions,
            "bytes": self.bytes,
            "bytes_per_position": self.mean(self.bytes),
            "teacher_loss": loss,
            "teacher_perplexity": None if loss is None else math.exp(loss),
            "teacher_entropy": self.mean(self.sums.entropy),
            "teacher_accuracy": self.teacher_accuracy,
            "head_mass": self.mean(self.sums.head_mass),
            "codec_kl": self.mean(self.sums.distortion),
            "histograms": {
                "entropy": self.entropy.to_json(),
                "head_mass": self.head_mass.to_json(),
            },
            "measurements": dict(self.measurements),
        }
        if self.rows is not None and self.columns is not None:
            facts["rows"] = [*self.rows]
            facts["columns"] = [
                {name: getattr(column, name) for name in ShardColumn.__slots__}
                for column in self.columns
            ]
        return facts


def describe(subject: Subject) -> StoreFacts:
    """Collect the facts of a store or of one shard.

    Raises
        ColdstillError: a commit record or the shard is damaged
    """
    store, manifest, shard = subject.store, subject.store.manifest, subject.shard
    commits = [store.commit(index) for index in subject.shards]
    rows = None if shard is None else manifest.shard_rows(shard)
    return StoreFacts(
        path=subject.path,
        note=subject.note,
        manifest=manifest,
        done=tuple(store.done),
        shard=shard,
        rows=None if rows is None else (rows.start, rows.stop),
        columns=None if shard is None else columns_of_shard(subject),
        sequences=sum(commit.sequences for commit in commits),
        document_pieces=sum(commit.documents for commit in commits),
        tokens=sum(commit.tokens for commit in commits),
        positions=sum(commit.positions for commit in commits),
        bytes=sum(commit.bytes for commit in commits),
        sums=total(commit.statistics for commit in commits),
        measurements=_measurements(store),
    )


def _padded(counts: Sequence[int], bins: int) -> tuple[int, ...]:
    return (*counts, *[0] * (bins - len(counts)))


def _measurements(store: StoreReader) -> Mapping[str, Any]:
    if not store.place.exists(MEASUREMENTS):
        return {}
    try:
        value = parse_json(store.place.read(MEASUREMENTS), store.place.path(MEASUREMENTS))
    except ColdstillError:
        return {}
    return value if isinstance(value, dict) else {}


def settings_in_words(value: Mapping[str, Any]) -> str:
    """Return the settings of a codec or a format in words: `compact, levels 127`."""
    others = [f"{key} {v:,}" if isinstance(v, int) else f"{key} {v}" for key, v in value.items()]
    return ", ".join([value["name"], *(text for text in others if not text.startswith("name "))])


def ranges(numbers: Sequence[int]) -> str:
    """Return `0-3, 7` for [0, 1, 2, 3, 7]."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)
