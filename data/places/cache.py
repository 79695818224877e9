"""Local copies of shards from object stores, whole and checked, up to a limit of bytes.

All processes of a machine share the folder. A lock file beside each entry is locked shared by
readers, and exclusively by the process that fetches or deletes the entry.

    .lock                    locked for moments, while room is made
    KEY-BYTES.lock           the lock of an entry
    KEY-BYTES/00000.arrow    an entry; its modification time is the time of its last use
    KEY-BYTES/.unfinished-*  an entry being fetched: its bytes count from the start

On Linux a mapped file may be deleted: its reader keeps it, and its disk space, until it closes it.
A shard that is a folder is read file by file, so its readers need `reading`.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ColdstillError
from ..files import SCRATCH_PREFIX, remove_scratch, write_errors
from ..store.commit import expect_files
from .claims import claimed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ..store.commit import ShardFile

_UNITS = {"": 1, "b": 1}
_UNITS |= {f"{letter}b": 1000**power for power, letter in enumerate("kmgt", 1)}
_UNITS |= {f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", 1)}


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheSettings:
    """A folder that all stores and processes of a machine may share."""

    folder: Path | None = None
    """None stands for `$COLDSTILL_CACHE`, or `~/.cache/coldstill` if that is not set."""
    bytes: int = 20 * 1000**3
    """The most bytes that the folder may hold."""

    @property
    def place(self) -> Path:
        """The folder."""
        named = os.environ.get("COLDSTILL_CACHE")
        return self.folder or (Path(named) if named else Path.home() / ".cache" / "coldstill")


def byte_count(value: Any) -> int:
    """A number of bytes, from a number or a text such as `20 GB` or `512 MiB`. Raises ValueError if
    the value is neither."""
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-z]*)\s*", str(value).lower())
    if found is None or found[2] not in _UNITS or not 0 < float(found[1]) < 1e15:
        raise ValueError(f"{value!r} is not a size; write a number and a unit, such as '20 GB'")
    return max(1, round(float(found[1]) * _UNITS[found[2]]))


AHEAD = 300.0
"""Seconds by which an entry that was fetched ahead is dated into the future: it is deleted last and
known as unused. If its process dies, it becomes an ordinary entry after this time."""
_POLL = 0.05
_PATIENCE = 600.0
_FETCHES = 4
"""Number of attempts to fetch an entry that arrives damaged, perhaps because of the network."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One shard of one store, or another folder of it."""

    key: str
    """Identifies the store and the content."""
    address: str
    """The shard's address, for messages."""
    name: str
    files: tuple[ShardFile, ...]

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)

    @property
    def label(self) -> str:
        """The name of its folder in the cache."""
        return f"{self.key}-{self.bytes}"


