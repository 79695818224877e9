"""What is done to a whole store: it is checked, repaired, written anew in another form.

Nobody needs this to read a store or to capture one. Everything here streams: one shard at a time.
"""

from __future__ import annotations

from collections.abc import Callable

Tell = Callable[[str, int, int], None]
"""What is being done, how many sequences it is done for, and of how many."""


def quiet(what: str, done: int, total: int) -> None:
    """Tell nobody."""
