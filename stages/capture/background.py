"""Threads that work while the model runs, with bounded queues.

An error in a task is raised by the next call of `submit`, and queued tasks are then skipped. No
call blocks for ever, and nothing counts as done that was not done.
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
    """Runs tasks on threads. A context manager; leaving it waits until all tasks are done.

    workers  threads; 0 runs every task at once, in the calling thread
    waiting  number of tasks that may wait for a thread before `submit` blocks
    """

    def __init__(self, workers: int, waiting: int = 2) -> None:
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
        """Wait for all submitted tasks, also after an interruption: they are few and worth keeping.

        Raises
            the error of a task, unless another error is being raised already
        """
        if self._executor is not None:
            self._executor.shutdown(wait=True)
        if error is None:
            self.check()

    def check(self) -> None:
        """Raise the error of a task, if one failed."""
        if self._error is not None:
            raise self._error

    def submit(self, task: Callable[[], object]) -> None:
        """Queue a task; blocks while too many are waiting.

        Raises
            the error of an earlier task
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
    """Makes items on a thread before they are needed. A context manager, iterated once inside."""

    def __init__(self, items: Iterator[_Item], depth: int = 2) -> None:
        """Make at most `depth` items more than were taken."""
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
        """Stop the thread."""
        self._left.set()
        while self._thread.is_alive():  # the thread may be waiting for space in the queue
            with contextlib.suppress(queue.Empty):
                self._queue.get(timeout=0.02)
        self._thread.join()

    def __iter__(self) -> Iterator[_Item]:
        """Items in order; raises the error that making an item raised."""
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
