"""Whether `compact` is decoded by numpy or by loops that numba compiles. Both give the same bits.

numba is optional (`coldstill[fast]`). Loading its loops takes a second, and compiling them, once
for each machine and version, some ten. Therefore a process begins with numpy and changes to them
when it has decoded as many positions as make up for it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from typing import Any

WORTHWHILE = 1 << 21
"""Positions that a process decodes with numpy first: a second or two."""
_decoded = 0


def loops(positions: int) -> Any:
    """The module `loops`, or None where numpy decodes.

    positions  how many are decoded next
    """
    global _decoded
    # threads that add at the same time may lose a count, which moves the change a little
    before, _decoded = _decoded, _decoded + positions
    return _loaded() if before >= WORTHWHILE else None


@functools.cache
def _loaded() -> Any:
    if importlib.util.find_spec("numba") is None:
        return None
    try:
        return importlib.import_module(f"{__package__}.loops")
    except Exception as error:
        # a numba for another numpy, no folder for what it compiles, a processor that it lacks
        first = str(error).strip().partition("\n")[0]
        warnings.warn(
            f"numba is installed but cannot be used, so numpy decodes: {first}", stacklevel=2
        )
        return None
