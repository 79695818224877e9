"""Checks before a capture that its stores fit on their disks and can be written."""

from __future__ import annotations

import contextlib
import secrets
import shutil
from typing import TYPE_CHECKING

from ...data.errors import ColdstillError
from ...data.files import SCRATCH_PREFIX
from ..units import size

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from .sizes import StoreSize


def expect_room(stores: Iterable[StoreSize]) -> None:
    """Refuse a capture that does not fit, before its teacher is loaded. Leaves no files.

    Adds up the missing bytes of the stores on each disk of this machine. A remote store is not
    checked.

    Raises
        ColdstillError: the missing shards do not fit, or their folder cannot be written
    """
    disks: dict[int, list[StoreSize]] = {}
    for store in stores:
        if store.folder is not None and store.bytes_missing:
            expect_writable(store.folder)
            disks.setdefault(existing(store.folder).stat().st_dev, []).append(store)
    for held in disks.values():
        needed = sum(store.bytes_missing for store in held)
        folders = [store.folder for store in held if store.folder is not None]
        free = free_bytes(folders[0])
        if needed > free:
            about = "" if all(store.counted and store.measured for store in held) else "about "
            raise ColdstillError(
                f"{' and '.join(map(str, folders))}: {about}{size(needed)} must still be written "
                f"and {size(free)} are free; free some space, move the store elsewhere with "
                "logits.path, or keep less: logits.head, logits.tail, logits.sequences"
            )


def expect_writable(folder: Path) -> None:
    """Test that a folder can be written; it may not exist yet.

    Raises
        ColdstillError: it cannot be written, and why
    """
    near = existing(folder)
    if not near.is_dir():
        raise ColdstillError(
            f"{folder}: cannot be created: {near} is a file; move it or choose another folder"
        )
    trial = near / f"{SCRATCH_PREFIX}{secrets.token_hex(4)}"
    try:
        trial.mkdir()
        with contextlib.suppress(FileNotFoundError):  # another process may have cleaned up
            trial.rmdir()
    except OSError as error:
        raise ColdstillError(
            f"{folder}: cannot be written: {error.strerror} in {near}; choose another folder with "
            "--runs or logits.path, or change its permissions"
        ) from error


def free_bytes(folder: Path) -> int:
    """Free bytes of the disk of a folder, which may not exist yet."""
    return shutil.disk_usage(existing(folder)).free


def existing(path: Path) -> Path:
    """The path, or its nearest parent that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
