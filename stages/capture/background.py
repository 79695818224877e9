"""Work beside the processor that runs the model: a few threads, bounded queues, and no silence.

A task that fails stops the run with its error at the next call; what is queued behind it is not
begun, nobody waits for ever, and nothing counts as done that was not.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType

_Item = TypeVar("_Item")


class Background:
    """Tasks behind the model. A context manager: leaving it waits until all is done.

    workers  threads; 0 does every task at once, in the calling thread
    waiting  how many tasks may wait for a thread before `submit` blocks
    """

    def __init__(self, workers: int, waiting: int = 2) -> None:
        """Start nothing yet."""
        self._executor = ThreadPoolExecutor(workers, "coldstill") if workers else None
        self._room = threading.BoundedSemaphore(max(1, workers) + waiting)
        self._error: BaseException | None = None

    def __enter__(self) -> Background:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Wait for what was submitted: it is little, and whoever is interrupted wants to keep it.

        Raises
            whatever a task raised, unless another error is on its way already
        """
        if self._executor is not None:
            self._executor.shutdown(wait=True)
        if error is None:
            self.check()

    def check(self) -> None:
        """Raise what a task raised, if one did."""
        if self._error is not None:
            raise self._error

    def submit(self, task: Callable[[], object]) -> None:
        """Do it soon; blocks while too much is waiting.

        Raises
            whatever an earlier task raised
        """
        self.check()
        if self._executor is None:
            task()
            return
        self._room.acquire()
        try:
            self.check()
            self._executor.submit(self._run, task)
        except BaseException:
            self._room.release()
            raise

    def _run(self, task: Callable[[], object]) -> None:
        try:
            if self._error is None:
                task()
        except BaseException as error:
            self._error = self._error or error
        finally:
            self._room.release()


class Ahead(Generic[_Item]):
    """Items ahead of the model, made by a thread. A context manager, iterated once inside it."""

    def __init__(self, items: Iterator[_Item], depth: int = 2) -> None:
        """Make up to `depth` items more than were taken."""
        self._items = items
        self._queue: queue.Queue[tuple[bool, _Item | BaseException | None]] = queue.Queue(depth)
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._make, name="coldstill ahead", daemon=True)

    def __enter__(self) -> Ahead[_Item]:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Make no more."""
        self._left.set()
        while self._thread.is_alive():  # it may be waiting for room
            with contextlib.suppress(queue.Empty):
                self._queue.get(timeout=0.02)
        self._thread.join()

    def __iter__(self) -> Iterator[_Item]:
        """In order; raises what the making of an item raised."""
        while True:
            more, item = self._queue.get()
            if more:
                yield item  # type: ignore[misc]
            elif item is None:
                return
            else:
                raise item  # type: ignore[misc]

    def _make(self) -> None:
        try:
            for item in self._items:
                self._queue.put((True, item))
                if self._left.is_set():
                    return
            self._queue.put((False, None))
        except BaseException as error:
            self._queue.put((False, error))
