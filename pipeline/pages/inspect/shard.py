"""The columns of one shard, read from its file without a manifest."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from ....data.formats import STORES
from ....data.schema import Ragged
from ....data.store.layout import shard_name

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from .path import LoneShard, Subject


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardColumn:
    """One column of a shard."""

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
        """Number of sequences in the shard."""
        return max((column.rows for column in self.columns), default=0)

    def to_json(self) -> dict[str, Any]:
        """Return the facts as a JSON value."""
        return asdict(self)


def describe_lone(shard: LoneShard) -> LoneShardFacts:
    """Read the columns of a shard without its store.

    Raises
        ColdstillError: the file is damaged, or not a shard of this format
    """
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
    """Return the columns as an aligned table."""
    rows = [(c.name, c.type, "a list" if c.list else "one", f"{c.values:,}") for c in columns]
    table = tabulate(
        rows,
        headers=("column", "type", "a sequence has", "values"),
        tablefmt="plain",
        disable_numparse=True,
        colalign=("left", "left", "left", "right"),
    )
    return table.splitlines()
