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
"""Held by the process that writes."""


def shard_name(index: int, suffix: str) -> str:
    """The data of one shard: a file, or a folder of files."""
    return f"{SHARDS}/{index:05d}{suffix}"


def commit_name(index: int) -> str:
    """Its commit record, written last: without it the shard does not exist."""
    return f"{SHARDS}/{index:05d}.json"


def committed(names: Iterable[str]) -> list[int]:
    """Which shards have a commit record, in order, from the names in the folder of the data."""
    stems = [name.removesuffix(".json") for name in names if name.endswith(".json")]
    indices = (int(stem) for stem in stems if stem.isascii() and stem.isdecimal())
    return sorted(i for i in indices if commit_name(i).rpartition("/")[2] in names)
