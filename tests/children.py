"""Processes and threads beside a test; the processes can import the test kits."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    import pytest


def child(code: str, *arguments: object) -> subprocess.Popen[str]:
    """Start Python code in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])},
        text=True,
    )


def expect_line(process: subprocess.Popen[str], line: str) -> None:
    """Wait for the next line of a process."""
    assert process.stdout is not None
    assert process.stdout.readline() == f"{line}\n"


@contextlib.contextmanager
def running(code: str, *arguments: object, line: str) -> Iterator[subprocess.Popen[str]]:
    """A process that has printed `line`; it is killed at the end."""
    with child(code, *arguments) as process:
        try:
            expect_line(process, line)
            yield process
        finally:
            process.kill()


def outputs(code: str, *arguments: object, count: int) -> list[str]:
    """What several processes print that begin together: each prints `ready` and reads a line."""
    processes = [child(code, *arguments) for _ in range(count)]
    for process in processes:
        expect_line(process, "ready")
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    found = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * count
    return found


def together(*calls: Callable[[], Any]) -> list[Any]:
    """Run calls in threads; returns their results, or raises the first error."""
    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]


class Killed(BaseException):
    """The process is gone."""


class Dying:
    """Counts calls of some functions; from number `last` on they do nothing but raise.

    Nothing cleans up after a process that was killed, so its clean-up must fail like the rest.
    """

    def __init__(
        self, patch: pytest.MonkeyPatch, last: int, functions: Iterable[tuple[Any, str]]
    ) -> None:
        self.calls = 0
        for owner, name in functions:
            patch.setattr(owner, name, self._counted(getattr(owner, name), last))

    def _counted(self, original: Callable[..., Any], last: int) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            self.calls += 1
            if self.calls >= last:
                raise Killed
            return original(*arguments, **options)

        return wrapped
