"""An unreliable local network: an HTTP proxy that breaks chosen requests to a server."""

from __future__ import annotations

import http.client
import re
import socket
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from email.message import Message

Kind = Literal["refused", "lost", "cut", "busy", "denied", "short", "flipped", "slow"]
_ERRORS = {
    "busy": (503, "SlowDown", "Please reduce your request rate."),
    "denied": (403, "AccessDenied", "Access Denied"),
}
_SPOILED = ("short", "flipped")
_HOP = ("connection", "keep-alive", "transfer-encoding", "content-length", "date", "server")


@dataclass(slots=True)
class Fault:
    """A fault: what goes wrong, for which requests, and how often."""

    kind: Kind
    match: str
    """A regular expression, searched in `METHOD /path`."""
    times: int = 10**9
    seconds: float = 0.0
    """How long a slow answer takes."""


class FaultyProxy:
    """Forwards requests; a context manager that stops its server."""

    def __init__(self, host: str, port: int) -> None:
        """Forward requests to a server."""
        self.faults: list[Fault] = []
        self.log: list[str] = []
        """`METHOD /path` of every request, in order."""
        self._upstream = host, port
        self._deciding = threading.Lock()
        proxy = self

        class Handler(_Handler):
            owner = proxy

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))

    def __enter__(self) -> FaultyProxy:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        """The address of the proxy."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def spoil(self, kind: Kind, match: str, times: int = 10**9, seconds: float = 0.0) -> None:
        """Break the next matching requests, a given number of times."""
        self.faults.append(Fault(kind, match, times, seconds))

    def count(self, match: str) -> int:
        """The number of requests that matched."""
        return sum(re.search(match, request) is not None for request in self.log)

    def decide(self, request: str) -> Fault | None:
        """Count a request and return its fault."""
        with self._deciding:
            self.log.append(request)
            for fault in self.faults:
                if fault.times and re.search(fault.match, request):
                    fault.times -= 1
                    return fault
        return None

    def forward(
        self, method: str, path: str, headers: Message, body: bytes
    ) -> tuple[int, list[tuple[str, str]], bytes]:
        """The answer of the server."""
        connection = http.client.HTTPConnection(*self._upstream)
        try:
            connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
            for name, value in headers.items():
                if name.lower() not in ("connection", "transfer-encoding", "expect"):
                    connection.putheader(name, value)
            connection.endheaders(body)
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            connection.close()


class _Handler(BaseHTTPRequestHandler):
    """One connection of a client."""

    owner: FaultyProxy
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each body waits 40 ms for its header to be acknowledged

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.owner.decide(f"{self.command} {self.path}")
        kind = fault.kind if fault else None
        if kind == "refused":
            self._hang_up()
            return
        if kind in _ERRORS:
            status, code, message = _ERRORS[kind]
            text = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
            self._send(status, [("Content-Type", "application/xml")], text)
            return
        status, headers, content = self.owner.forward(self.command, self.path, self.headers, body)
        if kind == "lost":
            self._hang_up()
            return
        if fault is not None and kind == "slow":
            time.sleep(fault.seconds)
        if kind in _SPOILED:
            # without a checksum beside it, as from services that send none
            headers = [pair for pair in headers if "checksum" not in pair[0].lower()]
        if kind == "short":
            content = content[: len(content) // 2]
        if kind == "flipped" and content:
            middle = len(content) // 2
            content = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        self._send(status, headers, content, cut=kind == "cut")

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _answer

    def _send(
        self, status: int, headers: list[tuple[str, str]], body: bytes, *, cut: bool = False
    ) -> None:
        self.send_response_only(status)
        length = {name.lower(): value for name, value in headers}.get("content-length")
        for name, value in headers:
            if name.lower() not in _HOP:
                self.send_header(name, value)
        size = length if self.command == "HEAD" and length else str(len(body))
        self.send_header("Content-Length", size)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            self._hang_up()

    def _hang_up(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, format: str, *arguments: object) -> None:
        """Write no log."""
