"""Opens the place that a path or an address names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .cache_settings import CacheSettings
    from .place import Place


def place_at(path: str | Path, cache: CacheSettings | None = None) -> Place:
    """The place that a path or address names, such as `runs/demo/logits` or `s3://bucket/store`.

    cache  where copies of shards from object stores are kept, and how many bytes of them
    """
    from .local import LocalPlace

    # A Path drops one of the two slashes. One letter before the colon is a drive.
    protocol, colon, rest = str(path).partition(":/")
    if not colon or not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.:-]+", protocol):
        return LocalPlace(Path(path))
    rest = rest.removeprefix("/")
    if protocol == "file":
        return LocalPlace(Path("/", rest))
    from .remote import RemotePlace

    return RemotePlace(f"{protocol}://{rest}", cache)
