"""Where copies of shards from object stores are kept, and how many bytes of them."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_UNITS = {"": 1, "b": 1}
_UNITS |= {f"{letter}b": 1000**power for power, letter in enumerate("kmgt", 1)}
_UNITS |= {f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", 1)}


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheSettings:
    """A folder that all stores and processes of a machine may share."""

    folder: Path | None = None
    """None stands for `$COLDSTILL_CACHE`, or `~/.cache/coldstill` if that is not set."""
    bytes: int = 20 * 1000**3
    """The most bytes that the folder may hold."""

    @property
    def place(self) -> Path:
        """The folder."""
        named = os.environ.get("COLDSTILL_CACHE")
        return self.folder or (Path(named) if named else Path.home() / ".cache" / "coldstill")


def byte_count(value: Any) -> int:
    """A number of bytes, from a number or a text such as `20 GB` or `512 MiB`.

    Raises
        ValueError: the value is neither
    """
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-z]*)\s*", str(value).lower())
    if found is None or found[2] not in _UNITS or not 0 < float(found[1]) < 1e15:
        raise ValueError(f"{value!r} is not a size; write a number and a unit, such as '20 GB'")
    return max(1, round(float(found[1]) * _UNITS[found[2]]))
