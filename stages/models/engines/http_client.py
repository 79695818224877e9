"""Requests to a server over HTTP: JSON there and back, repeated if a failure may be temporary."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPSConnection
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from ....data.errors import ColdstillError, StoppedError
from ....data.places.faults import Patience, passes, persistently, reason
from ...config import SERVER_KEY

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PATIENCE = Patience(tries=10, longest=60.0)
"""About four minutes: a server that is started again needs some."""
_CONNECTING = 30.0
"""Longest time until a connection is there, in seconds."""


class Http:
    """The requests to one server. Any thread may send them."""

    def __init__(self, root: str, timeout: float, note: Callable[[str], None]) -> None:
        """Name the server.

        root     its address, to which paths are added
        timeout  longest silence of the server during a request, in seconds
        note     called with a warning

        Raises
            ColdstillError: the key in the environment cannot be sent
        """
        self._root, self._timeout, self._note = root, timeout, note
        self._headers = {"Content-Type": "application/json"}
        if key := os.environ.get(SERVER_KEY, "").strip():
            if not key.isascii() or not key.isprintable():
                raise ColdstillError(f"{SERVER_KEY}: it has characters that a request cannot carry")
            self._headers["Authorization"] = f"Bearer {key}"
        self._lock, self._closing = threading.Lock(), threading.Event()
        self._connections: set[HTTPConnection] = set()
        self._failure: ColdstillError | None = None
        self._repeated = 0
        self._patience = _UntilClosed(
            tries=PATIENCE.tries,
            delay=PATIENCE.delay,
            longest=PATIENCE.longest,
            closing=self._closing,
        )

    def report(self) -> None:
        """Say how many requests were sent again, unless it was said of a single one."""
        if self._repeated > 1:
            self._note(f"{self._root}: {self._repeated} requests were sent again")

    def abort(self, failure: BaseException | None) -> None:
        """Let all requests fail with `failure`, those that wait for an answer, too."""
        with self._lock:
            if isinstance(failure, ColdstillError) and self._failure is None:
                self._failure = failure
            self._closing.set()
            for connection in self._connections:
                with contextlib.suppress(OSError, AttributeError):
                    connection.sock.shutdown(socket.SHUT_RDWR)

    def ask(self, path: str, body: dict[str, Any] | None = None) -> tuple[dict[str, Any], bool]:
        """The server's answer, and whether the request was sent again: it is if its failure may be
        temporary.

        Raises
            ColdstillError: the server refuses, or still fails
        """
        where, data = self._root + path, None if body is None else json.dumps(body).encode()
        repeated = False

        def attempt() -> Any:
            nonlocal repeated
            try:
                return self._sent(path, data)
            except ColdstillError:
                raise
            except Exception as error:
                if self._closing.is_set():
                    raise self._end_error() from error
                if not passes(error):
                    raise ColdstillError(f"{where}: {reason(error)}") from error
                repeated = True
                self._say_once(error)
                raise ConnectionError(reason(error)) from error

        answer = persistently(attempt, where, self._patience)
        if not isinstance(answer, dict):
            raise ColdstillError(f"{where}: the answer is not a JSON object")
        return answer, repeated

    def _sent(self, path: str, data: bytes | None) -> Any:
        """The answer to one request, as JSON."""
        parts = urlsplit(self._root)
        kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        connection = kind(str(parts.hostname), parts.port, timeout=_CONNECTING)
        with self._lock:
            if self._closing.is_set():
                raise self._end_error()
            self._connections.add(connection)
        try:
            connection.connect()
            connection.sock.settimeout(self._timeout)
            method = "GET" if data is None else "POST"
            connection.request(method, parts.path + path, data, self._headers)
            answer = connection.getresponse()
            text = answer.read()
        finally:
            with self._lock:
                self._connections.discard(connection)
            connection.close()
        if 300 <= answer.status < 400:
            raise ColdstillError(
                f"{self._root}{path}: it has moved to {answer.getheader('Location')}; correct "
                "teacher.url"
            )
        if answer.status in (401, 403):
            raise ColdstillError(
                f"{self._root}{path}: access refused ({answer.status}); set the environment "
                f"variable {SERVER_KEY}"
            )
        if answer.status != 200:
            refused = _StatusError(f"refused ({answer.status}): {_message(text, answer.reason)}")
            refused.status = answer.status
            raise refused
        try:
            return json.loads(text)
        except ValueError as error:
            if "json" in str(answer.getheader("Content-Type")):  # it was cut off
                raise ConnectionError("the answer is not whole") from error
            raise ColdstillError(
                f"{self._root}{path}: the answer is not JSON; is teacher.url the address of a "
                "server of vLLM?"
            ) from error

    def _say_once(self, error: Exception) -> None:
        with self._lock:
            self._repeated += 1
            first = self._repeated == 1
        if first:
            self._note(f"{self._root}: {reason(error)}; trying again")

    def _end_error(self) -> BaseException:
        return self._failure or StoppedError()

    @contextlib.contextmanager
    def parsing(self, path: str) -> Iterator[None]:
        """Turn an answer without what vLLM's has into one line."""
        try:
            yield
        except (ColdstillError, StoppedError):
            raise
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise ColdstillError(
                f"{self._root}{path}: its answer is not like one of vLLM: {type(error).__name__}: "
                f"{reason(error)}"
            ) from error


class _StatusError(Exception):
    """An answer that is a refusal; it may be temporary."""

    status = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class _UntilClosed(Patience):
    """Pauses that end when the server is no longer wanted."""

    closing: threading.Event

    def wait(self, attempt: int) -> None:
        self.closing.wait(min(self.longest, self.delay * 2**attempt))


def _message(text: bytes, otherwise: str) -> str:
    """What a server says of an error."""
    try:
        said = json.loads(text)
        said = said.get("error", said)
        said = said.get("message") or said.get("detail") or otherwise
    except (ValueError, AttributeError):
        said = otherwise
    return " ".join(str(said).split())[:300]
