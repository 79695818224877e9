"""Turns exceptions of other libraries into one-line errors for the user.

transformers, peft, torch's exporter, onnxruntime and tokenizers raise any class of exception, and
their messages may be pages long. Every call into them that can fail because of user input runs
inside `asking`.
"""

from __future__ import annotations

import contextlib
import errno
from typing import TYPE_CHECKING

from ..data.errors import ColdstillError

if TYPE_CHECKING:
    from collections.abc import Iterator

_LONGEST = 200
"""Most characters of a library's message that are shown, enough to search for it."""
_MORE = " ..."
"""Marks a message that was cut."""


@contextlib.contextmanager
def asking(library: str, action: str, *, where: str, remedy: str = "") -> Iterator[None]:
    """Turn an exception of `library` into a one-line `ColdstillError`.

    library  name for the message: `transformers`, `onnxruntime`
    action   the attempted action, as an infinitive without `to`: `save the model`
    where    the thing that the user can change: a recipe's key, a folder
    remedy   the advice for the user, without a full stop

    Raises
        ColdstillError: the library failed. A `ColdstillError`, a `MemoryError` and a full disk
            pass through unchanged
    """
    try:
        yield
    except (ColdstillError, MemoryError):
        raise
    except Exception as error:  # libraries raise any class
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        advice = f"; {remedy}" if remedy else ""
        raise ColdstillError(
            f"{where}: {library} cannot {action}: {first_line(error)}{advice}"
        ) from error


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
