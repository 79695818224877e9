"""The tables of a recipe as data, and the recipe reference that is made from them.

`python -m coldstill.pipeline.recipe.reference FILE` renews the reference in a Markdown file.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import inspect
import re
import sys
import textwrap
import types
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from tabulate import tabulate

from ...data.errors import ColdstillError
from ...data.files import whole_file
from ...stages.config import InRecipe
from .tables import Recipe, StudentTable

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


REQUIRED = "required"
"""Default of a key that has none."""
_WORDS = {bool: "true or false", int: "integer", float: "number", str: "string"}
_BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    name: str
    values: str
    """Accepted values in words: `integer at least 1`."""
    default: str
    """Default value as TOML, `unset`, or `required`."""
    meaning: str
    below: str
    """Keys below this one start with it: empty, `.`, or `.NAME.` where users choose a name."""
    table: type | None
    """Class of the table that this key holds, if any."""
    is_list: bool
    """Whether the value is a list."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TableKind:
    """One kind of table; it can stand at several places of a recipe."""

    places: tuple[str, ...]
    """Dotted names, such as `teacher.train`; empty for the top level."""
    meaning: str
    keys: tuple[Key, ...]


@functools.cache
def table_kinds() -> tuple[TableKind, ...]:
    """Return every kind of table, each after the table that first holds it."""
    places: dict[type, list[str]] = {}

    def visit(kind: type, place: str) -> None:
        places.setdefault(kind, []).append(place)
        for key in keys_of(kind):
            if key.table is not None:
                name = f"{place}.{key.name}".lstrip(".")
                visit(key.table, name + key.below.removesuffix("."))

    visit(Recipe, "")
    return tuple(
        TableKind(places=_shortened(at), meaning=_sentence(kind.__doc__ or ""), keys=keys_of(kind))
        for kind, at in places.items()
    )


def _shortened(places: list[str]) -> tuple[str, ...]:
    """Return the places of a table; `PARENT.KEY` stands for many keys of one parent."""
    below: dict[str, list[str]] = {}
    for place in places:
        below.setdefault(place.rpartition(".")[0], []).append(place)
    found: list[str] = []
    for parent, own in below.items():
        found += [f"{parent}.KEY"] if len(own) > 3 else own
    return tuple(found)


@functools.cache
def keys_of(kind: type) -> tuple[Key, ...]:
    """Return the keys of a table's class in the order of its definition."""
    hints = get_type_hints(kind, include_extras=True)
    meanings = _meanings(kind)
    return tuple(
        Key(
            name=name,
            values=_in_words(hints[name]),
            default=default,
            meaning=meanings[name],
            below=_below(hints[name]),
            table=_table_in(hints[name]),
            is_list=_is_list(hints[name]),
        )
        for name, default in _defaults(kind).items()
    )


def names_at(place: list[str]) -> list[str]:
    """Return the names of the keys in the table at `place`; numbers of list items are skipped."""
    kind: type = Recipe
    parts = iter(place)
    for part in parts:
        key = next((key for key in keys_of(kind) if key.name == part), None)
        if key is None or key.table is None:
            continue  # the number of a list item
        kind = key.table
        if key.below == ".NAME.":
            next(parts, None)
    return [key.name for key in keys_of(kind)]


