"""Where a store is: a folder of this machine, or one in an object store.

Everything that reads or writes a store goes through a place, and names what it means by a relative
name with `/` between its parts (`data.store.layout`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from ..errors import DamageError
from ..fingerprint import file_sha256

if TYPE_CHECKING:
    import contextlib
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from ..store.commit import Commit, ShardFile


class Place(Protocol):
    """A folder of files. What is written under a name is there whole or not at all."""

    @property
    def room(self) -> int | None:
        """How many bytes of shards it keeps at hand at a time; None for all of them."""
        ...

    def __str__(self) -> str:
        """The path or address, as the user gave it."""
        ...

    def path(self, name: str) -> str:
        """What to call one file of it in a message."""
        ...

    def exists(self, name: str) -> bool:
        """Whether a file or folder is there."""
        ...

    def names(self, folder: str) -> set[str]:
        """The names directly inside a folder; none if it is not there."""
        ...

    def sizes(self, folder: str) -> dict[str, int]:
        """Every file in a folder, at any depth, by its name from here."""
        ...

    def read(self, name: str) -> bytes:
        """A small file; raises FileNotFoundError if it is not there."""
        ...

    def write(self, name: str, content: bytes) -> None:
        """A small file, in place of what was there."""
        ...

    def scratch(self) -> contextlib.AbstractContextManager[Path]:
        """A local folder to make something in before it is adopted; gone afterwards."""
        ...

    def adopt(self, made: Path, name: str) -> None:
        """Move a finished local file or folder to `name`, in place of what was there."""
        ...

    def remove(self, name: str) -> None:
        """Delete a file or folder; no error if it is not there."""
        ...

    def lock(self) -> contextlib.AbstractContextManager[None]:
        """Be the only writer; raises ColdstillError if another process is."""
        ...

    def join(self, begin: Callable[[bool], None]) -> contextlib.AbstractContextManager[None]:
        """Be one of several writers, who share the work by `claim`.

        begin  called first, while nobody else begins; told whether nobody else writes at all

        Raises
            ColdstillError: a process is writing that has to be the only one
        """
        ...

    def claim(self, name: str) -> contextlib.AbstractContextManager[bool]:
        """Be the only one at a piece of work; False if another process is."""
        ...

    def clear(self) -> None:
        """Delete what interrupted writes and dead writers left. Only while nobody else writes."""
        ...

    def folder(self, name: str) -> Path:
        """A small folder (the tokenizer) as a local one."""
        ...

    def shard(self, commit: Commit, name: str) -> Path:
        """A shard as a local file or folder whose content is what was committed.

        Raises
            DamageError: a file is missing, or not what was written (which)
        """
        ...

    def reading(self, commit: Commit, name: str) -> contextlib.AbstractContextManager[bool]:
        """Keep a shard where it is while a block of it is read.

        False if it is no longer what `shard` gave: it must be asked for again.
        """
        ...

    def prefetch(self, wanted: Iterable[tuple[Commit, str, int]]) -> None:
        """Shards that will be wanted soon, in this order, each with how many are in use from its
        first use on. They may be asked for one by one, later, and by another thread."""
        ...


def expect_whole(made: Path, files: Iterable[ShardFile], where: str) -> None:
    """Compare every byte of a local shard with its commit record.

    where  its path or address, for messages

    Raises
        DamageError: a file is missing, or not what was written (which)
    """
    for file in files:
        path = made / file.name if file.name else made
        address = file.path(where)
        expect_size(address, path.stat().st_size if path.is_file() else None, file)
        # without one, nobody has said what its content should be
        if file.sha256 and file_sha256(path) != file.sha256:
            raise DamageError(
                f"{address}: damaged: its checksum is not the one it was written with; {REPAIR}"
            )


def expect_size(path: str, size: int | None, file: ShardFile) -> None:
    """Raises DamageError unless a file of a shard has the size that was committed.

    size  what it has, or None if it is not there
    """
    if size is None:
        raise DamageError(f"{path}: damaged: missing; {REPAIR}")
    if size != file.bytes:
        raise DamageError(
            f"{path}: damaged: {size} bytes, its commit record says {file.bytes}; {REPAIR}"
        )


REPAIR = "run coldstill store repair, then teacher-logits again"
