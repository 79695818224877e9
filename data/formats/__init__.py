"""Formats: how columns are laid out on disk. One file per format, one line per format in `STORES`.

A format is a frozen dataclass. The manifest records exactly its fields.
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
    """An open shard. A block is the unit of a read."""

    @property
    def blocks(self) -> int:
        """Number of blocks."""

    def read(self, block: int) -> Columns:
        """One block, as views of the mapped file if the format allows it. Raises ColdstillError if
        the block is damaged or does not exist."""


class Store(Protocol):
    """Writes and opens shards in one format."""

    name: ClassVar[str]
    suffix: ClassVar[str]
    is_folder: ClassVar[bool]
    """Whether a shard is a folder of files instead of one file."""

    @classmethod
    def fitting(cls, *, compress: bool) -> Store:
        """Settings for columns to compress, or for columns that other tools can memory-map."""

    def create(self, path: Path) -> AbstractContextManager[Callable[[Columns], None]]:
        """Write a shard to an unused path. The context gives a function that adds a block.

        An empty folder may exist at the path. All blocks must have the same columns and dtypes, and
        must not change until the context ends.
        """

    def open(self, path: Path) -> Shard:
        """Open a shard without reading its data. Raises ColdstillError if it is damaged."""


STORES: dict[str, type[Store]] = {
    "arrow": ArrowStore,
    "zarr": ZarrStore,
}
