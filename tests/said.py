"""What a command has said, without a terminal."""

from __future__ import annotations

import re

_START = re.compile(r".+: starts(, 0 of [\d,]+ [\w ]+| at [\d,]+.*)?")


def sentences(said: str) -> list[str]:
    """Its lines but those that tell that a stage starts."""
    return [line for line in said.splitlines() if not _START.fullmatch(line)]
