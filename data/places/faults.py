"""Which network errors are temporary, how often a request is repeated, and the final message.

The packages behind fsspec have their own error classes. They are recognised by a status, a code or
the names of their classes, so that these packages need not be installed.
"""

from __future__ import annotations

import errno
import random
import re
import socket
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import ColdstillError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_Result = TypeVar("_Result")

_PASSING_CODES = {
    "BadDigest", "ConditionalRequestConflict", "IncompleteBody", "InternalError",
    "OperationAborted", "RequestTimeout", "ServiceUnavailable", "SlowDown", "Throttling",
    "XAmzContentSHA256Mismatch",
}  # fmt: skip
_PASSING_STATUS = {408, 425, 429}
_LASTING_STATUS = {501, 505}
"""Not implemented, and unsupported version of HTTP: the only permanent errors from 500 on."""
_PASSING_NAMES = {
    "ChecksumError", "ChunkedEncodingError", "ClientConnectionError", "ClientPayloadError",
    "EndpointConnectionError", "FlexibleChecksumError", "HTTPClientError", "HTTPException",
    "IncompleteReadError", "ProtocolError", "ResponseParserError", "ResponseStreamingError",
    "ServiceRequestError", "ServiceResponseError", "TransportError",
}  # fmt: skip
_PASSING_ERRNO = {
    errno.EAGAIN, errno.EBUSY, errno.ECONNABORTED, errno.ECONNREFUSED, errno.ECONNRESET,
    errno.EHOSTUNREACH, errno.EIO, errno.ENETUNREACH, errno.EPIPE, errno.ETIMEDOUT,
    getattr(errno, "EREMOTEIO", errno.EIO),
    socket.EAI_AGAIN,  # a name that cannot be looked up just now; it is below 0, errors are above
}  # fmt: skip
_LASTING = (PermissionError, FileNotFoundError, FileExistsError, IsADirectoryError)
_OF_THIS_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How often a request is sent, and how long to wait in between."""

    tries: int = 6
    delay: float = 0.5
    """Seconds before the second attempt; the time doubles before each further attempt."""
    longest: float = 20.0
    """The longest time between two attempts, in seconds."""

    def wait(self, attempt: int) -> None:
        """Wait after attempt number `attempt`, for a partly random time, so that processes do not
        repeat all at once."""
        time.sleep(min(self.longest, self.delay * 2**attempt) * (0.5 + random.random()))


def persistently(call: Callable[[], _Result], where: str, patience: Patience) -> _Result:
    """The result of a call that is repeated if a network error is temporary.

    Raises
        FileNotFoundError, FileExistsError: the object does not exist, or exists
        OSError: this machine's disk is full or cannot be written
        ColdstillError: any other error that remains, in one line
    """
    for attempt in range(patience.tries):
        try:
            return call()
        except ColdstillError:
            raise
        except Exception as error:
            if _is_plain_answer(error) or _is_of_this_machine(error):
                raise
            if not passes(error):
                raise ColdstillError(f"{where}: {_lasting(error)}") from error
            if attempt + 1 == patience.tries:
                raise ColdstillError(
                    f"{where}: still failing after {patience.tries} tries ({reason(error)}); check "
                    "the network and run the same command again, what was finished is kept"
                ) from error
        patience.wait(attempt)
    raise AssertionError("no attempt was made")


def passes(error: BaseException) -> bool:
    """Whether the same call may succeed later."""
    chain = list(_chain(error))
    names = {kind.__name__ for link in chain for kind in type(link).__mro__}
    if _PASSING_NAMES & names:  # an interrupted answer has a status that the server did not mean
        return True
    for link in chain:
        if (status := _status(link)) is not None:
            server = status >= 500 and status not in _LASTING_STATUS
            return server or status in _PASSING_STATUS or code(link) in _PASSING_CODES
    for link in chain:
        if isinstance(link, _LASTING):
            return False
        if isinstance(link, (ConnectionError, TimeoutError, EOFError)):
            return True
        if isinstance(link, OSError) and link.errno in _PASSING_ERRNO:
            return True
    return False


def code(error: BaseException) -> str | None:
    """The code in a service's answer, such as `NoSuchBucket`, from an error or its causes."""
    for link in _chain(error):
        response = getattr(link, "response", None)
        if isinstance(response, dict):
            found = response.get("Error", {}).get("Code")
            return None if found is None else str(found)
    return None


def reason(error: BaseException) -> str:
    """The text of an error as part of a line, without secrets."""
    text = " ".join(str(error).split()) or type(error).__name__
    return without_secrets(text if len(text) <= 200 else text[:197] + "...")


def without_secrets(text: str) -> str:
    """The text with addresses that lack `user:password@` and the query, which holds signatures."""
    text = re.sub(r"//[^/@\s:]*:[^/@\s]*@", "//", text)
    return re.sub(r"(\w://[^\s?\"']*)\?[^\s\"']*", r"\1", text)


def _lasting(error: Exception) -> str:
    text = reason(error)
    names = {kind.__name__ for link in _chain(error) for kind in type(link).__mro__}
    if code(error) == "NoSuchBucket":
        return "there is no such bucket; create it, or correct the address"
    if isinstance(error, PermissionError) or "NoCredentialsError" in names:
        return (
            f"access refused ({text}); check the credentials that the environment gives, and what "
            "they allow"
        )
    kind = type(error).__name__
    return f"{text} ({kind}); check the address and the environment" if text != kind else text


def _is_plain_answer(error: Exception) -> bool:
    missing = isinstance(error, FileNotFoundError) and code(error) != "NoSuchBucket"
    return missing or isinstance(error, FileExistsError)


def _is_of_this_machine(error: Exception) -> bool:
    if not isinstance(error, OSError):
        return False
    is_local_file = isinstance(error, PermissionError) and error.filename is not None
    return error.errno in _OF_THIS_DISK or is_local_file


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and its causes."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        yield error
        error = error.__cause__ or error.__context__


def _status(error: BaseException) -> int | None:
    """The status of an HTTP answer, from any of the attributes in which packages keep it."""
    response: Any = getattr(error, "response", None)
    if isinstance(response, dict):
        found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return found if isinstance(found, int) else None
    for name in ("status", "status_code", "code"):
        found = getattr(error, name, None)
        if isinstance(found, (int, str)) and str(found).isdecimal():
            return int(found)
    return None
