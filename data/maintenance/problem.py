"""What is found wrong with a store, as one line."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One thing that is wrong, and where."""

    what: str
    shard: int | None = None
    sequence: int | None = None
    """Its place in the store."""
    position: int | None = None
    """In the sequence."""
    missing: bool = False
    """Whether this is a shard that was never written, rather than damage."""

    def __str__(self) -> str:
        """`shard 3, sequence 812, position 17: what`."""
        places = {"shard": self.shard, "sequence": self.sequence, "position": self.position}
        where = ", ".join(f"{name} {place}" for name, place in places.items() if place is not None)
        return f"{where}: {self.what}" if where else self.what


def one_line(error: Exception) -> str:
    """What an error says."""
    text = f"lacks {error}" if isinstance(error, KeyError) else str(error)
    return " ".join(text.split()) or type(error).__name__
