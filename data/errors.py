"""Errors whose text is shown to the user."""

from __future__ import annotations

_LONGEST = 200
"""Most characters of a library's message that are shown, enough to search for it."""
_MORE = " ..."
"""Marks a message that was cut."""


class ColdstillError(Exception):
    """An error that the user can act on.

    The text is one line: *where: what is wrong, the value, what was expected; what to do*.
    The command line prints it without a traceback and exits with status 1.
    """


class DamageError(ColdstillError):
    """A part of a store is not what was written.

    A repair deletes a shard only because of this error: a network error is not damage.
    """


class DivergedError(ColdstillError):
    """A training reached a NaN or infinite loss or gradient, because of its settings. Other
    trainings may continue."""


class StoppedError(BaseException):
    """The user asked to stop, as with Ctrl-C; not a failure."""


def first_line(error: BaseException) -> str:
    """The message of an exception in one line of at most 200 characters; its class if it is empty.

    A line that ends with a colon continues in the next one. The message of a `KeyError` is only the
    missing key, so its class is put before it.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    line = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    line = line.rstrip(" .;")
    if len(line) > _LONGEST:
        begin = line[: _LONGEST - len(_MORE)]
        line = (begin[: begin.rfind(" ")].rstrip(" ,;.") if " " in begin else begin) + _MORE
    return f"{type(error).__name__}: {line}" if isinstance(error, KeyError) else line
