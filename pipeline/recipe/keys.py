"""Dotted keys as users type them, such as `students.small.train.steps`, and their values."""

from __future__ import annotations

import re
import tomllib
from typing import TYPE_CHECKING, Any

from ...data.errors import ColdstillError

if TYPE_CHECKING:
    from collections.abc import Collection

_PART = r'(?:[A-Za-z0-9_-]+|"[^"]+")'


def split_key(text: str, students: Collection[str]) -> list[str] | None:
    """Return the parts of a dotted key, or None if the text is not a dotted key.

    students  known names; the name of a sweep's point can itself contain dots
    """
    text = text.strip()
    below = text.removeprefix("students.")
    if below != text:
        begun = [name for name in students if f"{below}.".startswith(f"{name}.")]
        if begun:
            name = max(begun, key=len)
            rest = split_key(below[len(name) + 1 :], ()) if below != name else []
            return None if rest is None else ["students", name, *rest]
    if not re.fullmatch(rf"{_PART}(\.{_PART})*", text):
        return None
    return [part.strip('"') for part in re.findall(_PART, text)]


def toml_value(text: str) -> Any:
    """Parse a TOML value; a bare word is a string."""
    try:
        found = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text.strip()
    return found["value"] if found.keys() == {"value"} else text.strip()


def set_value(table: dict[str, Any], key: list[str], value: Any, where: str) -> None:
    """Set a key of nested tables; missing tables are created.

    Raises
        ColdstillError: a part of the key is a value that is not a table
    """
    *path, last = key
    place = table
    for part in path:
        if place.get(part) is None:
            place[part] = {}
        place = place[part]
        if not isinstance(place, dict):
            raise ColdstillError(f"{where}: '{part}' is a value, not a table")
    place[last] = value
