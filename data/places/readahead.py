"""Shards of a distant store, fetched before they are wanted.

Readers and this thread may be different processes: what was used is known by the times in the
cache, and by what this process's own reader says.
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

    from .cache import ShardCache
    from .cache_entry import Entry

_POLL = 0.05
_LOOK = 32
"""So many of the next ones may have been used: readers go a window of the order in any sequence."""


class _OvertakenError(Exception):
    """A reader was faster, and may be done with it already."""


class ReadAhead:
    """A thread that follows one order of shards. It ends with the process, and tells no errors:
    whoever wants the shard meets them."""

    def __init__(
        self,
        cache: ShardCache,
        wanted: Iterable[tuple[Entry, int]],
        download: Callable[[Entry, Path], None],
    ) -> None:
        """Begin.

        wanted    entries in order of first use, each with how many are in use from then on; asked
                  for one by one, in the thread
        download  makes one at a path
        """
        self.used: set[str] = set()
        """The labels that this process has used."""
        self._cache, self._wanted, self._download = cache, wanted, download
        self._began = self._kept = time.time_ns()
        self._ahead: deque[tuple[Entry, int]] = deque()
        self._in_use = 0
        self._largest = 0
        self._stopped = threading.Event()
        threading.Thread(target=self._run, name="coldstill read-ahead", daemon=True).start()

    def stop(self) -> None:
        """Fetch nothing more, once what is on its way has come."""
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
        self._expect_unused(entry)  # room may have been long in coming
        self._download(entry, made)

    def _expect_unused(self, entry: Entry) -> None:
        if self._is_used(entry):
            raise _OvertakenError

    def _fits(self, entry: Entry) -> bool:
        """Whether it can be fetched without anything being deleted that is in use or ahead.

        Never more than half of the cache is ahead: a run that ends early should not have paid for
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
        """Leave the first few behind, for one of them or a later one is used, or none wanted.

        One that was not touched was not needed: its blocks were still in memory.
        """
        for _ in range(count):
            entry, self._in_use = self._ahead.popleft()
            self._cache.give_up(entry, self._began)

    def _is_used(self, entry: Entry) -> bool:
        return entry.label in self.used or self._cache.used_since(entry, self._began)
