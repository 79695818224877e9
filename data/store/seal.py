"""Records that detect their own damage: a JSON object with a hash of its other fields.

The commit record holds the hashes of a shard's bytes. The seal protects that record, and the
manifest, in which one flipped bit can leave a valid number.
"""

from __future__ import annotations

from typing import Any

from ..errors import ColdstillError
from ..files import parse_json
from ..fingerprint import json_sha256

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
