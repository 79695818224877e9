"""Where a store is: a folder of this machine, or one in an object store.

Everything that reads or writes a store goes through a place, and names files by relative names with
`/` between their parts (`data.store.layout`).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from .local import LocalPlace
from .remote import RemotePlace

if TYPE_CHECKING:
    import contextlib
    from collections.abc import Callable, Iterable

    from ..store.commit import Commit
    from .cache import CacheSettings


class Place(Protocol):
    """A folder of files. A file that was written under a name is whole."""

    @property
    def room(self) -> int | None:
        """Most bytes of shards on this machine at a time; None if all are here."""

    def __str__(self) -> str:
        """The path or address, as the user gave it, without a password."""

    def path(self, name: str) -> str:
        """The path or address of one file, for messages."""

    def exists(self, name: str) -> bool:
        """Whether the file or folder exists."""

    def names(self, folder: str) -> set[str]:
        """The names directly inside a folder; empty if the folder does not exist."""

    def sizes(self, folder: str) -> dict[str, int]:
        """The size in bytes of every file in a folder, at any depth, by its name in this place."""

    def read(self, name: str) -> bytes:
        """The content of a small file; raises FileNotFoundError if it does not exist."""

    def write(self, name: str, content: bytes) -> None:
        """Write a small file, replacing an existing one."""

    def scratch(self) -> contextlib.AbstractContextManager[Path]:
        """A temporary local folder for a file or folder that will be adopted."""

    def adopt(self, made: Path, name: str) -> None:
        """Move a finished local file or folder to `name`, replacing an existing one."""

    def remove(self, name: str) -> None:
        """Delete a file or folder; no error if it does not exist."""

    def lock(self) -> contextlib.AbstractContextManager[None]:
        """Be the only writer; raises ColdstillError if another process is writing."""

    def join(self, begin: Callable[[bool], None]) -> contextlib.AbstractContextManager[None]:
        """Be one of several writers, which share the work by `claim`.

        begin  called first, while no other process begins; its argument tells whether this process
               is the only writer now

        Raises
            ColdstillError: another process is writing alone
        """

    def claim(self, name: str) -> contextlib.AbstractContextManager[bool]:
        """Reserve a piece of work; yields False if another process has it."""

    def clear(self) -> None:
        """Delete what interrupted writes and dead writers left. Only for the only writer."""

    def folder(self, name: str) -> Path:
        """A small folder (the tokenizer) as a local folder."""

    def shard(self, commit: Commit, name: str) -> Path:
        """A shard as a local file or folder, compared with its commit record. Raises DamageError if
        a file is missing, or is not what was written (which file)."""

    def reading(self, commit: Commit, name: str) -> contextlib.AbstractContextManager[bool]:
        """Keep a shard in place while one of its blocks is read.

        Yields False if the shard is no longer the one that `shard` returned; call `shard` again.
        """

    def prefetch(self, wanted: Iterable[tuple[Commit, str, int]]) -> None:
        """Fetch shards that will be read soon, in this order.

        wanted  commit record, name, and how many shards are in use from its first use on; may be
                iterated later and in another thread
        """


def place_at(path: str | Path, cache: CacheSettings | None = None) -> Place:
    """The place that a path or address names, such as `runs/demo/logits` or `s3://bucket/store`.

    cache  where copies of shards from object stores are kept, and how many bytes of them
    """
    # A Path drops one of the two slashes. One letter before the colon is a drive.
    protocol, colon, rest = str(path).partition(":/")
    if not colon or not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.:-]+", protocol):
        return LocalPlace(Path(path))
    rest = rest.removeprefix("/")
    if protocol == "file":
        return LocalPlace(Path("/", rest))
    return RemotePlace(f"{protocol}://{rest}", cache)
