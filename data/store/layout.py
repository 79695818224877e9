"""The names of all files in a store. No other module builds such a name."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

MANIFEST = "manifest.json"
"""Written first; without it the folder is not a store."""
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
