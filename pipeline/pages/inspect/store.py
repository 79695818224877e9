"""The content of a store or of one shard by its own records: no sequence is read."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from ....data.formats import STORES
from ....data.ragged import Ragged
from ....data.store.commit import Totals
from ....data.store.layout import shard_name
from ...results.facts import Measurements, entropy_histogram, mass_histogram, mean_figure

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from ....data.store.commit import ShardStatistics
    from ....data.store.manifest import Manifest
    from ....data.store.retokenized import Retokenized
    from ...results.facts import Histogram
    from .path import LoneShard, Subject


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardColumn:
    name: str
    type: str
    """NumPy type and further axes: `float32 x 8`."""
    list: bool
    """Whether a sequence has a list of values, and not a single one."""
    rows: int
    values: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LoneShardFacts:
    """A shard without its store; the fields are the keys of `--json`."""

    path: str
    note: str
    store: str
    """Name of the file format."""
    bytes: int
    columns: tuple[ShardColumn, ...]

    @property
    def sequences(self) -> int:
        return max((column.rows for column in self.columns), default=0)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def describe_lone(shard: LoneShard) -> LoneShardFacts:
    """Read the columns of a shard without its store."""
    files = [path for path in shard.path.rglob("*") if path.is_file()] or [shard.path]
    return LoneShardFacts(
        path=str(shard.path),
        note=f"{shard.why}: only the shard's own file is shown",
        store=shard.store,
        bytes=sum(path.stat().st_size for path in files),
        columns=_columns(shard.path, shard.store),
    )


def columns_of_shard(subject: Subject) -> tuple[ShardColumn, ...]:
    """Return the columns of a store's shard, after verifying every byte of it."""
    assert subject.shard is not None
    store, place = subject.store.manifest.make_store(subject.path), subject.store.place
    name = shard_name(subject.shard, store.suffix)
    path = place.shard(subject.store.commit(subject.shard), name)
    return _columns(path, store.name)


def _columns(path: Path, store: str) -> tuple[ShardColumn, ...]:
    """Count rows and values block by block."""
    opened = STORES[store]().open(path)
    found: dict[str, ShardColumn] = {}
    for block in range(opened.blocks):
        for name, column in opened.read(block).items():
            values = column.values if isinstance(column, Ragged) else column
            before = found.get(name)
            found[name] = ShardColumn(
                name=name,
                type=values.dtype.name + "".join(f" x {width}" for width in values.shape[1:]),
                list=isinstance(column, Ragged),
                rows=(before.rows if before else 0) + len(column),
                values=(before.values if before else 0) + len(values),
            )
    return tuple(found.values())


def column_lines(columns: Sequence[ShardColumn]) -> list[str]:
    rows = [(c.name, c.type, "a list" if c.list else "one", f"{c.values:,}") for c in columns]
    table = tabulate(
        rows,
        headers=("column", "type", "a sequence has", "values"),
        tablefmt="plain",
        disable_numparse=True,
        colalign=("left", "left", "left", "right"),
    )
    return table.splitlines()


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreFacts:
    """A store, or one shard of it. All figures are means over positions; None without any."""

    path: str
    note: str
    """How the store was found; empty if the path is the store itself."""
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
    measurements: Measurements
    """Speed and memory of the capture; empty if they are missing or damaged."""

    def mean(self, value: float, name: str = "") -> float | None:
        """As `mean_figure`."""
        return mean_figure(value, name, self.sums, self.positions, self.manifest.capture)

    @property
    def teacher_loss(self) -> float | None:
        """The teacher's mean -log p(label), in nats."""
        return self.mean(self.sums.loss, "teacher_loss")

    @property
    def teacher_entropy(self) -> float | None:
        return self.mean(self.sums.entropy, "teacher_entropy")

    @property
    def mean_head_mass(self) -> float | None:
        """Mean probability inside the head; None without a head, too."""
        has_head = self.manifest.capture.head > 0
        return self.mean(self.sums.head_mass, "head_mass") if has_head else None

    @property
    def shards_missing(self) -> list[int]:
        return sorted(set(range(self.manifest.shards)) - set(self.done))

    @property
    def teacher_accuracy(self) -> float | None:
        """Share of positions whose most probable token is the next token; None without a head."""
        has_head = self.manifest.capture.head > 0
        return self.mean(self.sums.correct, "teacher_accuracy") if has_head else None

    @property
    def entropy(self) -> Histogram:
        """Positions by the teacher's entropy in nats."""
        return entropy_histogram(self.sums, self.manifest.capture)

    @property
    def head_mass(self) -> Histogram:
        """Positions by the probability inside the head."""
        return mass_histogram(self.sums, self.manifest.capture)

    def to_json(self) -> dict[str, Any]:
        loss = self.teacher_loss
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
            "teacher_entropy": self.teacher_entropy,
            "teacher_accuracy": self.teacher_accuracy,
            "head_mass": self.mean(self.sums.head_mass, "head_mass"),
            "codec_kl": self.mean(self.sums.distortion),
            "histograms": {
                "entropy": self.entropy.to_json(),
                "head_mass": self.head_mass.to_json(),
            },
            "measurements": self.measurements.model_dump(mode="json", exclude_unset=True),
        }
        if self.rows is not None and self.columns is not None:
            facts["rows"] = [*self.rows]
            facts["columns"] = [
                {name: getattr(column, name) for name in ShardColumn.__slots__}
                for column in self.columns
            ]
        return facts