@functools.cache
def student_keys() -> frozenset[tuple[str, ...]]:
    """Return every key of a student's table and its plain tables that a sweep can vary; it refuses
    `rounds`."""

    def below(kind: type, above: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        for key in keys_of(kind):
            yield (*above, key.name)
            if key.table is not None and not key.is_list:
                yield from below(key.table, (*above, key.name))

    return frozenset(key for key in below(StudentTable, ()) if key[0] != "rounds")


def _defaults(kind: type) -> dict[str, str]:
    if issubclass(kind, BaseModel):
        return {
            name: REQUIRED
            if info.is_required()
            else _toml(info.get_default(call_default_factory=True))
            for name, info in kind.model_fields.items()
        }
    assert dataclasses.is_dataclass(kind)
    found = {}
    for field in dataclasses.fields(kind):
        default: Any = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        found[field.name] = REQUIRED if default is dataclasses.MISSING else _toml(default)
    return found


def _toml(value: Any) -> str:
    if value is None:
        return "unset"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    return (
        "{}"
        if isinstance(value, dict | BaseModel) or dataclasses.is_dataclass(value)
        else f"{value}"
    )


def _meanings(kind: type) -> dict[str, str]:
    """Return the strings that stand below the fields in the source."""
    [definition] = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for node, after in zip(definition.body, definition.body[1:], strict=False):
        match node, after:
            case ast.AnnAssign(target=ast.Name(name)), ast.Expr(value=ast.Constant(str(text))):
                found[name] = _sentence(text)
    return found


def _sentence(text: str) -> str:
    return " ".join(text.split())


def _without_none(hint: Any) -> list[Any]:
    if get_origin(hint) in (Union, types.UnionType):
        return [inner for inner in get_args(hint) if inner is not types.NoneType]
    return [hint]


def _in_words(hint: Any) -> str:
    """Return what a recipe accepts for this type."""
    if get_origin(hint) is Annotated:
        inner, *metadata = get_args(hint)
        written = next((item.text for item in metadata if isinstance(item, InRecipe)), None)
        return written or _in_words(inner) + _bounds(metadata)
    kinds = _without_none(hint)
    if len(kinds) > 1:
        return " or ".join(map(_in_words, kinds))
    [kind] = kinds
    if kind is not hint:
        return _in_words(kind)
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(f'"{value}"' for value in get_args(kind))
    if get_origin(kind) is tuple:
        inner = _in_words(get_args(kind)[0])
        return f"list of {inner.partition(' ')[0]}s{inner.removeprefix(inner.partition(' ')[0])}"
    return _WORDS.get(kind, "table")


def _bounds(metadata: list[Any]) -> str:
    limits = [limit for item in metadata if isinstance(item, FieldInfo) for limit in item.metadata]
    parts = [
        f"{word} {getattr(limit, name):g}" if abs(getattr(limit, name)) < 1e6 else ""
        for limit in limits
        for name, word in _BOUNDS.items()
        if getattr(limit, name, None) is not None
    ]
    found = " and ".join(part for part in parts if part)
    return f" {found}" if found else ""


def _table_in(hint: Any) -> type | None:
    """Return the class of the table that a key of this type holds."""
    if get_origin(hint) is Annotated or get_origin(hint) is tuple:
        return _table_in(get_args(hint)[0])
    if get_origin(hint) is dict:
        return _table_in(get_args(hint)[1])
    kinds = _without_none(hint)
    if len(kinds) > 1 or kinds[0] is not hint:
        return next((found for kind in kinds if (found := _table_in(kind))), None)
    is_table = isinstance(hint, type) and (
        dataclasses.is_dataclass(hint) or issubclass(hint, BaseModel)
    )
    return hint if is_table else None


def _is_list(hint: Any) -> bool:
    if get_origin(hint) is Annotated:
        return _is_list(get_args(hint)[0])
    return any(get_origin(kind) is tuple for kind in _without_none(hint))


def _below(hint: Any) -> str:
    if _table_in(hint) is None:
        return ""
    return ".NAME." if get_origin(hint) is dict else "."


BEGIN, END = "<!-- recipe reference: begin -->", "<!-- recipe reference: end -->"
RENEW = "python -m coldstill.pipeline.recipe.reference"
_WIDTH = 100
_TOP = "recipe"
"""Title of the top level, which has no name of its own."""


def overview() -> str:
    """Return all tables for a terminal: their meaning and the names of their keys."""
    blocks = []
    for table in table_kinds():
        names = ", ".join(key.name for key in table.keys)
        blocks.append("\n".join([_title(table), *_wrapped(table.meaning, 2), *_wrapped(names, 4)]))
    more = "coldstill recipe-help KEY explains one table or key, such as corpus or train.steps."
    return "\n\n".join([*blocks, more])


def explained(name: str) -> str:
    """Return the table or key of this name for a terminal, with types, defaults and meanings.

    name  a whole name such as `students.small.train.steps`, or the end of one such as `steps`; an
          end that several tables share shows all of them

    Raises
        ColdstillError: unknown name; the message has the nearest one
    """
    wanted = re.sub(r"^students\.[^.]+", "students.NAME", name)
    found = [
        _table_text(t) for t in table_kinds() if any(_ends(place, wanted) for place in t.places)
    ]
    for table in table_kinds():
        table_of, _, key_name = wanted.rpartition(".")
        if any(_ends(place, table_of) for place in table.places):
            found += [
                "\n".join([_title(table), *_key_lines(key)])
                for key in table.keys
                if key.name == key_name
            ]
    if found:
        return "\n\n".join(found)
    keys = {key.name for table in table_kinds() for key in table.keys}
    places = {place for table in table_kinds() for place in table.places if place}
    whole = {
        f"{place}.{key.name}"
        for table in table_kinds()
        for place in table.places
        for key in table.keys
    }
    last = name.rpartition(".")[2]
    near = difflib.get_close_matches(name, whole | places, 1, cutoff=0.7)
    near = near or difflib.get_close_matches(last, keys, 1)
    guess = f"; did you mean '{near[0]}'?" if near else ""
    raise ColdstillError(
        f"recipe-help: a recipe has no table or key '{name}'{guess} (coldstill recipe-help lists "
        "all of them)"
    )


def markdown() -> str:
    parts = []
    for table in table_kinds():
        rows = [
            (f"`{key.name}`", *map(_escaped, (key.values, f"`{key.default}`", key.meaning)))
            for key in table.keys
        ]
        body = tabulate(rows, ("key", "value", "default", "meaning"), "pipe", disable_numparse=True)
        compact = re.sub(r" {2,}", " ", re.sub(r"-{4,}", "---", body))
        title = ", ".join(f"`{place}`" for place in table.places if place) or "Top level"
        parts.append(f"### {title}\n\n{table.meaning}\n\n{compact}\n")
    return "\n".join(parts)


def renewed(text: str) -> str:
    """Return a Markdown page with the reference between its two markers.

    Raises
        ColdstillError: the page lacks the markers
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ColdstillError(f"no recipe reference in this page: it needs {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{markdown()}\n{END}{after}"


def _title(table: TableKind) -> str:
    return ", ".join(table.places) or _TOP


def _ends(place: str, wanted: str) -> bool:
    """Return whether a name is the whole name of a table or its last parts."""
    return not wanted or f".{place or _TOP}".endswith(f".{wanted}")


def _table_text(table: TableKind) -> str:
    lines = [_title(table), *_wrapped(table.meaning, 2)]
    for key in table.keys:
        lines += ["", *_key_lines(key)]
    return "\n".join(lines)


def _key_lines(key: Key) -> list[str]:
    default = key.default if key.default in ("required", "unset") else f"default {key.default}"
    return [f"  {key.name}: {key.values}; {default}", *_wrapped(key.meaning, 6)]


def _wrapped(text: str, indent: int) -> list[str]:
    blanks = " " * indent
    return textwrap.wrap(text, _WIDTH, initial_indent=blanks, subsequent_indent=blanks)


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


def main(arguments: Sequence[str]) -> None:
    """Renew the reference in the Markdown files that are named."""
    for name in arguments:
        path = Path(name)
        text = renewed(path.read_text(encoding="utf-8"))
        with whole_file(path) as scratch:
            scratch.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
