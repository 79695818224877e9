"""Whether what is still to be written fits on the disks it goes to, and may be written there."""

from __future__ import annotations

import contextlib
import secrets
import shutil
from typing import TYPE_CHECKING

from ...data.errors import ColdstillError
from ...data.files import SCRATCH_PREFIX
from ..units import size
from .sizes import StoreSize, store_sizes

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from ..recipe.reading import LoadedRecipe
    from ..recipe.run_folder import Run


def expect_room(loaded: LoadedRecipe, run: Run) -> None:
    """Refuse a capture that cannot end well, before its teacher is loaded.

    Counts what is missing of the stores on this machine, disk by disk; a distant store has as much
    room as it has. Leaves nothing behind.

    Raises
        ColdstillError: the missing shards do not fit, or their folder cannot be written
    """
    expect_room_for(store_sizes(loaded, run).values())


def expect_room_for(stores: Iterable[StoreSize]) -> None:
    """The same, of stores whose sizes are known; raises as `expect_room`."""
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
                f"{' and '.join(map(str, folders))}: {about}{size(needed)} are still to be written "
                f"and {size(free)} are free; free some space, put the store elsewhere with "
                "logits.path, or keep less: logits.head, logits.tail, logits.sequences"
            )


def expect_writable(folder: Path) -> None:
    """Try whether something can be made in a folder that may not be there yet.

    Raises
        ColdstillError: it cannot, and why
    """
    near = existing(folder)
    if not near.is_dir():
        raise ColdstillError(
            f"{folder}: cannot be made: {near} is a file; move it away or choose another place"
        )
    trial = near / f"{SCRATCH_PREFIX}{secrets.token_hex(4)}"
    try:
        trial.mkdir()
        with contextlib.suppress(FileNotFoundError):  # another process may have tidied up
            trial.rmdir()
    except OSError as error:
        raise ColdstillError(
            f"{folder}: cannot be written: {error.strerror} in {near}; choose another place with "
            "--runs or logits.path, or change its permissions"
        ) from error


def free_bytes(folder: Path) -> int:
    """Of the disk that a folder, which may not be there yet, will lie on."""
    return shutil.disk_usage(existing(folder)).free


def existing(path: Path) -> Path:
    """The path, or the nearest one above it that is there."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
