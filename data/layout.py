"""Where everything of a store lies. No other file builds a path inside one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class StoreLayout:
    """The names inside a store's folder."""

    root: Path

    @property
    def manifest(self) -> Path:
        """Written first; without it the folder is no store."""
        return self.root / "manifest.json"

    @property
    def tokenizer(self) -> Path:
        """A folder that `transformers` and `tokenizers` load."""
        return self.root / "tokenizer"

    @property
    def shards(self) -> Path:
        """The folder of the data."""
        return self.root / "shards"

    @property
    def measurements(self) -> Path:
        """What the capturing run measured of itself (speed, memory); no part of the record."""
        return self.root / "measurements.json"

    @property
    def lock(self) -> Path:
        """Held by the process that writes."""
        return self.root / ".lock"

    def shard(self, index: int, suffix: str) -> Path:
        """The data of one shard."""
        return self.shards / f"{index:05d}{suffix}"

    def commit(self, index: int) -> Path:
        """Its commit record, written last: without it the shard does not exist."""
        return self.shards / f"{index:05d}.json"

    def committed(self) -> list[int]:
        """Which commit records are there, in order."""
        names = [path.stem for path in self.shards.glob("*.json")]
        indices = [int(name) for name in names if name.isdecimal()]
        return sorted(index for index in indices if self.commit(index).exists())
