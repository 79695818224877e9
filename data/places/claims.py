"""Lock files, and the rules by which processes share the writing of a store.

The operating system unlocks a lock file when its process ends, however it ends. Between machines
that share a disk the locks work as far as that disk supports file locks.

A process that writes alone locks the store, then looks for other writers. A process that joins
others locks the name for joining, then looks at the store's lock. So of two processes that start at
the same time at least one sees the other.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from typing import TYPE_CHECKING, Protocol

from filelock import lock_descriptor, unlock_descriptor

from ..errors import ColdstillError, DamageError
from ..files import write_errors
from ..store.layout import CLAIMS, LOCK, MEMBERS, STARTING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

try:
    import fcntl
except ImportError:  # a platform without shared locks: readers wait for each other
    fcntl = None  # type: ignore[assignment]


_POLL = 0.01


@contextlib.contextmanager
def claimed(path: Path, *, wait: bool = False, shared: bool = False) -> Iterator[bool]:
    """Lock the file `path`; yields False if another process or thread has locked it.

    The file exists only while it is locked. A killed process leaves the file, but not the lock.

    wait    wait for the lock instead of yielding False
    shared  wait until no exclusive lock is left; other shared locks are allowed

    Raises
        ColdstillError: the file cannot be created or locked
    """
    absent = [folder for folder in path.parents if not folder.exists()]
    with write_errors(path):
        descriptor = _open_locked(path, wait=wait, shared=shared)
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            _release(descriptor, path, shared=shared)
        for folder in absent:
            with contextlib.suppress(OSError):  # another process uses it
                folder.rmdir()


def _open_locked(path: Path, *, wait: bool, shared: bool) -> int | None:
    while True:
        descriptor = _opened(path)
        try:
            if _lock(descriptor, path, wait=wait, shared=shared):
                # The previous holder deletes the file: a lock on a deleted file is useless.
                if _is_named(descriptor, path):
                    return descriptor
            else:
                os.close(descriptor)
                return None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _opened(path: Path) -> int:
    path.parent.parent.mkdir(parents=True, exist_ok=True)
    while True:
        # `Path.mkdir(exist_ok=True)` fails if the folder exists and is deleted at that moment.
        with contextlib.suppress(FileExistsError):
            path.parent.mkdir()
        try:
            return os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:  # another process has deleted the empty folder
            continue
        except IsADirectoryError as error:
            raise ColdstillError(f"{path}: is a folder, expected a file; move it") from error


def _lock(descriptor: int, path: Path, *, wait: bool, shared: bool) -> bool:
    try:
        if shared and fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            return True
        return lock_descriptor(descriptor, blocking=wait or shared, poll_interval=_POLL)
    except OSError as error:
        raise ColdstillError(
            f"{path}: cannot be locked: {error.strerror}; choose a folder on a disk that supports "
            "file locks"
        ) from error


def _is_named(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _release(descriptor: int, path: Path, *, shared: bool) -> None:
    try:
        # Only the sole holder deletes the file, and before it unlocks: afterwards the name may
        # belong to another process. A file that cannot be deleted is unlocked all the same.
        with contextlib.suppress(OSError):
            if not shared or lock_descriptor(descriptor, blocking=False):
                path.unlink(missing_ok=True)
    finally:
        # Closing is not enough: a process forked meanwhile has the descriptor open, too.
        with contextlib.suppress(OSError):
            unlock_descriptor(descriptor)
        os.close(descriptor)


class HeldError(ColdstillError):
    """Another process has locked the name."""


class Locks(Protocol):
    """Locks on names of one store: lock files of the system, or leases in an object store."""

    def hold(self, name: str, *, wait: bool = False) -> contextlib.AbstractContextManager[None]:
        """Hold the lock `name`; raises HeldError if another process has it.

        wait  wait for the other process first
        """

    def expect_free(self, name: str) -> None:
        """Raise HeldError if a living process holds the lock `name`."""

    def names(self, folder: str) -> set[str]:
        """The names directly inside a folder of the store."""

    def remove(self, name: str) -> None:
        """Delete a lock that no living process holds; no error if it is missing."""


class Writers:
    """The part of a `Place` that decides who may write."""

    def __init__(self, locks: Locks) -> None:
        self._locks = locks

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        # Look first without the lock: a refused process should not hinder others with it.
        self._expect_no_other()
        with self._locks.hold(LOCK):
            self._expect_no_other()
            yield

    @contextlib.contextmanager
    def join(self, begin: Callable[[bool], None]) -> Iterator[None]:
        with contextlib.ExitStack() as membership:
            with self._locks.hold(STARTING, wait=True):
                self._locks.expect_free(LOCK)
                # Its holder may only be paused: without its lock it cannot continue.
                self._locks.remove(LOCK)
                alone = True
                try:
                    self._expect_no_member()
                except HeldError:
                    alone = False
                # Become a member before STARTING is released, so that others always see one of
                # both.
                membership.enter_context(self._locks.hold(f"{MEMBERS}{secrets.token_hex(8)}"))
                begin(alone)
            yield

    @contextlib.contextmanager
    def claim(self, name: str) -> Iterator[bool]:
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(self._locks.hold(name))
            except HeldError:
                yield False
                return
            yield True

    def clear_claims(self) -> None:
        """Delete the claims of dead writers and those copied from elsewhere. Only for a process
        that is the only writer."""
        for path in self._claims():
            with contextlib.suppress(DamageError):
                try:
                    self._locks.expect_free(path)
                except HeldError:
                    continue
            self._locks.remove(path)

    def _expect_no_other(self) -> None:
        # In this order: a process that stops joining in between is a member by then.
        self._locks.expect_free(STARTING)
        self._expect_no_member()

    def _expect_no_member(self) -> None:
        """Raise HeldError if a member is alive; delete what dead ones left."""
        for path in self._claims():
            if path.startswith(MEMBERS):
                self._locks.expect_free(path)
                self._locks.remove(path)

    def _claims(self) -> list[str]:
        return [f"{CLAIMS}/{name}" for name in sorted(self._locks.names(CLAIMS))]
