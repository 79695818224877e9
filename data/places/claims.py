"""Lock files, which the operating system unlocks when their process ends, however it ends.

Between machines that share a disk they work as far as that disk supports file locks.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from filelock import lock_descriptor, unlock_descriptor

from ..errors import ColdstillError
from ..files import told_where

try:
    import fcntl
except ImportError:  # a platform without shared locks: readers wait for each other
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

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
    with told_where(path):
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
                # The previous holder deletes the file: a lock on a deleted file excludes no one.
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
            raise ColdstillError(f"{path}: a folder, where a file should be; move it") from error


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
