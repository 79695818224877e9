"""The records of a source as sequences: which can be used, padding, document borders, numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..ragged import Ragged
from ..schema import Sequences, sequence_hash
from .rows import rows_for_each_token

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .reading import Reading, Tally
    from .rows import SourceRows

DOCUMENTS = 16
"""Bits of a document id for its number in the record; the others are the number of the record."""


def usable_records(
    rows: SourceRows, reading: Reading, tally: Tally
) -> tuple[SourceRows, NDArray[np.bool_]]:
    """The records with those left out that cannot be used, which get one token and no row."""
    tokens = rows.tokens
    faults = dict(rows.faults)
    outside = (tokens.values < 0) | (tokens.values >= reading.vocabulary)
    checks = {
        f"token ids outside the tokenizer's vocabulary of {reading.vocabulary:,}": outside,
    }
    record = np.searchsorted(tokens.offsets, np.flatnonzero(outside), side="right") - 1
    for what in checks:
        for index in np.unique(record).tolist():
            faults.setdefault(index, what)
    for index in np.flatnonzero(tokens.lengths == 0).tolist():
        faults.setdefault(index, "holds no token")
    for index in np.flatnonzero(tokens.lengths > reading.sequence_length).tolist():
        faults.setdefault(
            index,
            f"more tokens than the {reading.sequence_length:,} of --sequence-length: "
            f"{tokens.lengths[index]:,}",
        )
    many = rows.places.lengths > tokens.lengths
    for index in np.flatnonzero(many).tolist():
        faults.setdefault(
            index,
            f"more rows than tokens: {rows.places.lengths[index]} for {tokens.lengths[index]}",
        )
    good_N = np.ones(len(rows), np.bool_)
    for index in sorted(faults):
        tally.bad(rows.where(index), faults[index])
        good_N[index] = False
    if good_N.all():
        return rows, good_N
    lengths = np.where(good_N, tokens.lengths, 1)
    new = Ragged(np.zeros(int(lengths.sum()), np.int64), _borders(lengths))
    keep = np.flatnonzero(good_N)
    new.values[new.flat_indices(keep)] = tokens.values[tokens.flat_indices(keep)]
    own = rows.places.flat_indices(keep)
    counts = np.where(good_N, rows.places.lengths, 0)

    def masked(column: Ragged | None, fill: int) -> Ragged | None:
        if column is None:
            return None
        made = np.full(len(new.values), fill, column.values.dtype)
        made[new.flat_indices(keep)] = column.values[column.flat_indices(keep)]
        return Ragged(made, new.offsets)

    starts = rows.document_starts
    if starts is not None:
        parts = [starts[i] if good_N[i] else np.zeros(1, np.int64) for i in range(len(rows))]
        starts = Ragged.from_rows(parts, np.int64)
    return (
        type(rows)(
            name=rows.name,
            first=rows.first,
            tokens=new,
            places=Ragged(rows.places.values[own], _borders(counts)),
            ids=rows.ids[own],
            values=rows.values[own],
            own_logprob=None if rows.own_logprob is None else rows.own_logprob[own],
            full=None if rows.full is None else rows.full.take(own),
            learned=masked(rows.learned, 0),
            real=masked(rows.real, 1),
            document_starts=starts,
        ),
        good_N,
    )


def _borders(lengths: NDArray[Any]) -> NDArray[np.int64]:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


def first_real(rows: SourceRows) -> NDArray[np.int64]:
    """[N] number of padding tokens before the first real one."""
    if rows.real is None:
        return np.zeros(len(rows), np.int64)
    return np.array([int(r.argmax()) if r.any() else 0 for r in rows.real], np.int64)


def without_padding(rows: SourceRows) -> tuple[Ragged, Ragged, Ragged | None]:
    """Tokens, places and document borders without the padding before and after the text."""
    if rows.real is None:
        return rows.tokens, rows.places, rows.document_starts
    first = first_real(rows)
    last = np.array([len(r) - int(r[::-1].argmax()) if r.any() else 1 for r in rows.real])
    tokens = Ragged.from_rows(
        [t[a:b] for t, a, b in zip(rows.tokens, first, last, strict=True)], np.int64
    )
    # rows of padding keep places outside the text, where no label is
    shifted = rows.places.values - np.repeat(first, rows.places.lengths)
    places = Ragged(np.where(shifted < 0, -(1 << 40), shifted), rows.places.offsets)
    starts = rows.document_starts
    if starts is not None:
        parts = [
            np.unique(np.clip(s - a, 0, max(0, b - a - 1)))
            for s, a, b in zip(starts, first, last, strict=True)
        ]
        starts = Ragged.from_rows(parts, np.int64)
    return tokens, places, starts


def sequences_of(
    tokens: Ragged,
    starts: Ragged | None,
    record_M: NDArray[np.int64],
    position_M: NDArray[np.int64],
    first: int,
) -> Sequences:
    count = len(tokens)
    positions = Ragged(
        position_M.astype(np.int32), _borders(np.bincount(record_M, minlength=count))
    )
    numbers = np.arange(first, first + count)
    if starts is None:
        starts = Ragged(np.zeros(count, np.int32), np.arange(count + 1))
    within = rows_for_each_token(starts.lengths).values
    documents = (np.repeat(numbers, starts.lengths) << DOCUMENTS) + within
    starts = Ragged(starts.values.astype(np.int32), starts.offsets)
    tokens = Ragged(tokens.values.astype(np.int32), tokens.offsets)
    hashes = [sequence_hash(t, s, p) for t, s, p in zip(tokens, starts, positions, strict=True)]
    return Sequences(
        ids=numbers,
        tokens=tokens,
        document_starts=starts,
        document_ids=Ragged(documents, starts.offsets),
        positions=positions,
        hashes=np.array(hashes, np.uint64),
    )
