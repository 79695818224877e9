"""A store below any address that fsspec supports: `s3://bucket/store`, `gs://...`, `memory://...`.

Each object is written whole. A shard that is a folder exists once its commit record does, like any
other shard. For other folders an object beside the folder says that some files are still missing.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import tempfile
import threading
import time
from collections import deque
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from ..errors import ColdstillError, DamageError
from ..files import SCRATCH_PREFIX, json_sha256
from ..store.commit import REPAIR, ShardFile
from ..store.layout import MANIFEST
from .cache import AHEAD, CacheSettings, Entry, ShardCache
from .claims import Writers
from .faults import Patience
from .lease import Leases
from .objects import Objects

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from ..store.commit import Commit

_POLL = 0.05
_LOOK = 32
"""Number of entries that are checked for use: readers follow the order only within a window."""


class _OvertakenError(Exception):
    """A reader was faster, and may have finished with the entry."""


class ReadAhead:
    """A thread that follows one order of shards and ends with the process.

    It ignores errors: a reader that needs the shard meets them itself.
    """

    def __init__(
        self,
        cache: ShardCache,
        wanted: Iterable[tuple[Entry, int]],
        download: Callable[[Entry, Path], None],
    ) -> None:
        """Start the thread.

        wanted    entries in order of first use, each with how many are in use from then on;
                  iterated in the thread
        download  writes an entry to a path
        """
        self.used: set[str] = set()
        """The labels of the entries that this process has used."""
        self._cache, self._wanted, self._download = cache, wanted, download
        self._began = self._kept = time.time_ns()
        self._ahead: deque[tuple[Entry, int]] = deque()
        self._in_use = 0
        self._largest = 0
        self._stopped = threading.Event()
        threading.Thread(target=self._run, name="coldstill read-ahead", daemon=True).start()

    def stop(self) -> None:
        """Fetch nothing more after the current entry."""
        self._stopped.set()

    def _run(self) -> None:
        try:
            with contextlib.suppress(Exception):
                self._follow()
        finally:
            self._pass(len(self._ahead))

    def _follow(self) -> None:
        for entry, in_use in self._wanted:
            self._largest = max(self._largest, entry.bytes)
            while not self._is_used(entry) and not self._fits(entry):
                if self._stopped.wait(_POLL):
                    return
            if self._stopped.is_set():
                return
            try:
                self._expect_unused(entry)
                bring = functools.partial(self._bring, entry)
                self._cache.get(entry, bring, ahead=self._began)
            except _OvertakenError:
                self._pass(len(self._ahead))
                self._in_use = in_use
            else:
                self._ahead.append((entry, in_use))
        while self._ahead and not self._stopped.wait(_POLL):
            self._forget_used()

    def _bring(self, entry: Entry, made: Path) -> None:
        self._expect_unused(entry)  # it may have waited long for room
        self._download(entry, made)

    def _expect_unused(self, entry: Entry) -> None:
        if self._is_used(entry):
            raise _OvertakenError

    def _fits(self, entry: Entry) -> bool:
        """Whether the entry fits beside the entries in use and those fetched ahead.

        At most half of the cache is fetched ahead: a run that ends early should not have paid for
        a whole store.
        """
        self._forget_used()
        ahead = sum(other.bytes for other, _ in self._ahead)
        beside = self._cache.limit - self._in_use * self._largest
        half = max(self._cache.limit // 2, entry.bytes)
        return ahead + entry.bytes <= min(beside, half)

    def _forget_used(self) -> None:
        nearest = list(itertools.islice(self._ahead, _LOOK))
        last = max((i for i, (entry, _) in enumerate(nearest) if self._is_used(entry)), default=-1)
        self._pass(last + 1)
        if time.time_ns() - self._kept > AHEAD * 1e9 / 3:
            self._kept = time.time_ns()
            for entry, _ in self._ahead:
                self._cache.date(entry, self._began)

    def _pass(self, count: int) -> None:
        """Give up the first entries: one of them or a later one was used, or no entry is needed.

        An entry that was skipped was not needed: its blocks were still in memory.
        """
        for _ in range(count):
            entry, self._in_use = self._ahead.popleft()
            self._cache.give_up(entry, self._began)

    def _is_used(self, entry: Entry) -> bool:
        return entry.label in self.used or self._cache.used_since(entry, self._began)


PATIENCE = Patience()


class RemotePlace(Writers):
    """A folder of objects (`Place`)."""

    def __init__(
        self,
        url: str,
        cache: CacheSettings | None = None,
        *,
        patience: Patience | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        """Name the folder; nothing is read or written.

        cache     where copies of shards are kept
        patience  how often a failing request is repeated
        options   for fsspec, besides those that it reads from the environment
        """
        self._settings = cache or CacheSettings()
        self._remake = functools.partial(
            RemotePlace, url, cache, patience=patience, options=options
        )
        self._objects = Objects(url, patience or PATIENCE, options)
        self._cache = ShardCache(self._settings.place, self._settings.bytes)
        self._identity: str | None = None
        self._leases = Leases(self._objects)
        super().__init__(self._leases)
        self._ahead: ReadAhead | None = None

    def __reduce__(self) -> Any:
        """Pickle the arguments: connections, threads and locks stay in this process."""
        return self._remake, ()

    @property
    def room(self) -> int | None:
        return self._cache.limit

    def __str__(self) -> str:
        return str(self._objects)

    def path(self, name: str) -> str:
        return self._objects.path(name)

    def exists(self, name: str) -> bool:
        """Whether the object exists, or the folder with all its files."""
        kind = self._objects.kind(name)
        return kind == "file" or (
            kind == "directory" and self._objects.kind(_announcement(name)) is None
        )

    def names(self, folder: str) -> set[str]:
        return self._objects.names(folder)

    def sizes(self, folder: str) -> dict[str, int]:
        return {f"{folder}/{n}": size for n, size in self._objects.sizes(folder).items()}

    def read(self, name: str) -> bytes:
        content = self._objects.read(name)
        if name == MANIFEST:
            self._identity = hashlib.sha256(content).hexdigest()
        return content

    def write(self, name: str, content: bytes) -> None:
        self._objects.write(name, content, before=self._leases.expect_held)

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="coldstill-") as folder:
            yield Path(folder)

    def adopt(self, made: Path, name: str) -> None:
        expect_held = self._leases.expect_held
        if not made.is_dir():
            self._objects.upload({name: made}, before=expect_held)
            return
        announcement = _announcement(name)
        self._objects.write(announcement, b"", before=expect_held)
        # Left by a crash or being replaced: no commit record names it.
        self._objects.remove(name, before=expect_held)
        files = sorted(path for path in made.rglob("*") if path.is_file())
        uploads = {f"{name}/{path.relative_to(made).as_posix()}": path for path in files}
        self._objects.upload(uploads, before=expect_held)
        self._objects.remove(announcement, before=expect_held)

    def remove(self, name: str) -> None:
        self._objects.remove(name, before=self._leases.expect_held)

    def clear(self) -> None:
        """Delete folders whose upload was interrupted, here and one level below, and claims of
        dead processes."""
        for folder in (".", *sorted(self.names("."))):
            for name in self.names(folder):
                if name.startswith(SCRATCH_PREFIX):
                    inside = "" if folder == "." else f"{folder}/"
                    self.remove(f"{inside}{name.removeprefix(SCRATCH_PREFIX)}")
                    self.remove(f"{inside}{name}")
        self.clear_claims()

    def folder(self, name: str) -> Path:
        """A copy in the cache; a path that does not exist if the folder is empty."""
        files = []
        for inner, size in sorted(self._objects.sizes(name).items()):
            if ".." in PurePosixPath(inner).parts:
                raise ColdstillError(f"{self.path(name)}: holds {inner!r}, which leads out of it")
            files.append(ShardFile(name=inner, bytes=size, sha256=""))
        entry = self._entry(tuple(files), name)
        if not files:
            return self._cache.folder / entry.label / name
        # Dated as fetched ahead, so that it is not deleted before the caller reads it.
        return self._cache.get(entry, self._downloads(entry, name), ahead=time.time_ns())

    def shard(self, commit: Commit, name: str) -> Path:
        """A copy in the cache, compared with the commit record on arrival and by each process
        that did not fetch it."""
        entry = self._entry(commit.files, name)
        found = self._cache.get(entry, self._downloads(entry, name))
        self._note_used(entry)
        return found

    @contextlib.contextmanager
    def reading(self, commit: Commit, name: str) -> Iterator[bool]:
        entry = self._entry(commit.files, name)
        self._note_used(entry)
        with self._cache.reading(entry) as there:
            yield there

    def prefetch(self, wanted: Iterable[tuple[Commit, str, int]]) -> None:
        """Fetch ahead in this order, in a thread; the previous order is given up."""
        if self._ahead is not None:
            self._ahead.stop()
        names: dict[str, str] = {}

        def entries() -> Iterator[tuple[Entry, int]]:
            for commit, name, in_use in wanted:
                entry = self._entry(commit.files, name)
                names[entry.label] = name
                yield entry, in_use

        def download(entry: Entry, made: Path) -> None:
            self._downloads(entry, names[entry.label])(made)

        self._ahead = ReadAhead(self._cache, entries(), download)

    def _entry(self, files: tuple[ShardFile, ...], name: str) -> Entry:
        content = [[file.name, file.bytes, file.sha256] for file in files]
        key = json_sha256([str(self), self._store_identity(), name, content])
        last = name.rpartition("/")[2]
        return Entry(key=key[:32], address=self.path(name), name=last, files=files)

    def _store_identity(self) -> str:
        """The hash of the manifest: a new store at the same address has another one."""
        if self._identity is None:
            self.read(MANIFEST)
        return str(self._identity)

    def _downloads(self, entry: Entry, name: str) -> Callable[[Path], None]:
        def download(made: Path) -> None:
            files = {
                file.path(name): made / file.name if file.name else made for file in entry.files
            }
            try:
                self._objects.download(files)
            except FileNotFoundError as error:
                missing = next((f for f in files if self._objects.kind(f) is None), name)
                raise DamageError(f"{self.path(missing)}: damaged: missing; {REPAIR}") from error

        return download

    def _note_used(self, entry: Entry) -> None:
        if self._ahead is not None:
            self._ahead.used.add(entry.label)


def _announcement(name: str) -> str:
    folder, slash, last = name.rpartition("/")
    return f"{folder}{slash}{SCRATCH_PREFIX}{last}"
