"""The boundary to other libraries: whatever they raise becomes one line for the user.

transformers, peft, torch's exporter, onnxruntime and tokenizers raise any class of exception, and
their messages may be pages long. Every call into them that a user's input can make fail runs inside
`asking`.
"""

from __future__ import annotations

import contextlib
import errno
from typing import TYPE_CHECKING

from ..data.errors import ColdstillError

if TYPE_CHECKING:
    from collections.abc import Iterator

_LONGEST = 200
"""Characters of a library's answer that are shown: enough to search for it."""
_MORE = " ..."
"""At the end of one that is longer."""


@contextlib.contextmanager
def asking(library: str, action: str, *, where: str, remedy: str = "") -> Iterator[None]:
    """Turn what `library` raises into a one-line `ColdstillError`.

    library  who is asked, for the message: `transformers`, `onnxruntime`
    action   what it is asked to do, as an infinitive without `to`: `save the model`
    where    what the user can change: a recipe's key, a folder
    remedy   what the user can do, without a stop at its end

    Raises
        ColdstillError: the library failed. Errors of our own pass through as they are, and so do
            `MemoryError` and a full disk, which are no answer of the library's
    """
    try:
        yield
    except (ColdstillError, MemoryError):
        raise
    except Exception as error:  # libraries raise whatever their authors liked
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        advice = f"; {remedy}" if remedy else ""
        raise ColdstillError(
            f"{where}: {library} cannot {action}: {first_line(error)}{advice}"
        ) from error


def _cut(line: str) -> str:
    """The first words of what is too long, and that there is more."""
    if len(line) <= _LONGEST:
        return line
    begin = line[: _LONGEST - len(_MORE)]
    return begin[: begin.rfind(" ")].rstrip(" ,;.") + _MORE if " " in begin else begin + _MORE


def first_line(error: BaseException) -> str:
    """What an exception says, in at most one line of 200 characters; its class if it says nothing.

    A line that ends in a colon goes on in the next one. A `KeyError` says only which key it missed,
    so its class stands before it.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    line = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    line = _cut(line.rstrip(" .;"))
    return f"{type(error).__name__}: {line}" if isinstance(error, KeyError) else line
