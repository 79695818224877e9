"""Work on a whole store: verify, repair, convert, merge, slice and shrink it, shard by shard."""

from __future__ import annotations

from collections.abc import Callable

Notify = Callable[[str, int, int], None]
"""Receives the name of a step, how many sequences are done, and how many there are."""


def no_progress(what: str, done: int, total: int) -> None:
    """Ignore the progress."""
