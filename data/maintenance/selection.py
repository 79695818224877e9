"""Chooses sequences of a store for a slice."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..errors import ColdstillError
from . import Notify, quiet

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..store.reader import StoreReader


def chosen_rows(
    store: StoreReader,
    *,
    sequences: str | None = None,
    documents: str | None = None,
    fraction: float | None = None,
    seed: int = 0,
    notify: Notify = quiet,
) -> NDArray[np.int64]:
    """[N] indices of the sequences that meet every condition, in store order.

    sequences  `A:B`, by index in the store, B not included
    documents  `A:B`, sequences that hold a part of one of these documents
    fraction   a seeded random share of those that meet the other conditions

    Raises
        ColdstillError: no condition, an invalid range, or a share outside (0, 1]
    """
    if sequences is None and documents is None and fraction is None:
        raise ColdstillError("slice: name what to keep: --sequences, --documents or --fraction")
    rows = np.arange(len(store))
    if sequences is not None:
        start, end = _range(sequences, "--sequences")
        rows = rows[start:end]
    if documents is not None:
        start, end = _range(documents, "--documents")
        rows = _with_documents(store, rows, start, end, notify)
    if fraction is not None:
        if not 0.0 < fraction <= 1.0:
            raise ColdstillError(f"--fraction: {fraction} is not above 0 and at most 1")
        random = np.random.Generator(np.random.PCG64([seed, 2]))
        count = min(len(rows), max(1, round(fraction * len(rows))))
        rows = np.sort(random.choice(rows, count, replace=False))
    return rows


def _with_documents(
    store: StoreReader, rows: NDArray[np.int64], start: int, end: int | None, notify: Notify
) -> NDArray[np.int64]:
    step = store.manifest.block_sequences
    kept = []
    for first in range(0, len(rows), step):
        part = rows[first : first + step]
        ids = store.read(part).sequences.document_ids
        inside = (ids.values >= start) & (ids.values < (np.inf if end is None else end))
        holders = np.unique(np.repeat(np.arange(len(part)), ids.lengths)[inside])
        kept.append(part[holders])
        notify("find documents", first + len(part), len(rows))
    return np.concatenate(kept) if kept else rows


def _range(text: str, option: str) -> tuple[int, int | None]:
    """Parse `A:B`, in which either number may be missing."""
    first, colon, last = text.partition(":")
    numbers = [number for number in (first, last) if number]
    if not colon or not all(n.isascii() and n.isdecimal() for n in numbers):
        raise ColdstillError(f"{option}: {text!r} is not a range such as 10:20")
    return int(first or 0), int(last) if last else None
