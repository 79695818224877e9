"""A store in a folder of this machine, or of a disk that several machines share."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ColdstillError
from ..files import SCRATCH_PREFIX, remove_scratch, sync_tree, whole_file, write_errors
from ..store.commit import expect_files
from ..store.layout import CLAIMS
from .claims import HeldError, Writers, claimed

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from ..store.commit import Commit


class LocalPlace(Writers):
    """A folder of files (`Place`)."""

    room: int | None = None

    def __init__(self, root: Path) -> None:
        super().__init__(_FileLocks(self))
        self.root = root

    def __str__(self) -> str:
        return str(self.root)

    def path(self, name: str) -> str:
        return str(self.root / name)

    def exists(self, name: str) -> bool:
        return (self.root / name).exists()

    def names(self, folder: str) -> set[str]:
        try:
            return set(os.listdir(self.root / folder))
        except (FileNotFoundError, NotADirectoryError):
            return set()

    def sizes(self, folder: str) -> dict[str, int]:
        found: dict[str, int] = {}
        for inside, _, files in os.walk(self.root / folder, followlinks=True):
            paths = (Path(inside, file) for file in files)
            found |= {p.relative_to(self.root).as_posix(): p.stat().st_size for p in paths}
        return found

    def read(self, name: str) -> bytes:
        return (self.root / name).read_bytes()

    def write(self, name: str, content: bytes) -> None:
        with whole_file(self.root / name) as scratch:
            scratch.write_bytes(content)

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        folder = self.root / f"{SCRATCH_PREFIX}{secrets.token_hex(4)}"
        with write_errors(self.root):
            folder.mkdir(parents=True)
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)

    def adopt(self, made: Path, name: str) -> None:
        target = self.root / name
        with write_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            sync_tree(made)
            if target.is_dir():  # left by a crash or being replaced: no commit record refers to it
                shutil.rmtree(target)
            made.replace(target)
            sync_tree(target.parent, contents=False)

    def remove(self, name: str) -> None:
        target = self.root / name
        with write_errors(target):
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
        return self.root / name

    def shard(self, commit: Commit, name: str) -> Path:
        expect_files(self.root / name, commit.files, self.path(name))
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
        root = self._place.root
        if root.exists() and not root.is_dir():
            raise ColdstillError(f"{root}: is a file, expected a store's folder")
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