class ShardCache:
    """A folder of entries that never holds more bytes than its limit."""

    def __init__(self, folder: Path, limit: int) -> None:
        """Name the folder, without creating it; `limit` is in bytes."""
        self.folder = folder
        self.limit = limit
        self._checked: dict[str, int] = {}
        """Label and inode of each entry whose bytes this process, or its parent, has compared."""

    def get(
        self, entry: Entry, download: Callable[[Path], None], *, ahead: int | None = None
    ) -> Path:
        """The entry as a local file or folder, fetched if the cache does not have it.

        download  writes the entry to a path whose parent folders exist
        ahead     the entry is fetched ahead: date it as unused, unless it was used since this time
                  in nanoseconds

        Raises
            ColdstillError: the entry is larger than the limit or always arrives damaged, or the
                disk is full
        """
        if entry.bytes > self.limit:
            raise ColdstillError(
                f"{entry.address}: {entry.bytes:,} bytes, the cache in {self.folder} may hold "
                f"{self.limit:,}; set logits.cache (or cache= of open_store) to more"
            )
        with self._locked(entry, shared=True):
            is_whole = self._is_whole(entry)
            if is_whole:
                self.date(entry, ahead)
        if not is_whole:
            with self._locked(entry):
                if self._is_whole(entry):  # another process has fetched it meanwhile
                    self.date(entry, ahead)
                else:
                    self._fetch(entry, download, is_ahead=ahead is not None)
        return self._made(entry)

    @contextlib.contextmanager
    def reading(self, entry: Entry) -> Iterator[bool]:
        """Keep an entry while it is read; yields False if it is not the one that `get` returned."""
        with self._locked(entry, shared=True):
            inode = _inode(self.folder / entry.label)
            is_there = inode is not None and inode == self._checked.get(entry.label)
            if is_there:
                self.date(entry, None)
            yield is_there

    def used_since(self, entry: Entry, began: int) -> bool:
        """Whether any process has used the entry since `began`, in nanoseconds."""
        try:
            used = self._made(entry).stat().st_mtime_ns
        except FileNotFoundError:
            return False
        return began <= used <= time.time_ns()

    def give_up(self, entry: Entry, began: int) -> None:
        """Make an entry the first to be deleted: it was fetched ahead and is not needed any more.

        Its time of use is set before `began`.
        """
        if not self.used_since(entry, began):
            self._set_time(entry, began - 1)

    def _made(self, entry: Entry) -> Path:
        return self.folder / entry.label / entry.name

    def _locked(
        self, entry: Entry, *, shared: bool = False
    ) -> contextlib.AbstractContextManager[bool]:
        return claimed(self.folder / f"{entry.label}.lock", wait=True, shared=shared)

    def date(self, entry: Entry, ahead: int | None) -> None:
        """Set the time of use: now, or in the future for an unused entry that was fetched ahead."""
        if ahead is None:
            self._set_time(entry, time.time_ns())
        elif not self.used_since(entry, ahead):
            self._set_time(entry, _future())

    def _set_time(self, entry: Entry, when: int) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.utime(self._made(entry), ns=(when, when))

    def _is_whole(self, entry: Entry) -> bool:
        inode, made = _inode(self.folder / entry.label), self._made(entry)
        if inode is None or not made.exists():
            return False
        if self._checked.get(entry.label) != inode:
            if _damage(entry, made) is not None:
                return False
            self._checked[entry.label] = inode
        return True

    def _fetch(self, entry: Entry, download: Callable[[Path], None], *, is_ahead: bool) -> None:
        home = self.folder / entry.label
        scratch = home / f"{SCRATCH_PREFIX}{entry.name}"
        wrong: ColdstillError | None = None
        self._make_room(entry)
        try:
            with write_errors(self.folder):
                for _ in range(_FETCHES):
                    for file in entry.files:
                        (scratch / file.name).parent.mkdir(parents=True, exist_ok=True)
                    download(scratch)
                    wrong = _damage(entry, scratch)
                    if wrong is None:
                        when = _future() if is_ahead else time.time_ns()
                        os.utime(scratch, ns=(when, when))
                        scratch.rename(home / entry.name)
                        self._checked[entry.label] = home.stat().st_ino
                        return
                    if scratch.is_dir():
                        shutil.rmtree(scratch)
                    else:
                        scratch.unlink()
            assert wrong is not None
            raise wrong
        except BaseException:
            shutil.rmtree(home, ignore_errors=True)
            raise

    def _make_room(self, entry: Entry) -> None:
        """Create the entry's folder as soon as the limit allows its bytes beside the others."""
        end = time.monotonic() + _PATIENCE
        while True:
            with write_errors(self.folder), claimed(self.folder / ".lock", wait=True):
                self._delete(self.folder / entry.label)  # damaged, or left by a killed process
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
        """Delete the least recently used entries until `needed` bytes are free; False if too many
        are in use."""
        remove_scratch(self.folder)  # left by a process that was killed while it deleted
        entries = []
        for path in self.folder.iterdir():
            if found := re.fullmatch(r"[0-9a-f]+-([0-9]+)", path.name):
                with contextlib.suppress(FileNotFoundError):  # its fetch has failed meanwhile
                    entries.append((_last_use(path), int(found[1]), path))
        free = self.limit - needed - sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if free >= 0:
                break
            with claimed(path.with_name(f"{path.name}.lock")) as is_unused:
                if is_unused:
                    self._delete(path)
                    free += size
        return free >= 0

    def _delete(self, home: Path) -> None:
        if home.exists():
            doomed = self.folder / f"{SCRATCH_PREFIX}{secrets.token_hex(4)}"
            home.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def _damage(entry: Entry, made: Path) -> ColdstillError | None:
    """The error of a local copy that is not what was committed."""
    try:
        expect_files(made, entry.files, entry.address)
    except ColdstillError as error:
        return error
    return None


def _inode(folder: Path) -> int | None:
    try:
        return folder.stat().st_ino
    except FileNotFoundError:
        return None


def _future() -> int:
    return time.time_ns() + int(AHEAD * 1e9)


def _last_use(home: Path) -> int:
    """When an entry was last used; an empty folder belongs to a process that begins to fetch."""
    for inside in home.iterdir():
        with contextlib.suppress(FileNotFoundError):  # it was renamed just now
            return inside.stat().st_mtime_ns
    return home.stat().st_mtime_ns
