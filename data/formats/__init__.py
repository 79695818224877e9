"""How columns lie on disk. One file a store, one line below.

A store is a frozen dataclass: its fields are exactly what the manifest records about it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Protocol

from .arrow import ArrowStore
from .zarr import ZarrStore

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from pathlib import Path

    from ..columns import Columns


class Shard(Protocol):
    """One open shard; a block is the unit of a read."""

    @property
    def blocks(self) -> int:
        """How many blocks it holds."""
        ...

    def read(self, block: int) -> Columns:
        """One block, as views of the mapped file where the format allows it.

        Raises
            ColdstillError: it is damaged, or there is no such block
        """
        ...


class Store(Protocol):
    """Writes and opens shards."""

    name: ClassVar[str]
    suffix: ClassVar[str]
    is_folder: ClassVar[bool]
    """Whether a shard is a folder of files rather than one file."""

    @classmethod
    def fitting(cls, *, compress: bool) -> Store:
        """The settings for columns that compress well, or for those that other tools should map."""
        ...

    def create(self, path: Path) -> AbstractContextManager[Callable[[Columns], None]]:
        """Write a shard at a path that is nobody's yet: gives a function that adds a block.

        A folder may already be there if it is empty. Blocks have the same columns, of the same
        types, and stay unchanged until the context ends.
        """
        ...

    def open(self, path: Path) -> Shard:
        """Open a shard without reading its data; raises ColdstillError if it is damaged."""
        ...


STORES: dict[str, type[Store]] = {
    "arrow": ArrowStore,
    "zarr": ZarrStore,
}
