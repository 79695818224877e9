"""The names of all files in a store, and the seal of its records.

A record is a JSON object with a hash of its other fields. The commit record holds the hashes of a
shard's bytes. The seal protects that record, and the manifest, in which one flipped bit can leave a
valid number.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import ValidationError

from ..errors import ColdstillError
from ..files import json_bytes, json_sha256, parse_json

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pydantic import TypeAdapter

MANIFEST = "manifest.json"
"""Without it the folder is not a store."""
TOKENIZER = "tokenizer"
"""A folder that `transformers` and `tokenizers` can load."""
TOKENIZER_FILES = "tokenizer.files.json"
"""The record of the tokenizer's files, with their hashes."""
SHARDS = "shards"
"""The folder of the shards and their commit records."""
MEASUREMENTS = "measurements.json"
"""Speed and memory of the capturing run; informative only."""
LOCK = ".lock"
"""The lock of a process that writes alone."""
IMPORT = "import"
"""The folder of an import that is not finished: what was decided, and what was left out of each
shard. It is deleted once the manifest is written."""
UNFINISHED = "unfinished.json"
"""The promised manifest of a store that a program writes sequence by sequence and may continue."""
CLAIMS = "claims"
"""The folder of the locks of several writers. The last one leaves it empty. Locks of killed
processes mean nothing; the next process that is the only writer deletes them."""
STARTING = f"{CLAIMS}/starting"
"""The lock of a process that is joining the writers."""
MEMBERS = f"{CLAIMS}/member-"
"""Begins the names of the locks that each of several writers holds while it writes."""


def shard_name(index: int, suffix: str) -> str:
    """The name of a shard's data: a file, or a folder of files."""
    return f"{SHARDS}/{index:05d}{suffix}"


def commit_name(index: int) -> str:
    """The name of a shard's commit record. Written last: without it the shard does not exist."""
    return f"{SHARDS}/{index:05d}.json"


def claim_name(index: int) -> str:
    """The name of the lock of the process that makes a shard."""
    return f"{CLAIMS}/{index:05d}"


def committed(names: Iterable[str]) -> list[int]:
    """The indices of the shards with a commit record, in order, from the names in `SHARDS`."""
    stems = [name.removesuffix(".json") for name in names if name.endswith(".json")]
    indices = (int(stem) for stem in stems if stem.isascii() and stem.isdecimal())
    return sorted(i for i in indices if commit_name(i).rpartition("/")[2] in names)


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
