"""Work shared out among processes: a file that the system locks says that somebody is at it.

The system lets go of what a killed process held, so a claim never outlives its owner; the file
alone, which such a process leaves behind, says nothing. Works between machines on a shared disk as
far as that disk's locks do.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from typing import TYPE_CHECKING

from ..errors import ColdstillError
from ..files import told_where

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextlib.contextmanager
def claimed(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Hold the file `path`, which is there only while it is held; False if another process has it,
    or this one through another call.

    wait  for as long as that takes, instead of yielding False

    Raises
        ColdstillError: it cannot be made or locked there
    """
    absent = [folder for folder in path.parents if not folder.exists()]
    with told_where(path):
        descriptor = _locked(path, wait=wait)
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            try:
                # while it is locked: afterwards the name may be another's. One that stays is stale
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)
            finally:
                let_go(descriptor)
        for folder in absent:
            with contextlib.suppress(OSError):  # others are at work in it
                folder.rmdir()


def lock_file(descriptor: int, kind: int, path: Path) -> bool:
    """Lock an open file; False if another has it.

    kind  as of `fcntl.flock`

    Raises
        ColdstillError: its disk knows no locks
    """
    try:
        fcntl.flock(descriptor, kind)
    except BlockingIOError:
        return False
    except OSError as error:
        raise ColdstillError(
            f"{path}: cannot be locked: {error.strerror}; choose a folder on a disk that knows "
            "file locks"
        ) from error
    return True


def let_go(descriptor: int) -> None:
    """Unlock a file and close it, whoever else (a child that was just forked) has it open."""
    with contextlib.suppress(OSError):  # where nothing can be locked nothing is
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


def _locked(path: Path, *, wait: bool) -> int | None:
    while True:
        descriptor = _opened(path)
        try:
            if not lock_file(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), path):
                os.close(descriptor)
                return None
            # the one before deletes the name when it lets go: a lock on a nameless file is none
            if _is_named(descriptor, path):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _opened(path: Path) -> int:
    path.parent.parent.mkdir(parents=True, exist_ok=True)
    while True:
        # `Path.mkdir(exist_ok=True)` fails where the folder was there and is taken away just then
        with contextlib.suppress(FileExistsError):
            path.parent.mkdir()
        try:
            return os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:  # whoever was last took the empty folder away
            continue
        except IsADirectoryError as error:
            raise ColdstillError(f"{path}: a folder, where a file should be; move it") from error


def _is_named(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
