"""A store in a folder of this machine, or of a disk that several machines share."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from typing import TYPE_CHECKING

from ..errors import ColdstillError
from ..files import SCRATCH_PREFIX, remove_scratch, sync_tree, told_where, whole_file
from ..store.layout import CLAIMS
from .claims import claimed
from .place import expect_whole
from .writers import HeldError, Writers

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from ..store.commit import Commit


class LocalPlace(Writers):
    """A folder of files (`Place`)."""

    room: int | None = None

    def __init__(self, root: Path) -> None:
        """Name the folder; nothing is read or created."""
        super().__init__(_FileLocks(self))
        self.root = root

    def __str__(self) -> str:
        """The path."""
        return str(self.root)

    def path(self, name: str) -> str:
        """The path of one file."""
        return str(self.root / name)

    def exists(self, name: str) -> bool:
        """Whether the file or folder exists."""
        return (self.root / name).exists()

    def names(self, folder: str) -> set[str]:
        """The names directly inside a folder."""
        try:
            return set(os.listdir(self.root / folder))
        except (FileNotFoundError, NotADirectoryError):
            return set()

    def sizes(self, folder: str) -> dict[str, int]:
        """The size in bytes of every file in a folder, at any depth."""
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
        """The content of a small file."""
        return (self.root / name).read_bytes()

    def write(self, name: str, content: bytes) -> None:
        """Write a small file under a scratch name, then rename it."""
        with whole_file(self.root / name) as scratch:
            scratch.write_bytes(content)

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """A temporary folder on the same disk, so that `adopt` only renames."""
        folder = self.root / f"{SCRATCH_PREFIX}{secrets.token_hex(4)}"
        with told_where(self.root):
            folder.mkdir(parents=True)
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)

    def adopt(self, made: Path, name: str) -> None:
        """Write the file or folder to the disk (fsync), then rename it."""
        target = self.root / name
        with told_where(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            sync_tree(made)
            if target.is_dir():  # left by a crash or being replaced: no commit record refers to it
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

    def clear(self) -> None:
        """Delete scratch files here and one level below, and claims of dead processes."""
        remove_scratch(self.root)
        for name in self.names("."):
            if (self.root / name).is_dir():
                remove_scratch(self.root / name)
        self.clear_claims()

    def folder(self, name: str) -> Path:
        """The folder itself."""
        return self.root / name

    def shard(self, commit: Commit, name: str) -> Path:
        """The file or folder itself, after comparing every byte with the commit record."""
        expect_whole(self.root / name, commit.files, self.path(name))
        return self.root / name

    def reading(self, commit: Commit, name: str) -> contextlib.AbstractContextManager[bool]:
        """Always True: the shard stays where it is."""
        return contextlib.nullcontext(True)

    def prefetch(self, wanted: Iterable[tuple[Commit, str, int]]) -> None:
        """Do nothing: the operating system reads ahead."""


class _FileLocks:
    """Lock files in a store's folder (`Locks`)."""

    def __init__(self, place: LocalPlace) -> None:
        self._place = place
        self.names = place.names

    @contextlib.contextmanager
    def hold(self, name: str, *, wait: bool = False) -> Iterator[None]:
        """Hold the lock file `name`."""
        root = self._place.root
        if root.exists() and not root.is_dir():
            raise ColdstillError(f"{root}: a file, where a store's folder should be")
        try:
            with claimed(root / name, wait=wait) as mine:
                if not mine:
                    raise HeldError(f"{root}: another process is writing this store; wait for it")
                yield
        finally:
            with contextlib.suppress(OSError):  # another process holds a claim in it
                (root / CLAIMS).rmdir()

    def expect_free(self, name: str) -> None:
        """Raise HeldError if the lock file `name` is locked, and delete it otherwise."""
        if (self._place.root / name).is_file():
            with self.hold(name):
                pass

    def remove(self, name: str) -> None:
        """Do nothing: `expect_free` has deleted the file."""
