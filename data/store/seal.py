"""Records that detect their own damage: a JSON object with a hash of its other fields.

The commit record holds the hashes of a shard's bytes. The seal protects that record, and the
manifest, in which one flipped bit can leave a valid number.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import ValidationError

from ..errors import ColdstillError
from ..files import json_bytes, parse_json
from ..fingerprint import json_sha256

if TYPE_CHECKING:
    from pydantic import TypeAdapter

_Record = TypeVar("_Record")
_KEY = "seal"


def sealed(value: dict[str, Any]) -> dict[str, Any]:
    """The object with its seal: the SHA-256 of the rest as sorted JSON without white space."""
    rest = unsealed(value)
    return {**rest, _KEY: json_sha256(rest)}


def unsealed(value: dict[str, Any]) -> dict[str, Any]:
    """The object without its seal."""
    return {key: inner for key, inner in value.items() if key != _KEY}


def expect_seal(value: dict[str, Any], where: str) -> None:
    """Raise ColdstillError unless the object matches its seal."""
    if value.get(_KEY) != json_sha256(unsealed(value)):
        raise ColdstillError(f"{where}: damaged: its contents do not match their seal")


def unseal(content: bytes, where: str) -> dict[str, Any]:
    """Parse a sealed record and check its seal; raises ColdstillError if it is damaged."""
    value = parse_json(content, where)
    if not isinstance(value, dict):
        raise ColdstillError(f"{where}: not a JSON object")
    expect_seal(value, where)
    return unsealed(value)


def validated(adapter: TypeAdapter[_Record], fields: Any, where: str) -> _Record:
    """A record from the fields of its JSON object; raises ColdstillError with the wrong field."""
    try:
        # From JSON, because lists are not tuples; all other types must match.
        return adapter.validate_json(json_bytes(fields))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ColdstillError(
            f"{where}: {place}: {first['msg']} ({first['input']!r:.60})"
        ) from error
    except ValueError as error:  # numbers and text that JSON cannot hold
        raise ColdstillError(f"{where}: {error}") from error
