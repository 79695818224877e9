"""The output of a command without a terminal."""

from __future__ import annotations

import re

_START = re.compile(r".+: starts(, 0 of [\d,]+ [\w ]+| at [\d,]+.*)?")


def sentences(said: str) -> list[str]:
    """The lines of the output except those at the start of a stage."""
    return [line for line in said.splitlines() if not _START.fullmatch(line)]
