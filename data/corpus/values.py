"""Nested values of a row in one form, whichever format the row was read from.

A table gives every object the keys of all of its objects, loses the order of keys and mixes whole
numbers with fractions. Rows of JSON are brought to the same form, so that the same rows are the
same documents in every format.
"""

from __future__ import annotations

import contextlib
import json
import math
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from .bad_rows import BadRowError

if TYPE_CHECKING:
    from collections.abc import Iterable

_DEEPEST = 100
"""Levels of nesting that are read; a chat template and a digest recurse over them."""
_EXACT = 2**53
"""Below this a whole number is the same as an integer and as a float."""
_USUAL_ORDER = (
    "role", "content", "type", "id", "function", "name", "title", "description", "strict",
    "arguments", "parameters", "properties", "required", "text",
)  # fmt: skip
_RANK = {key: rank for rank, key in enumerate(_USUAL_ORDER)}


@dataclass(frozen=True, slots=True)
class Ambiguous:
    """What stands for a JSON object that gives two values to one key."""

    key: str


def parse_json(text: str) -> Any:
    """What JSON text stands for; an object with a key that is there twice is an `Ambiguous`.

    Raises
        ValueError: it is not valid JSON
        RecursionError: it is nested too deeply
    """
    return json.loads(text, object_pairs_hook=_object)


def parsed(value: Any) -> Any:
    """The value, or where it is a string of JSON what that stands for.

    A table whose rows have values of different shapes holds them as JSON; `datasets` writes such.
    """
    if isinstance(value, str):
        with contextlib.suppress(ValueError, RecursionError):
            return parse_json(value)
    return value


def canonical(where: str, value: Any, depth: int = 0) -> Any:
    """A value as JSON can hold it, the same from every format.

    Keys have a fixed order, and null ones are left out; whole floats become integers, decimals
    numbers, times text, and bytes the text that they encode.

    Raises
        BadRowError: a number that JSON does not have, text or bytes that are not text, or nesting
            deeper than 100 levels
    """
    if depth > _DEEPEST:
        raise BadRowError(
            "wrong_values", where, f"is nested deeper than {_DEEPEST} levels; repair it"
        )
    if isinstance(value, str):
        return checked_text(where, value)
    if isinstance(value, Ambiguous):
        raise BadRowError("wrong_values", where, f"holds {shown(value)}; repair the row")
    if value is None or isinstance(value, int):
        return value
    if isinstance(value, dict):
        pairs = {checked_text(where, str(k)): v for k, v in value.items() if v is not None}
        return {key: canonical(where, pairs[key], depth + 1) for key in sorted(pairs, key=_order)}
    if isinstance(value, list | tuple):
        return [canonical(where, part, depth + 1) for part in value]
    if isinstance(value, float | Decimal):
        return _number(where, value)
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            told = f"holds {shown(value)}, which is not text; repair the row"
            raise BadRowError("wrong_values", where, told) from error
    return str(value)


def checked_text(where: str, text: str, what: str = "a value") -> str:
    """The text, if it is any; `what` says in a message what holds it.

    Raises
        BadRowError: it has half a surrogate pair, which JSON can spell and no tokenizer reads
    """
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise BadRowError(
                "broken_text",
                where,
                f"{what} has half a surrogate pair at character {error.start}, which is not text; "
                "repair or leave out the record",
            ) from error
    return text


def shown(value: Any) -> str:
    """A value with its type, short enough for a message."""
    if isinstance(value, Ambiguous):
        return f"an object with the key {value.key!r} twice"
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 40 else text[:37] + '...'}"


def _order(key: str) -> tuple[int, str]:
    return _RANK.get(key, len(_RANK)), key


def _number(where: str, value: float | Decimal) -> int | float:
    if not math.isfinite(value):
        told = f"holds {shown(value)}, which is not a number of JSON; repair the row"
        raise BadRowError("wrong_values", where, told)
    number = float(value)
    if number.is_integer() and (isinstance(value, Decimal) or abs(number) < _EXACT):
        return int(value)
    return number


def _object(pairs: list[tuple[str, Any]]) -> Any:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    keys = [key for key, _ in pairs]
    return Ambiguous(next(key for key in found if keys.count(key) > 1))


def printable(names: Iterable[Any]) -> str:
    """Names of columns or keys for a message, or "none"."""
    texts = (str(name) for name in names)
    return ", ".join(text if text.isprintable() else ascii(text) for text in texts) or "none"
