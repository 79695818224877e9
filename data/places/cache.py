"""What of a distant store is kept on this machine: whole and checked shards, up to a limit.

All processes of a machine share the folder. Each entry is a folder of its own, whose name ends in
its size, and the lock of that folder says what happens to it: shared while somebody reads,
exclusive while it is fetched or deleted. A lock dies with its process, so nothing is left behind.

    .lock                    held for moments, while room is made
    KEY-BYTES/00000.arrow    an entry; the time of the file is that of its last use
    KEY-BYTES/.unfinished-*  one that is being fetched: its bytes count from the start

A file that is mapped may be deleted on Linux: its reader keeps it, and its space, until it lets go.
A folder is read file by file, and is not: therefore `reading`.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import time
from typing import TYPE_CHECKING

from ..errors import ColdstillError
from ..files import SCRATCH_PREFIX, remove_scratch, told_where
from .place import expect_whole

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from .cache_entry import Entry

AHEAD = 300.0
"""Seconds by which what is fetched ahead is dated into the future: it is the last to be deleted,
and known as unused. If whoever fetched it dies, it is an entry like any other that much later."""
_POLL = 0.05
_PATIENCE = 600.0
_FETCHES = 4
"""So often is fetched what does not arrive as it was written: the network may have spoiled it."""


class ShardCache:
    """A folder of entries that never holds more than its limit."""

    def __init__(self, folder: Path, limit: int) -> None:
        """Name it; nothing is touched. `limit` is in bytes."""
        self.folder = folder
        self.limit = limit
        self._checked: dict[str, int] = {}
        """The folders whose every byte this process, or its parent, compared: label to inode."""

    def get(
        self, entry: Entry, download: Callable[[Path], None], *, ahead: int | None = None
    ) -> Path:
        """The entry as a local file or folder; fetched unless it is there.

        download  makes it at a path, whose folders are there
        ahead     nobody needs it yet, unless it was used since this time, in nanoseconds

        Raises
            ColdstillError: larger than the limit, not what was written however often it is fetched,
                or the disk is full
        """
        if entry.bytes > self.limit:
            raise ColdstillError(
                f"{entry.address}: {entry.bytes:,} bytes, the cache in {self.folder} may hold "
                f"{self.limit:,}; set logits.cache (or cache= of open_store) to more"
            )
        home = self.folder / entry.label
        while True:
            with _locked(home, fcntl.LOCK_SH) as inode:
                if inode is not None and self._is_whole(entry, inode):
                    self._date(entry, ahead)
                    return home / entry.name
            self._make_room(entry)
            with _locked(home, fcntl.LOCK_EX) as inode:
                if inode is None:  # it had to make room for another
                    continue
                if self._is_whole(entry, inode):  # somebody fetched it meanwhile
                    self._date(entry, ahead)
                else:
                    self._fetch(entry, download, is_ahead=ahead is not None)
                    self._checked[entry.label] = inode
                return home / entry.name

    @contextlib.contextmanager
    def reading(self, entry: Entry) -> Iterator[bool]:
        """Keep an entry while it is read; False if it is no longer the one that `get` gave."""
        home = self.folder / entry.label
        with _locked(home, fcntl.LOCK_SH) as inode:
            there = inode is not None and inode == self._checked.get(entry.label)
            if there:
                self._date(entry, None)
            yield there

    def used_since(self, entry: Entry, began: int) -> bool:
        """Whether any process has used it since a time, in nanoseconds."""
        try:
            used = (self.folder / entry.label / entry.name).stat().st_mtime_ns
        except FileNotFoundError:
            return False
        return began <= used <= time.time_ns()

    def keep_for_later(self, entry: Entry, began: int) -> None:
        """Say again that it was fetched ahead."""
        self._date(entry, began)

    def give_up(self, entry: Entry, began: int) -> None:
        """Say that what was fetched ahead is not wanted any more."""
        if not self.used_since(entry, began):
            self._set_time(entry, began - 1)

    def _date(self, entry: Entry, ahead: int | None) -> None:
        """Set the time of use: now, or in the future for what nobody needs yet."""
        if ahead is None:
            self._set_time(entry, time.time_ns())
        elif not self.used_since(entry, ahead):
            self._set_time(entry, _future())

    def _set_time(self, entry: Entry, when: int) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.utime(self.folder / entry.label / entry.name, ns=(when, when))

    def _is_whole(self, entry: Entry, inode: int) -> bool:
        made = self.folder / entry.label / entry.name
        if self._checked.get(entry.label) == inode and made.exists():
            return True
        if not made.exists() or _damage(entry, made) is not None:
            return False
        self._checked[entry.label] = inode
        return True

    def _make_room(self, entry: Entry) -> None:
        """Make the entry's folder, once what is there and what it will hold stay in the limit."""
        end = time.monotonic() + _PATIENCE
        while True:
            with told_where(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                (self.folder / ".lock").touch()
                with _locked(self.folder / ".lock", fcntl.LOCK_EX):
                    if (self.folder / entry.label).exists():
                        return
                    if self._evict(entry.bytes):
                        (self.folder / entry.label).mkdir()
                        return
            if time.monotonic() > end:
                raise ColdstillError(
                    f"{self.folder}: no room for {entry.address}, all of it is in use; set "
                    "logits.cache to more"
                )
            time.sleep(_POLL)

    def _evict(self, needed: int) -> bool:
        """Delete what was used longest ago until so many bytes are free; False if they are not."""
        remove_scratch(self.folder)  # of one who was killed doing this
        entries = []
        for path in self.folder.iterdir():
            if found := re.fullmatch(r"[0-9a-f]+-([0-9]+)", path.name):
                with contextlib.suppress(FileNotFoundError):  # its fetch has failed
                    entries.append((_last_use(path), int(found[1]), path))
        free = self.limit - needed - sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if free >= 0:
                break
            with _locked(path, fcntl.LOCK_EX | fcntl.LOCK_NB) as inode:
                if inode is not None:  # nobody is at it this moment
                    doomed = self.folder / f"{SCRATCH_PREFIX}{secrets.token_hex(4)}"
                    path.rename(doomed)
                    shutil.rmtree(doomed, ignore_errors=True)
                    free += size
        return free >= 0

    def _fetch(self, entry: Entry, download: Callable[[Path], None], *, is_ahead: bool) -> None:
        home = self.folder / entry.label
        scratch = home / f"{SCRATCH_PREFIX}{entry.name}"
        wrong: ColdstillError | None = None
        try:
            with told_where(self.folder):
                for _ in range(_FETCHES):
                    _empty(home)
                    for file in entry.files:
                        (scratch / file.name).parent.mkdir(parents=True, exist_ok=True)
                    download(scratch)
                    wrong = _damage(entry, scratch)
                    if wrong is None:
                        when = _future() if is_ahead else time.time_ns()
                        os.utime(scratch, ns=(when, when))
                        scratch.rename(home / entry.name)
                        return
            assert wrong is not None
            raise wrong
        except BaseException:
            shutil.rmtree(home, ignore_errors=True)
            raise


def _damage(entry: Entry, made: Path) -> ColdstillError | None:
    """What is wrong with a local copy."""
    try:
        expect_whole(made, entry.files, entry.address)
    except ColdstillError as error:
        return error
    return None


@contextlib.contextmanager
def _locked(path: Path, how: int) -> Iterator[int | None]:
    """Hold the lock of a file or folder; gives its inode, or None if gone or not to be had."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        yield None
        return
    try:
        try:
            fcntl.flock(descriptor, how)
            inode = os.fstat(descriptor).st_ino
            held = inode if inode == path.stat().st_ino else None
        except (BlockingIOError, FileNotFoundError):
            held = None
        yield held
    finally:
        # closing would not do: a process forked meanwhile has the descriptor too
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _future() -> int:
    return time.time_ns() + int(AHEAD * 1e9)


def _last_use(home: Path) -> int:
    """When what an entry's folder holds was used; an empty one belongs to who is about to fetch."""
    for inside in home.iterdir():
        with contextlib.suppress(FileNotFoundError):  # it has just got its name
            return inside.stat().st_mtime_ns
    return home.stat().st_mtime_ns
