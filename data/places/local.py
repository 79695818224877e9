"""A store in a folder of this machine, or of a disk that several share."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
from typing import TYPE_CHECKING

from ..errors import ColdstillError
from ..files import SCRATCH_PREFIX, remove_scratch, sync_tree, told_where, whole_file
from ..store.layout import CLAIMS, LOCK, STARTING
from .claims import claimed, let_go, lock_file
from .place import expect_whole

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from ..store.commit import Commit


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
        with self._lock_file() as descriptor:
            self._take(descriptor, fcntl.LOCK_EX)
            yield

    @contextlib.contextmanager
    def join(self, begin: Callable[[bool], None]) -> Iterator[None]:
        """The same lock, shared; it is had alone if nobody shares it yet."""
        with self._lock_file() as descriptor:
            with self._claimed(STARTING, wait=True):
                exclusive = fcntl.LOCK_EX | fcntl.LOCK_NB
                alone = lock_file(descriptor, exclusive, self.root / LOCK)
                self._take(descriptor, fcntl.LOCK_SH)
                begin(alone)
            yield

    def claim(self, name: str) -> contextlib.AbstractContextManager[bool]:
        """A file that is there only while it is held."""
        return self._claimed(name)

    @contextlib.contextmanager
    def _claimed(self, name: str, *, wait: bool = False) -> Iterator[bool]:
        try:
            with claimed(self.root / name, wait=wait) as mine:
                yield mine
        finally:
            with contextlib.suppress(OSError):  # others hold something in it
                (self.root / CLAIMS).rmdir()

    @contextlib.contextmanager
    def _lock_file(self) -> Iterator[int]:
        with told_where(self.root):
            if self.root.exists() and not self.root.is_dir():
                raise ColdstillError(f"{self.root}: a file, where a store's folder should be")
            self.root.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.root / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            yield descriptor
        finally:
            let_go(descriptor)

    def _take(self, descriptor: int, kind: int) -> None:
        if not lock_file(descriptor, kind | fcntl.LOCK_NB, self.root / LOCK):
            raise ColdstillError(f"{self.root}: another process is writing this store; wait for it")

    def clear(self) -> None:
        """Delete scratch names, here and one level below, and claims that nobody holds."""
        remove_scratch(self.root)
        for name in self.names("."):
            if (self.root / name).is_dir():
                remove_scratch(self.root / name)
        for name in self.names(CLAIMS):
            with self._claimed(f"{CLAIMS}/{name}"):  # and let go of: then it is not there any more
                pass

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
