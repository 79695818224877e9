"""Records that notice their own damage: a JSON object with a hash of everything else in it.

A shard's bytes are hashed in its commit record; the seal does the same for the record itself and
for the manifest, where one flipped bit may leave a valid number behind.
"""

from __future__ import annotations

from typing import Any

from ..errors import ColdstillError
from ..fingerprint import json_sha256

_KEY = "seal"


def sealed(value: dict[str, Any]) -> dict[str, Any]:
    """The object with its seal: SHA-256 of the rest as JSON, sorted and without white space."""
    rest = {key: inner for key, inner in value.items() if key != _KEY}
    return {**rest, _KEY: json_sha256(rest)}


def unsealed(value: dict[str, Any]) -> dict[str, Any]:
    """The object without its seal."""
    return {key: inner for key, inner in value.items() if key != _KEY}


def expect_seal(value: dict[str, Any], where: str) -> None:
    """Raises ColdstillError unless the object is what was sealed."""
    if value.get(_KEY) != json_sha256(unsealed(value)):
        raise ColdstillError(f"{where}: damaged: its contents do not match their seal")
