"""Brings nested values of a row to one form, so that equal rows of all formats are equal documents.

A table gives each object the keys of all its objects, loses the order of keys, and mixes integers
with floats. Rows of JSON are brought to the same form.
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
"""The deepest nesting that is read, as chat templates and digests recurse."""
_EXACT = 2**53
"""Below this an integer and a float of the same value are equal."""
_USUAL_ORDER = (
    "role", "content", "type", "id", "function", "name", "title", "description", "strict",
    "arguments", "parameters", "properties", "required", "text",
)  # fmt: skip
_RANK = {key: rank for rank, key in enumerate(_USUAL_ORDER)}


@dataclass(frozen=True, slots=True)
class Ambiguous:
    """Replaces a JSON object that has a key twice."""

    key: str


def parse_json(text: str) -> Any:
    """Parse JSON; an object that has a key twice becomes an `Ambiguous`.

    Raises
        ValueError: the text is not valid JSON
        RecursionError: the value is nested too deeply
    """
    return json.loads(text, object_pairs_hook=_object)


def parsed(value: Any) -> Any:
    """The value, parsed if it is a text with JSON.

    A table whose values have different types holds them as JSON, as `datasets` writes it.
    """
    if isinstance(value, str):
        with contextlib.suppress(ValueError, RecursionError):
            return parse_json(value)
    return value


def canonical(where: str, value: Any, depth: int = 0) -> Any:
    """A value as JSON can hold it, equal for all formats.

    Keys have a fixed order without null values. Integral floats become integers, decimals numbers,
    times text, and bytes the text that they encode.

    Raises
        BadRowError: the value holds a number that JSON cannot hold, text or bytes that are not
            valid text, or more than 100 levels of nesting
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
            fault = f"holds {shown(value)}, which is not text; repair the row"
            raise BadRowError("wrong_values", where, fault) from error
    return str(value)


def checked_text(where: str, text: str, what: str = "a value") -> str:
    """The text, if it is valid; `what` names its holder in a message.

    Raises
        BadRowError: it has half a surrogate pair, which JSON allows but no tokenizer reads
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
    """A value with its type, shortened for a message."""
    if isinstance(value, Ambiguous):
        return f"an object with the key {value.key!r} twice"
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 40 else text[:37] + '...'}"


def _order(key: str) -> tuple[int, str]:
    return _RANK.get(key, len(_RANK)), key


def _number(where: str, value: float | Decimal) -> int | float:
    if not math.isfinite(value):
        fault = f"holds {shown(value)}, which is not a number of JSON; repair the row"
        raise BadRowError("wrong_values", where, fault)
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
    """Names of columns or keys for a message; `none` if there are none."""
    texts = (str(name) for name in names)
    return ", ".join(text if text.isprintable() else ascii(text) for text in texts) or "none"
