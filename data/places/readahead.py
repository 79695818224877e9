"""Fetches shards of an object store before they are read.

The readers may be other processes than this thread. Times in the cache show what they have used;
the reader of this process also notes it in `ReadAhead.used`.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
import time
from collections import deque
from typing import TYPE_CHECKING

from .cache import AHEAD

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from .cache import Entry, ShardCache

_POLL = 0.05
_LOOK = 32
"""How many entries are checked for use: readers follow the order only within a window."""


class _OvertakenError(Exception):
    """A reader was faster, and may have finished with the entry."""


class ReadAhead:
    """A thread that follows one order of shards and ends with the process.

    It ignores errors: a reader that needs the shard meets them itself.
    """

    def __init__(
        self,
        cache: ShardCache,
        wanted: Iterable[tuple[Entry, int]],
        download: Callable[[Entry, Path], None],
    ) -> None:
        """Start the thread.

        wanted    entries in order of first use, each with how many are in use from then on;
                  iterated in the thread
        download  writes an entry to a path
        """
        self.used: set[str] = set()
        """The labels of the entries that this process has used."""
        self._cache, self._wanted, self._download = cache, wanted, download
        self._began = self._kept = time.time_ns()
        self._ahead: deque[tuple[Entry, int]] = deque()
        self._in_use = 0
        self._largest = 0
        self._stopped = threading.Event()
        threading.Thread(target=self._run, name="coldstill read-ahead", daemon=True).start()

    def stop(self) -> None:
        """Fetch nothing more after the current entry."""
        self._stopped.set()

    def _run(self) -> None:
        try:
            with contextlib.suppress(Exception):
                self._follow()
        finally:
            self._pass(len(self._ahead))

    def _follow(self) -> None:
        for entry, in_use in self._wanted:
            self._largest = max(self._largest, entry.bytes)
            while not self._is_used(entry) and not self._fits(entry):
                if self._stopped.wait(_POLL):
                    return
            if self._stopped.is_set():
                return
            try:
                self._expect_unused(entry)
                bring = functools.partial(self._bring, entry)
                self._cache.get(entry, bring, ahead=self._began)
            except _OvertakenError:
                self._pass(len(self._ahead))
                self._in_use = in_use
            else:
                self._ahead.append((entry, in_use))
        while self._ahead and not self._stopped.wait(_POLL):
            self._forget_used()

    def _bring(self, entry: Entry, made: Path) -> None:
        self._expect_unused(entry)  # it may have waited long for room
        self._download(entry, made)

    def _expect_unused(self, entry: Entry) -> None:
        if self._is_used(entry):
            raise _OvertakenError

    def _fits(self, entry: Entry) -> bool:
        """Whether the entry fits beside the entries in use and those fetched ahead.

        At most half of the cache is fetched ahead: a run that ends early should not have paid for
        a whole store.
        """
        self._forget_used()
        ahead = sum(other.bytes for other, _ in self._ahead)
        beside = self._cache.limit - self._in_use * self._largest
        half = max(self._cache.limit // 2, entry.bytes)
        return ahead + entry.bytes <= min(beside, half)

    def _forget_used(self) -> None:
        nearest = list(itertools.islice(self._ahead, _LOOK))
        last = max((i for i, (entry, _) in enumerate(nearest) if self._is_used(entry)), default=-1)
        self._pass(last + 1)
        if time.time_ns() - self._kept > AHEAD * 1e9 / 3:
            self._kept = time.time_ns()
            for entry, _ in self._ahead:
                self._cache.keep_for_later(entry, self._began)

    def _pass(self, count: int) -> None:
        """Give up the first entries, as one of them or a later one was used, or none is wanted.

        An entry that was skipped was not needed: its blocks were still in memory.
        """
        for _ in range(count):
            entry, self._in_use = self._ahead.popleft()
            self._cache.give_up(entry, self._began)

    def _is_used(self, entry: Entry) -> bool:
        return entry.label in self.used or self._cache.used_since(entry, self._began)
