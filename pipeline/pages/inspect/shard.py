"""One shard by itself: what its file tells without a manifest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ....data.formats import STORES
from ....data.ragged import Ragged
from ....data.store.layout import shard_name
from ...units import size

if TYPE_CHECKING:
    from pathlib import Path

    from .path import LoneShard, Subject


def describe_lone(shard: LoneShard) -> dict[str, Any]:
    """Columns, types and rows, as a JSON value.

    Raises
        ColdstillError: it is damaged, or not such a file
    """
    files = [path for path in shard.path.rglob("*") if path.is_file()] or [shard.path]
    return {
        "path": str(shard.path),
        "note": f"{shard.why}: this is what the shard tells by itself",
        "store": shard.store,
        "bytes": sum(path.stat().st_size for path in files),
        "columns": _columns(shard.path, shard.store),
    }


def columns_of_shard(subject: Subject) -> list[dict[str, Any]]:
    """The columns of a store's shard, once every byte of it has been compared."""
    assert subject.shard is not None
    store, place = subject.store.manifest.make_store(subject.path), subject.store.place
    name = shard_name(subject.shard, store.suffix)
    path = place.shard(subject.store.commit(subject.shard), name)
    return _columns(path, store.name)


def _columns(path: Path, store: str) -> list[dict[str, Any]]:
    """Name, type and counts of each column; blocks are read one after the other."""
    opened = STORES[store]().open(path)
    found: dict[str, dict[str, Any]] = {}
    for block in range(opened.blocks):
        for name, column in opened.read(block).items():
            values = column.values if isinstance(column, Ragged) else column
            kind = values.dtype.name + "".join(f" x {width}" for width in values.shape[1:])
            listed = isinstance(column, Ragged)
            one = found.setdefault(name, {"name": name, "type": kind, "list": listed})
            one["rows"] = one.get("rows", 0) + len(column)
            one["values"] = one.get("values", 0) + len(values)
    return list(found.values())


def shard_table(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """A lone shard for a person, but for its columns."""
    rows = max((column["rows"] for column in facts["columns"]), default=0)
    return [
        ("shard", f"{facts['path']} ({facts['store']}, {size(facts['bytes'])})"),
        ("holds", "1 sequence" if rows == 1 else f"{rows:,} sequences"),
    ]


def column_lines(columns: list[dict[str, Any]]) -> list[str]:
    """The columns, aligned."""
    cells = [("column", "type", "a sequence has", "values")] + [
        (c["name"], c["type"], "a list" if c["list"] else "one", f"{c['values']:,}")
        for c in columns
    ]
    widths = [max(len(line[i]) for line in cells) for i in range(4)]
    return [
        "  ".join(
            [
                *(text.ljust(w) for text, w in zip(line[:3], widths, strict=False)),
                line[3].rjust(widths[3]),
            ]
        )
        for line in cells
    ]
