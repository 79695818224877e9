"""What a merged store was made of, and what of that is left in a slice of it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ..fingerprint import json_sha256
from ..store.manifest import Part

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ..store.manifest import Manifest


def parts_of(manifest: Manifest) -> tuple[Part, ...]:
    """What a store was merged from, or itself as the only part."""
    whole = Part(
        corpus=manifest.corpus.fingerprint,
        documents=manifest.corpus.documents,
        packing=manifest.packing.fingerprint,
        sequences=manifest.sequences,
    )
    return manifest.parts or (whole,)


def parts_of_slice(parts: tuple[Part, ...], rows: NDArray[np.int64]) -> tuple[Part, ...]:
    """What each part gives to a slice of the whole."""
    made, start = [], 0
    for part in parts:
        inside = rows[(rows >= start) & (rows < start + part.sequences)] - start
        start += part.sequences
        if 0 < len(inside) < part.sequences:
            packing = json_sha256([part.packing, inside.tolist()])
            made.append(replace(part, packing=packing, sequences=len(inside)))
        elif len(inside):
            made.append(part)
    return tuple(made)
