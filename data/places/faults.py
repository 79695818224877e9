"""Which faults of a network pass by themselves, how often something is tried again, and what is
said when it stays wrong.

The packages behind fsspec raise errors of their own, so they are told apart by what they carry (a
status, a code) and by the names of their classes: none of them need be installed here.
"""

from __future__ import annotations

import errno
import random
import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import ColdstillError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_Result = TypeVar("_Result")

_PASSING_CODES = {
    "BadDigest",
    "ConditionalRequestConflict",
    "IncompleteBody",
    "InternalError",
    "OperationAborted",
    "RequestTimeout",
    "ServiceUnavailable",
    "SlowDown",
    "Throttling",
    "XAmzContentSHA256Mismatch",
}
_PASSING_STATUS = {408, 425, 429}
_LASTING_STATUS = {501, 505}
"""Not implemented, and the wrong version of HTTP: the only answers from 500 on that stay."""
_PASSING_NAMES = {
    "ChecksumError",
    "ChunkedEncodingError",
    "ClientConnectionError",
    "ClientPayloadError",
    "EndpointConnectionError",
    "FlexibleChecksumError",
    "HTTPClientError",
    "HTTPException",
    "IncompleteReadError",
    "ProtocolError",
    "ResponseParserError",
    "ResponseStreamingError",
    "ServiceRequestError",
    "ServiceResponseError",
    "TransportError",
}
_PASSING_ERRNO = {
    errno.EAGAIN,
    errno.EBUSY,
    errno.ECONNABORTED,
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.EHOSTUNREACH,
    errno.EIO,
    errno.ENETUNREACH,
    errno.EPIPE,
    errno.ETIMEDOUT,
    getattr(errno, "EREMOTEIO", errno.EIO),
}
_LASTING = (PermissionError, FileNotFoundError, FileExistsError, IsADirectoryError)
_OF_THIS_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How often something is tried, and how long is waited in between."""

    tries: int = 6
    delay: float = 0.5
    """Seconds before the second try; twice as long before each one after it,"""
    longest: float = 20.0
    """but never longer than this."""

    def wait(self, attempt: int) -> None:
        """Wait after try number `attempt`, more or less: many must not come back at once."""
        time.sleep(min(self.longest, self.delay * 2**attempt) * (0.5 + random.random()))


def persistently(call: Callable[[], _Result], where: str, patience: Patience) -> _Result:
    """The result of a call that may fail for reasons that pass by themselves.

    Raises
        FileNotFoundError, FileExistsError: what they say
        OSError: this machine's disk is full or cannot be written
        ColdstillError: anything else that stays wrong, in one line
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
                raise ColdstillError(f"{where}: {_what_is_wrong(error)}") from error
            if attempt + 1 == patience.tries:
                raise ColdstillError(
                    f"{where}: still failing after {patience.tries} tries ({reason(error)}); check "
                    "the network and run the same command again, what was finished is kept"
                ) from error
        patience.wait(attempt)
    raise AssertionError("tried not even once")


def passes(error: BaseException) -> bool:
    """Whether the same call may succeed a little later."""
    chain = list(_chain(error))
    names = {kind.__name__ for link in chain for kind in type(link).__mro__}
    if _PASSING_NAMES & names:  # an answer that breaks off carries a status, and not the server's
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
    """The code of a service's answer, such as `NoSuchBucket`, from an error or its causes."""
    for link in _chain(error):
        response = getattr(link, "response", None)
        if isinstance(response, dict):
            found = response.get("Error", {}).get("Code")
            return None if found is None else str(found)
    return None


def reason(error: BaseException) -> str:
    """What an error says, as a piece of a line, without anything secret."""
    text = " ".join(str(error).split()) or type(error).__name__
    return without_secrets(text if len(text) <= 200 else text[:197] + "...")


def without_secrets(text: str) -> str:
    """Addresses without `user:password@` and without the query, where signatures stand."""
    text = re.sub(r"//[^/@\s:]*:[^/@\s]*@", "//", text)
    return re.sub(r"(\w://[^\s?\"']*)\?[^\s\"']*", r"\1", text)


def _what_is_wrong(error: Exception) -> str:
    said = reason(error)
    names = {kind.__name__ for link in _chain(error) for kind in type(link).__mro__}
    if code(error) == "NoSuchBucket":
        return "there is no such bucket; create it, or correct the address"
    if isinstance(error, PermissionError) or "NoCredentialsError" in names:
        return (
            f"access refused ({said}); check the credentials that the environment gives, and what "
            "they allow"
        )
    kind = type(error).__name__
    return f"{said} ({kind}); check the address and the environment" if said != kind else said


def _is_plain_answer(error: Exception) -> bool:
    missing = isinstance(error, FileNotFoundError) and code(error) != "NoSuchBucket"
    return missing or isinstance(error, FileExistsError)


def _is_of_this_machine(error: Exception) -> bool:
    if not isinstance(error, OSError):
        return False
    is_local_file = isinstance(error, PermissionError) and error.filename is not None
    return error.errno in _OF_THIS_DISK or is_local_file


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what led to it."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        yield error
        error = error.__cause__ or error.__context__


def _status(error: BaseException) -> int | None:
    """The status of an HTTP answer, wherever a package keeps it."""
    response: Any = getattr(error, "response", None)
    if isinstance(response, dict):
        found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return found if isinstance(found, int) else None
    for name in ("status", "status_code", "code"):
        found = getattr(error, name, None)
        if isinstance(found, (int, str)) and str(found).isdecimal():
            return int(found)
    return None
