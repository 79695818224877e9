"""What the cache may keep: one shard of one store, or another folder of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..store.commit import ShardFile


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """What may be kept: one shard of one store."""

    key: str
    """Says which store, and which content: never the same for another."""
    address: str
    """For messages."""
    name: str
    files: tuple[ShardFile, ...]

    @property
    def bytes(self) -> int:
        """Size of all its files."""
        return sum(file.bytes for file in self.files)

    @property
    def label(self) -> str:
        """The name of its folder."""
        return f"{self.key}-{self.bytes}"
