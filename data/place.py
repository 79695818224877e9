"""Where a store is: a folder of this machine, or one in an object store.

Everything that reads or writes a store goes through a place, and names what it means by a relative
name with `/` between its parts (`data.layout`).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from .errors import ColdstillError, DamageError
from .files import SCRATCH_PREFIX, remove_scratch, sync_tree, told_where, whole_file
from .fingerprint import file_sha256
from .layout import LOCK

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from .cache_settings import CacheSettings
    from .commit import Commit, ShardFile


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

    def clear(self) -> None:
        """Delete what interrupted writes left behind. Only while holding the lock."""
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


def place_at(path: str | Path, cache: CacheSettings | None = None) -> Place:
    """The place that a path or address names: `runs/demo/logits`, `s3://bucket/store`.

    cache  where shards of distant stores are kept, and how many of them
    """
    # a Path has lost one of the two slashes; two letters or more, or it would be a drive
    protocol, colon, rest = str(path).partition(":/")
    if not colon or not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.:-]+", protocol):
        return LocalPlace(Path(path))
    rest = rest.removeprefix("/")
    if protocol == "file":
        return LocalPlace(Path("/", rest))
    from .remote import RemotePlace

    return RemotePlace(f"{protocol}://{rest}", cache)


class LocalPlace:
    """A folder of this machine."""

    room: int | None = None

    def __init__(self, root: Path) -> None:
        """Name it; nothing is touched."""
        self.root = root

    def __str__(self) -> str:
        """The path."""
        return str(self.root)

    def path(self, name: str) -> str:
        """The path of one file."""
        return str(self.root / name)

    def exists(self, name: str) -> bool:
        """Whether a file or folder is there."""
        return (self.root / name).exists()

    def names(self, folder: str) -> set[str]:
        """The names directly inside a folder."""
        try:
            return set(os.listdir(self.root / folder))
        except (FileNotFoundError, NotADirectoryError):
            return set()

    def sizes(self, folder: str) -> dict[str, int]:
        """Every file in a folder, at any depth."""
        found: dict[str, int] = {}
        folders = [folder]
        while folders:
            inside = folders.pop()
            try:
                entries = os.scandir(self.root / inside)
            except (FileNotFoundError, NotADirectoryError):
                continue
            with entries:
                for entry in entries:
                    if entry.is_dir():
                        folders.append(f"{inside}/{entry.name}")
                    else:
                        found[f"{inside}/{entry.name}"] = entry.stat().st_size
        return found

    def read(self, name: str) -> bytes:
        """A small file."""
        return (self.root / name).read_bytes()

    def write(self, name: str, content: bytes) -> None:
        """A small file, by scratch name and rename."""
        with whole_file(self.root / name) as scratch:
            scratch.write_bytes(content)

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """A folder on the same disk, so that adopting is a rename."""
        folder = self.root / f"{SCRATCH_PREFIX}{secrets.token_hex(4)}"
        with told_where(self.root):
            folder.mkdir(parents=True)
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)

    def adopt(self, made: Path, name: str) -> None:
        """Bring it to the disk (fsync), then rename it."""
        target = self.root / name
        with told_where(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            sync_tree(made)
            if target.is_dir():  # of a crash, or being replaced: no commit record speaks of it
                shutil.rmtree(target)
            made.replace(target)
            sync_tree(target.parent, contents=False)

    def remove(self, name: str) -> None:
        """Delete a file or folder."""
        target = self.root / name
        with told_where(target):
            if target.is_dir():
                shutil.rmtree(target)
            else:
                target.unlink(missing_ok=True)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """An advisory lock of the system, which a killed process cannot leave behind."""
        with told_where(self.root):
            if self.root.exists() and not self.root.is_dir():
                raise ColdstillError(f"{self.root}: a file, where a store's folder should be")
            self.root.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.root / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise ColdstillError(
                    f"{self.root}: another process is writing this store; wait for it"
                ) from error
            yield
        finally:
            os.close(descriptor)

    def clear(self) -> None:
        """Delete scratch names, here and one level below."""
        remove_scratch(self.root)
        for name in self.names("."):
            if (self.root / name).is_dir():
                remove_scratch(self.root / name)

    def folder(self, name: str) -> Path:
        """The folder itself."""
        return self.root / name

    def shard(self, commit: Commit, name: str) -> Path:
        """The file or folder itself, after comparing every byte with the commit record."""
        expect_whole(self.root / name, commit.files, self.path(name))
        return self.root / name

    def reading(self, commit: Commit, name: str) -> contextlib.AbstractContextManager[bool]:
        """It stays where it is."""
        return contextlib.nullcontext(True)

    def prefetch(self, wanted: Iterable[tuple[Commit, str, int]]) -> None:
        """Nothing to do: the system reads ahead."""


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
