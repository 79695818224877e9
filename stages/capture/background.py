"""Threads that work while the model runs, with a bounded number of items and tasks."""

from __future__ import annotations

import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator
    from concurrent.futures import Future
    from types import TracebackType

_Item = TypeVar("_Item")


class Background:
    """Runs tasks on threads. A context manager; leaving it waits until all tasks are done.

    An error in a task is raised by a later `submit`, or when the context is left. Tasks that have
    not started by then are skipped.
    """

    def __init__(self, workers: int, waiting: int = 2) -> None:
        """Use `workers` threads; `submit` blocks while `waiting` more tasks are queued."""
        self._executor = ThreadPoolExecutor(workers, "coldstill")
        self._limit = workers + waiting
        self._tasks: deque[Future[object]] = deque()
        self._failed = threading.Event()

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
        self._executor.shutdown(wait=True)
        if error is None:
            for task in self._tasks:
                task.result()

    def submit(self, task: Callable[[], object]) -> None:
        """Queue a task; blocks while too many are waiting.

        Raises
            the error of an earlier task
        """
        while self._tasks and (self._failed.is_set() or len(self._tasks) >= self._limit):
            self._tasks.popleft().result()
        self._tasks.append(self._executor.submit(self._run, task))

    def _run(self, task: Callable[[], object]) -> None:
        if not self._failed.is_set():
            try:
                task()
            except BaseException:
                self._failed.set()
                raise


def ahead(items: Iterator[_Item], depth: int = 2) -> Generator[_Item, None, None]:
    """Items in order, made on a thread up to `depth` in advance; raises the error of making one.

    Closing the generator stops the thread.
    """
    end = object()
    executor = ThreadPoolExecutor(1, "coldstill ahead")
    try:
        waiting = deque(executor.submit(next, items, end) for _ in range(depth))
        while (item := waiting.popleft().result()) is not end:
            waiting.append(executor.submit(next, items, end))
            yield item  # type: ignore[misc]
    finally:
        executor.shutdown(wait=True, cancel_futures=True)
