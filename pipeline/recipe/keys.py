"""Keys of a recipe as one types them: `students.small.train.steps`, and which keys there are."""

from __future__ import annotations

import dataclasses
import re
import tomllib
import types
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel

from ...data.errors import ColdstillError
from .tables import Recipe, StudentTable

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

_PART = r'(?:[A-Za-z0-9_-]+|"[^"]+")'


def split_key(text: str, students: Collection[str]) -> list[str] | None:
    """The parts of a dotted key; None if it is none.

    students  those whose names may hold dots themselves, as those of a sweep's points do
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
    """A value as it stands in TOML; a bare word is a string."""
    try:
        found = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text.strip()
    return found["value"] if found.keys() == {"value"} else text.strip()


def set_value(table: dict[str, Any], key: list[str], value: Any, where: str) -> None:
    """Set a key of nested tables, which are made where they are missing.

    Raises
        ColdstillError: the key goes through a value that is no table
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


def keys_at(place: list[str]) -> list[str]:
    """The keys of the recipe's table at `place`."""
    kind: Any = Recipe
    for part in place:
        if get_origin(kind) is tuple:  # of tables, whose number is `part`
            kind = get_args(kind)[0]
            continue
        kind = get_args(kind)[1] if get_origin(kind) is dict else get_type_hints(kind)[part]
        kind = _without_none(kind)
    return _fields(kind)


def student_keys() -> set[tuple[str, ...]]:
    """Every key that a student's table and the tables in it may have."""
    return set(_below(StudentTable, ()))


def _below(kind: Any, above: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    hints = get_type_hints(kind)
    for name in _fields(kind):
        yield (*above, name)
        inner = _without_none(hints[name])
        if isinstance(inner, type) and (
            dataclasses.is_dataclass(inner) or issubclass(inner, BaseModel)
        ):
            yield from _below(inner, (*above, name))


def _without_none(kind: Any) -> Any:
    if get_origin(kind) in (Union, types.UnionType):
        return next(k for k in get_args(kind) if k is not type(None))
    return kind


def _fields(kind: Any) -> list[str]:
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return list(kind.model_fields)
    return [field.name for field in dataclasses.fields(kind)]