def describe(subject: Subject) -> StoreFacts:
    """Collect the facts of a store or of one shard."""
    store, manifest, shard = subject.store, subject.store.manifest, subject.shard
    totals = store.totals if shard is None else Totals()
    if shard is not None:
        totals.add(store.commit(shard))
    rows = None if shard is None else manifest.shard_rows(shard)
    return StoreFacts(
        path=subject.path,
        note=subject.note,
        manifest=manifest,
        done=tuple(store.done),
        shard=shard,
        rows=None if rows is None else (rows.start, rows.stop),
        columns=None if shard is None else columns_of_shard(subject),
        sequences=totals.sequences,
        document_pieces=totals.documents,
        tokens=totals.tokens,
        positions=totals.positions,
        bytes=totals.bytes,
        sums=totals.statistics,
        measurements=Measurements.of(store),
    )


def settings_in_words(value: Mapping[str, Any]) -> str:
    """Return the settings of a codec or a format in words: `compact, levels 127`. Of a list, only
    its length is shown."""

    def word(setting: Any) -> str:
        if isinstance(setting, list):
            return f"{len(setting):,}"
        if isinstance(setting, bool):
            return "yes" if setting else "no"
        return f"{setting:,}" if isinstance(setting, int) else str(setting)

    # lists last: they say least
    others = sorted(value.items(), key=lambda item: isinstance(item[1], list))
    words = [f"{key} {word(setting)}" for key, setting in others if key != "name"]
    return ", ".join([value["name"], *words])


def ranges(numbers: Sequence[int]) -> str:
    """Return `0-3, 7` for [0, 1, 2, 3, 7]."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)


_AMBIGUOUS = {
    "split": "shared out as the texts go on",
    "map": "mapped alone",
    "bucket": "left in the bucket",
}


def retokenized_lines(made: Retokenized | None) -> list[tuple[str, str]]:
    """How a store got the tokens of a student."""
    if made is None:
        return []
    counts, positions = made.counts, max(1, made.positions)
    labels = max(1, counts.get("teacher_labels", 0))
    ambiguous, unmapped = made.ambiguous_mass / positions, made.unmapped_mass / positions
    lines = [
        (
            "retokenized",
            f"from {made.size:,} tokens ({made.fingerprint[:12]}), {made.positions:,} positions "
            "with the teacher's distribution, "
            f"{counts.get('left_labels', 0) / labels:.2%} of its labels left out",
        ),
        (
            "ambiguous",
            f"{ambiguous:.2%} of the probability of such a position is of tokens that may begin a "
            f"longer one, {_AMBIGUOUS[made.ambiguous]}, "
            f"{unmapped:.2%} of tokens that the student cannot spell",
        ),
    ]
    if made.branches:
        beside = (
            f"{made.spelled_mass / positions:.2%} of the probability is of words of several "
            f"tokens; at most {made.branches:g} of them for each token are kept beside the text, "
            "for the loss branches"
        )
        lines.append(("branches", beside))
    return lines
