"""Where everything of a store lies. No other file builds a name inside one."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

MANIFEST = "manifest.json"
"""Written first; without it the folder is no store."""
TOKENIZER = "tokenizer"
"""A folder that `transformers` and `tokenizers` load."""
TOKENIZER_FILES = "tokenizer.files.json"
"""The hash of each of its files."""
SHARDS = "shards"
"""The folder of the data."""
MEASUREMENTS = "measurements.json"
"""What the capturing run measured of itself (speed, memory); no part of the record."""
LOCK = ".lock"
"""Held by the process that writes, or by all that write together."""
CLAIMS = "claims"
"""What each of several writers is at; nothing is left in it once they are done. What killed ones
left means nothing, and goes when somebody writes alone or comes first."""
STARTING = f"{CLAIMS}/starting"
"""Held by the writer that is just joining the others."""
MEMBERS = f"{CLAIMS}/member-"
"""Begins the names that writers of a distant store hold as long as they take part."""


def shard_name(index: int, suffix: str) -> str:
    """The data of one shard: a file, or a folder of files."""
    return f"{SHARDS}/{index:05d}{suffix}"


def commit_name(index: int) -> str:
    """Its commit record, written last: without it the shard does not exist."""
    return f"{SHARDS}/{index:05d}.json"


def claim_name(index: int) -> str:
    """Held by the process that makes this shard."""
    return f"{CLAIMS}/{index:05d}"


def committed(names: Iterable[str]) -> list[int]:
    """Which shards have a commit record, in order, from the names in the folder of the data."""
    stems = [name.removesuffix(".json") for name in names if name.endswith(".json")]
    indices = (int(stem) for stem in stems if stem.isascii() and stem.isdecimal())
    return sorted(i for i in indices if commit_name(i).rpartition("/")[2] in names)
