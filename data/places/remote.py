"""A store below any address that fsspec knows: `s3://bucket/store`, `gs://...`, `memory://...`.

Objects are written whole. A shard that is a folder becomes real through its commit record, like any
other; another folder is announced by an object beside it until all of it is there.
"""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
import time
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from ..errors import ColdstillError, DamageError
from ..files import SCRATCH_PREFIX
from ..fingerprint import json_sha256
from ..store.commit import ShardFile
from ..store.layout import MANIFEST
from .cache import ShardCache
from .cache_entry import Entry
from .cache_settings import CacheSettings
from .faults import Patience
from .leases import Leases
from .objects import Objects
from .place import REPAIR
from .readahead import ReadAhead

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from ..store.commit import Commit

PATIENCE = Patience()


class RemotePlace:
    """A folder of objects."""

    def __init__(
        self,
        url: str,
        cache: CacheSettings | None = None,
        *,
        patience: Patience | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        """Name it; nothing is touched.

        options  for fsspec, besides what it takes from the environment
        """
        self._settings = cache or CacheSettings()
        self._made_of = url, cache, patience, options
        self._objects = Objects(url, patience or PATIENCE, options)
        self._cache = ShardCache(self._settings.place, self._settings.bytes)
        self._identity: str | None = None
        self._leases = Leases(self._objects)
        self._ahead: ReadAhead | None = None

    def __reduce__(self) -> Any:
        """Connections, threads and the lock stay in this process."""
        return _rebuilt, self._made_of

    @property
    def room(self) -> int | None:
        """What the cache may hold."""
        return self._cache.limit

    def __str__(self) -> str:
        """The address, without a password."""
        return str(self._objects)

    def path(self, name: str) -> str:
        """The address of one file."""
        return self._objects.path(name)

    def exists(self, name: str) -> bool:
        """Whether an object is there, or a folder that is whole."""
        kind = self._objects.kind(name)
        return kind == "file" or (
            kind == "directory" and self._objects.kind(_announcement(name)) is None
        )

    def names(self, folder: str) -> set[str]:
        """The names directly inside a folder."""
        return self._objects.names(folder)

    def sizes(self, folder: str) -> dict[str, int]:
        """Every object below a folder."""
        return {f"{folder}/{n}": size for n, size in self._objects.sizes(folder).items()}

    def read(self, name: str) -> bytes:
        """A small object."""
        content = self._objects.read(name)
        if name == MANIFEST:
            self._identity = hashlib.sha256(content).hexdigest()
        return content

    def write(self, name: str, content: bytes) -> None:
        """A small object, in one put."""
        self._leases.expect_held()
        self._objects.write(name, content)

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """A folder of the system's for temporary ones."""
        with tempfile.TemporaryDirectory(prefix="coldstill-") as folder:
            yield Path(folder)

    def adopt(self, made: Path, name: str) -> None:
        """Send it; a folder file by file, announced until the last has arrived."""
        self._leases.expect_held()
        if not made.is_dir():
            self._objects.upload({name: made})
            return
        announcement = _announcement(name)
        self._objects.write(announcement, b"")
        self._objects.remove(name)  # of a crash, or being replaced: no commit record speaks of it
        files = sorted(path for path in made.rglob("*") if path.is_file())
        self._objects.upload({f"{name}/{p.relative_to(made).as_posix()}": p for p in files})
        self._objects.remove(announcement)

    def remove(self, name: str) -> None:
        """Delete an object, or a folder of them."""
        self._leases.expect_held()
        self._objects.remove(name)

    def lock(self) -> contextlib.AbstractContextManager[None]:
        """An object that says who writes, renewed as long as this process lives."""
        return self._leases.alone()

    def join(self, begin: Callable[[bool], None]) -> contextlib.AbstractContextManager[None]:
        """An object for each writer."""
        return self._leases.together(begin)

    def claim(self, name: str) -> contextlib.AbstractContextManager[bool]:
        """An object for each piece of work."""
        return self._leases.claim(name)

    def clear(self) -> None:
        """Delete folders that were not sent to their end, here and one level below, and claims of
        the dead."""
        for folder in (".", *sorted(self.names("."))):
            for name in self.names(folder):
                if name.startswith(SCRATCH_PREFIX):
                    inside = "" if folder == "." else f"{folder}/"
                    self.remove(f"{inside}{name.removeprefix(SCRATCH_PREFIX)}")
                    self.remove(f"{inside}{name}")
        self._leases.bury()

    def folder(self, name: str) -> Path:
        """A copy in the cache, fetched once; nothing is there if there is nothing to copy."""
        files = []
        for inner, size in sorted(self._objects.sizes(name).items()):
            if ".." in PurePosixPath(inner).parts:
                raise ColdstillError(f"{self.path(name)}: holds {inner!r}, which leads out of it")
            files.append(ShardFile(name=inner, bytes=size, sha256=""))
        entry = self._entry(tuple(files), name)
        if not files:
            return self._cache.folder / entry.label / name
        # as if for later: whoever asked for it is about to read it
        return self._cache.get(entry, self._downloads(entry, name), ahead=time.time_ns())

    def shard(self, commit: Commit, name: str) -> Path:
        """A copy in the cache, every byte compared with the commit record on arrival, and by each
        process that did not fetch it itself."""
        entry = self._entry(commit.files, name)
        found = self._cache.get(entry, self._downloads(entry, name))
        self._tell_used(entry)
        return found

    @contextlib.contextmanager
    def reading(self, commit: Commit, name: str) -> Iterator[bool]:
        """Keep the copy from being deleted to make room for others."""
        entry = self._entry(commit.files, name)
        self._tell_used(entry)
        with self._cache.reading(entry) as there:
            yield there

    def prefetch(self, wanted: Iterable[tuple[Commit, str, int]]) -> None:
        """Follow a new order in a thread of its own, instead of the last one."""
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
        """Its manifest: another store at the same address is another store."""
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

    def _tell_used(self, entry: Entry) -> None:
        if self._ahead is not None:
            self._ahead.used.add(entry.label)


def _announcement(name: str) -> str:
    folder, slash, last = name.rpartition("/")
    return f"{folder}{slash}{SCRATCH_PREFIX}{last}"


def _rebuilt(
    url: str,
    cache: CacheSettings | None,
    patience: Patience | None,
    options: dict[str, Any] | None,
) -> RemotePlace:
    return RemotePlace(url, cache, patience=patience, options=options)
