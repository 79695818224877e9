"""How many logits are computed at a time. Loads no torch."""

from __future__ import annotations

CHUNK_ELEMENTS = 3 << 23
"""Logits in a chunk: 96 MB in fp32. Smaller chunks make the matrix products slower; larger chunks
only take memory (measured at V = 32,000 and 128,256)."""


def chunk_rows(vocabulary: int, elements: int = CHUNK_ELEMENTS) -> int:
    """Positions in a chunk of at most `elements` logits; at least one."""
    return max(1, elements // vocabulary)
