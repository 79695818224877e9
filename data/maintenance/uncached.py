"""A store as it lies where it is, not as a cache remembers it."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from ..places.cache_settings import CacheSettings
from ..places.local import LocalPlace
from ..places.opening import place_at

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ..places.place import Place


@contextlib.contextmanager
def uncached(path: str) -> Iterator[tuple[Place, Callable[[], None]]]:
    """The place, and a function that forgets what was fetched from it.

    What is distant is fetched into an empty folder: a whole copy in the usual cache would hide that
    the object has been damaged since. Called after each shard, the function keeps that folder as
    small as one of them.
    """
    place = place_at(path)
    if isinstance(place, LocalPlace):
        yield place, lambda: None
        return
    with tempfile.TemporaryDirectory(prefix="coldstill-") as folder:

        def forget() -> None:
            for entry in Path(folder).iterdir():
                if entry.is_dir():
                    shutil.rmtree(entry)

        yield place_at(path, CacheSettings(folder=Path(folder), bytes=1 << 62)), forget
