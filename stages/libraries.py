"""Turns exceptions of other libraries into one-line errors for the user.

transformers, peft, torch's exporter, onnxruntime and tokenizers raise any class of exception, and
their messages may be pages long. Every call into them that can fail because of user input runs
inside `asking`.
"""

from __future__ import annotations

import contextlib
import errno
from typing import TYPE_CHECKING

from ..data.errors import ColdstillError, first_line

if TYPE_CHECKING:
    from collections.abc import Iterator


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
