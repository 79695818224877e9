"""The commit record of a shard, without which the shard does not exist."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field, TypeAdapter

from ..errors import ColdstillError
from ..files import json_bytes, parse_json
from ..fingerprint import file_sha256
from .seal import expect_seal, sealed, unseal, unsealed, validated
from .statistics import ShardStatistics

if TYPE_CHECKING:
    from pathlib import Path

_Count = Annotated[int, Field(ge=0, le=2**62)]
_STRICT: Any = {"extra": "forbid", "strict": True}
# A name inside the shard's folder, never outside; empty if the shard is one file.
_PART = r"[A-Za-z0-9_-][A-Za-z0-9_.-]*"
_Name = Annotated[str, Field(pattern=rf"^({_PART}(/{_PART})*)?$", max_length=200)]
_Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardFile:
    """One file of a shard's data."""

    __pydantic_config__: ClassVar[Any] = _STRICT
    name: _Name
    """The name in the shard's folder, or "" if the shard is one file."""
    bytes: _Count
    sha256: _Sha256

    def path(self, shard: str) -> str:
        """The file's name in the store, for a shard named `shard`."""
        return f"{shard}/{self.name}" if self.name else shard


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """Counts, checksums and statistics of one shard."""

    __pydantic_config__: ClassVar[Any] = _STRICT
    shard: _Count
    sequences: _Count
    documents: _Count
    """Number of documents; one that was cut counts once per piece."""
    tokens: _Count
    positions: _Count
    files: Annotated[tuple[ShardFile, ...], Field(min_length=1)]
    """The files of the shard, sorted by name."""
    statistics: ShardStatistics

    @property
    def bytes(self) -> int:
        """Size of all its files."""
        return sum(file.bytes for file in self.files)


_COMMIT = TypeAdapter(Commit)
_FILES = TypeAdapter(tuple[ShardFile, ...])


def shard_files(made: Path) -> tuple[ShardFile, ...]:
    """The files of a finished file or folder, with sizes and hashes."""
    inner = sorted(path for path in made.rglob("*") if path.is_file()) if made.is_dir() else [made]
    return tuple(
        ShardFile(
            name="" if path == made else path.relative_to(made).as_posix(),
            bytes=path.stat().st_size,
            sha256=file_sha256(path),
        )
        for path in inner
    )


def files_json(files: tuple[ShardFile, ...]) -> bytes:
    """The content of a record of files outside shards: those of the tokenizer."""
    return json_bytes(sealed({"files": [asdict(file) for file in files]}))


def parse_files(content: bytes, where: str) -> tuple[ShardFile, ...]:
    """Parse a record of files; raises ColdstillError if it is damaged."""
    return validated(_FILES, unseal(content, where).get("files"), where)


def commit_json(commit: Commit) -> bytes:
    """The content of a commit record."""
    return json_bytes(sealed(asdict(commit)))


def parse_commit(content: bytes, where: str) -> Commit:
    """Parse a commit record; raises ColdstillError if it is damaged."""
    value = parse_json(content, where)
    if not isinstance(value, dict):
        raise ColdstillError(f"{where}: not a commit record")
    commit = validated(_COMMIT, unsealed(value), where)
    expect_seal(value, where)
    return commit
