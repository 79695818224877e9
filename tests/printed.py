"""The output of a command without a terminal."""

from __future__ import annotations

import re

_START = re.compile(r".+: starts(, 0 of [\d,]+ [\w ]+| at [\d,]+.*)?|next: coldstill .+")


def sentences(output: str) -> list[str]:
    """Its lines without the starts of stages and the next command."""
    return [line for line in output.splitlines() if not _START.fullmatch(line)]
