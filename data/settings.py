"""Compares settings: those of an existing result with those of now."""

from __future__ import annotations

import itertools
from typing import Any


def first_difference(old: Any, new: Any, key: str = "") -> str | None:
    """The first leaf in which two JSON values differ, as `key = old, now new`."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted(old.keys() | new.keys()):
            # A missing key of `trainer` is not off: it has the default of transformers.
            if name not in old and not new[name] and not key.endswith("trainer"):
                continue  # a key that is newer than the record, and off now
            inner = f"{key}.{name}" if key else name
            if found := first_difference(old.get(name), new.get(name), inner):
                return found
        return None
    if _are_tables(old) and _are_tables(new):
        # A single table stands for a list with one table.
        olds, news = ([each] if isinstance(each, dict) else each for each in (old, new))
        for place, (one, other) in enumerate(itertools.zip_longest(olds, news)):
            if found := first_difference(one, other, f"{key}.{place}"):
                return found
        return None
    return None if old == new else f"{key or 'settings'} = {_short(old)}, now {_short(new)}"


def _are_tables(value: Any) -> bool:
    """Whether the value is a table, or a list of tables."""
    if isinstance(value, list):
        return bool(value) and all(isinstance(each, dict) for each in value)
    return isinstance(value, dict)


def _short(value: Any) -> str:
    if isinstance(value, dict):
        value = {name: inner for name, inner in value.items() if inner is not None}
    text = repr(value)
    return text if len(text) <= 40 else text[:13] + "..."
