"""The rules that every decoded block must keep, for any codec and store format.

Shapes and dtypes are checked first. If they are wrong, the other rules have no meaning.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from ..alignment import labels
from ..columns import check_hashes
from ..ragged import Ragged
from ..schema import LONGEST_CHUNK, target_shapes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from ..schema import Block, Capture, Sequences, Targets

_FLOAT = 1e-5
"""The float32 error of a log-probability, or of the square root of a probability."""
_MASS = 1e-4
"""Largest accepted difference of the sum of a record's probabilities from 1. (Measured at
V = 262,144 on a CPU: 1.2e-5; fp32 sums over a vocabulary are not better.)"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """The limits that a block is checked against."""

    vocabulary: int
    """V, the number of tokens."""
    sequence_length: int
    capture: Capture
    maximum: float
    """Largest accepted error of sqrt(p) of a head entry (`data.codecs`)."""
    rounding: float
    """Largest accepted error of entropies and of label and sample log-probabilities, in nats."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One rule that a block breaks, and the first place where it does."""

    what: str
    row: int | None = None
    """Index of the sequence in the block."""
    position: int | None = None
    """Index of the position in the sequence."""
    count: int = 1
    """Number of places in the block that break the rule."""


def check_block(block: Block, rows: int, rules: Rules) -> list[Finding]:
    """All rules that a block of `rows` sequences breaks."""
    shapes = list(_shapes(block, rows, rules))
    if shapes:
        return shapes
    found = list(_sequences(block.sequences, rules))
    # a label outside its sequence has no token id
    aligned = not any(finding.what == _MISPLACED for finding in found)
    return found + list(_targets(block, aligned, rules))


def _shapes(block: Block, rows: int, rules: Rules) -> Iterator[Finding]:
    if len(block) != rows:
        yield Finding(f"holds {len(block)} sequences, expected {rows}")
        return
    flat: dict[str, Any] = {"ids": np.int64, "hashes": np.uint64}
    ragged = {"tokens": np.int32, "document_starts": np.int32, "positions": np.int32}
    for name, dtype in ({**flat, **ragged, "document_ids": np.int64}).items():
        value = getattr(block.sequences, name)
        is_list = isinstance(value, Ragged)
        array = value.values if isinstance(value, Ragged) else value
        if is_list is (name in flat) or array.dtype != dtype or array.ndim != 1:
            yield Finding(f"'{name}' should be {np.dtype(dtype).name}, is {array.dtype}")
        elif len(value) != rows:
            yield Finding(f"'{name}' has {len(value)} rows, expected {rows}")
    count, tail = len(block.sequences.positions.values), block.targets.tail
    arrays: dict[str, Any] = {}
    shapes = target_shapes(rules.capture, count)
    for name in shapes:
        arrays[name] = getattr(block.targets, name)
    drawn = (len(tail.ids),)
    shapes |= {
        "tail.offsets": ((count + 1,), np.int64),
        "tail.ids": (drawn, np.int32),
        "tail.counts": (drawn, tail.counts.dtype if tail.counts.dtype.kind in "iu" else np.uint8),
    }
    if rules.capture.keeps_tail_logprobs:
        shapes["tail.logprobs"] = (drawn, np.float32)
    arrays |= {f"tail.{f.name}": getattr(tail, f.name) for f in fields(tail)}
    for name, (shape, dtype) in shapes.items():
        array = arrays[name]
        if array is None or array.shape != shape or array.dtype != dtype:
            is_ = "nothing" if array is None else f"{array.dtype} {array.shape}"
            yield Finding(f"'{name}' should be {np.dtype(dtype).name} {shape}, is {is_}")
    if tail.offsets[:1] != 0 or tail.offsets[-1:] != len(tail.ids) or (tail.lengths < 0).any():
        yield Finding("the borders of the tail samples do not fit their number")


_MISPLACED = "supervised positions do not increase, or have no next token in their document"


def _sequences(sequences: Sequences, rules: Rules) -> Iterator[Finding]:
    tokens, starts, positions = sequences.tokens, sequences.document_starts, sequences.positions
    outside = (tokens.values < 0) | (tokens.values >= rules.vocabulary)
    lengths_N = tokens.lengths
    rows_N = {
        f"token ids outside the vocabulary of {rules.vocabulary:,}": _rows(outside, tokens),
        f"holds no token, or more than {rules.sequence_length:,}": (
            (lengths_N < 1) | (lengths_N > rules.sequence_length)
        ),
        "document borders do not begin at 0 and increase inside the sequence": (
            _misordered(starts, lengths_N)
            | (starts.lengths < 1)
            | ~_rows(starts.values == 0, starts)
        ),
        "documents are not one for each border, or below 0": (
            (sequences.document_ids.lengths != starts.lengths)
            | _rows(sequences.document_ids.values < 0, sequences.document_ids)
        ),
        _MISPLACED: _misordered(positions, lengths_N - 1) | _cut(sequences),
    }
    for what, bad_N in rows_N.items():
        if bad_N.any():
            yield Finding(what, row=int(bad_N.argmax()), count=int(bad_N.sum()))
    yield from _branches(sequences, rules)
    for row in range(len(sequences)):
        try:
            check_hashes(sequences.take(np.array([row])))
        except ValueError as error:
            yield Finding(str(error), row=row)


def _branches(sequences: Sequences, rules: Rules) -> Iterator[Finding]:
    branches = sequences.branches
    if (branches is not None) is not rules.capture.branches:
        yield Finding("has branches, or none, against its manifest")
    if branches is None:
        return
    places, tokens, weights = branches.places, branches.tokens, branches.weights
    back = np.diff(places.values, prepend=0) < 0
    firsts = places.offsets[:-1][places.lengths > 0]
    back[firsts] = False  # the first of a sequence follows none
    positions = sequences.positions
    ours = positions.values + _ROW * np.repeat(np.arange(len(positions)), positions.lengths)
    theirs = places.values + _ROW * np.repeat(np.arange(len(places)), places.lengths)
    last = places.values.astype(np.int64) + branches.sizes.values - 1
    bad = {
        "branches that are read beyond the sequence length": _rows(
            last >= rules.sequence_length, places
        ),
        "branches that are not in order, or leave at a place that is not learned": _rows(
            back | ~_among(theirs, np.sort(ours)), places
        ),
        "tokens of branches outside the vocabulary": _rows(
            (tokens.values < 0) | (tokens.values >= rules.vocabulary), tokens
        ),
        "branches with a weight that is not above 0": _rows(
            ~((weights.values > 0) & (weights.values < np.inf)), weights
        ),
    }
    for what, bad_N in bad.items():
        if bad_N.any():
            yield Finding(what, row=int(bad_N.argmax()), count=int(bad_N.sum()))


def _rows(bad_S: NDArray[np.bool_], column: Ragged) -> NDArray[np.bool_]:
    """[N] whether a row holds a bad value."""
    places = np.searchsorted(column.offsets, np.flatnonzero(bad_S), side="right") - 1
    rows = np.zeros(len(column), np.bool_)
    rows[places] = True
    return rows


def _misordered(column: Ragged, ends_N: NDArray[Any]) -> NDArray[np.bool_]:
    """[N] whether a row does not increase, or leaves the range from 0 to below its end."""
    values, row_S = column.values, np.repeat(np.arange(len(column)), column.lengths)
    same_row = np.diff(row_S, prepend=-1) == 0
    back = same_row & (np.diff(values, prepend=0) <= 0)
    return _rows(back | (values < 0) | (values >= ends_N[row_S]), column)


def _cut(sequences: Sequences) -> NDArray[np.bool_]:
    """[N] whether a row has a position whose next token begins another document."""
    starts, positions = sequences.document_starts, sequences.positions
    borders = starts.values + _ROW * np.repeat(np.arange(len(starts)), starts.lengths)
    wanted = positions.values + 1 + _ROW * np.repeat(np.arange(len(positions)), positions.lengths)
    return _rows(_among(wanted, np.sort(borders)), positions)


_ROW = np.int64(1 << 32)
"""Distance between rows, larger than any int32, so that one number stands for (row, value)."""


def _among(values: NDArray[np.int64], ordered: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether each value is in `ordered`, which increases. (`np.isin` took 2 s for 16,000 heads of
    128.)"""
    if len(ordered) == 0:
        return np.zeros(values.shape, np.bool_)
    places = np.searchsorted(ordered, values).clip(max=len(ordered) - 1)
    found: NDArray[np.bool_] = ordered[places] == values
    return found


def _targets(block: Block, aligned: bool, rules: Rules) -> Iterator[Finding]:
    targets, positions = block.targets, block.sequences.positions
    with np.errstate(over="ignore", invalid="ignore"):  # a NaN is a finding, not a warning
        bad = _head(targets, rules) | _tail(targets, rules) | _scalars(targets, rules)
        if rules.capture.chunks:
            bad |= _chunks(targets, block.sequences, rules)
        elif aligned:  # of a chunk no single entry is known
            bad |= _label(targets, labels(block.sequences), rules)
    for what, bad_M in bad.items():
        if bad_M.any():
            place = int(bad_M.argmax())
            row = int(np.searchsorted(positions.offsets, place, side="right")) - 1
            yield Finding(what, row, int(positions.values[place]), int(bad_M.sum()))


def _outside(ids: NDArray[np.int32], rules: Rules) -> Any:
    return ((ids < 0) | (ids >= rules.vocabulary)).any(1)


def _no_logprob(values: NDArray[np.float32]) -> Any:
    """Whether a value is above 0, infinite or NaN."""
    return ~((values <= _FLOAT) & (values > -np.inf))


def _head(targets: Targets, rules: Rules) -> dict[str, NDArray[np.bool_]]:
    ids, logprobs = targets.head_ids, targets.head_logprobs
    mass_M = np.exp(logprobs.astype(np.float64)).sum(1)
    mass_M += np.exp(targets.log_tail.astype(np.float64))
    rising_M = ~(np.diff(logprobs, axis=1) <= 0).all(1)
    whole = rules.capture.head == rules.vocabulary
    log_tail = targets.log_tail
    return {
        "head ids outside the vocabulary": _outside(ids, rules),
        "head ids that repeat": (np.diff(np.sort(ids, axis=1), axis=1) == 0).any(1),
        "head log-probabilities above 0, or not numbers": _no_logprob(logprobs).any(1),
        "head log-probabilities that increase": rising_M,
        "a tail beside a head of the whole vocabulary"
        if whole
        else "a tail mass above 1, or none": (
            log_tail != -np.inf if whole else _no_logprob(log_tail)
        ),
        "head and tail that do not sum to 1": ~(np.abs(mass_M - 1.0) <= _MASS),
    }


def _tail(targets: Targets, rules: Rules) -> dict[str, NDArray[np.bool_]]:
    head_ids, tail = targets.head_ids, targets.tail
    heads = (np.sort(head_ids, axis=1) + np.arange(len(targets))[:, None] * _ROW).ravel()
    row_J = tail.rows()
    place_J = tail.ids + row_J * _ROW
    order_J = np.argsort(place_J, kind="stable")
    repeats_J = np.zeros(len(place_J), np.bool_)
    repeats_J[order_J] = np.diff(place_J[order_J], prepend=-1) == 0
    outside_J = (tail.ids < 0) | (tail.ids >= rules.vocabulary)
    draws = rules.capture.tail

    def any_of(bad_J: NDArray[np.bool_]) -> NDArray[np.bool_]:
        return np.asarray(tail.sums(bad_J) > 0)

    bad = {
        "tail ids outside the vocabulary": any_of(outside_J),
        "tail ids that repeat": any_of(repeats_J),
        f"samples that were not drawn {draws} times together": (
            any_of(tail.counts < 1) | (tail.sums(tail.counts) != draws)
        ),
        "tail ids that are in the head": any_of(_among(place_J, heads)),
    }
    if tail.logprobs is not None:
        bad["tail log-probabilities above 0, or not numbers"] = any_of(_no_logprob(tail.logprobs))
        least_J = _root(tail.logprobs) - _slack(tail.logprobs, rules) - rules.maximum
        last_J = _last_root(targets)[:, 0][row_J]
        bad["tail samples above the head's last entry"] = any_of(least_J > last_J)
    return bad


def _scalars(targets: Targets, rules: Rules) -> dict[str, Any]:
    most = math.log(rules.vocabulary)
    slack = rules.rounding + _FLOAT * max(1.0, most)
    entropy = targets.entropy
    bad = {
        "an entropy that is not in [0, log V]": ~((entropy >= 0) & (entropy <= most + slack)),
        "a label log-probability above 0, or not a number": _no_logprob(targets.label_logprob),
    }
    for place, temperature in enumerate(rules.capture.temperatures):
        # sum p^(1/T) lies between its values for a certain and for an even distribution
        norm_M, even = targets.log_norm[:, place], (1.0 - 1.0 / temperature) * most
        low, high = min(0.0, even) - slack, max(0.0, even) + slack
        bad[f"a log_norm that temperature {temperature:g} cannot have"] = ~(
            (norm_M >= low) & (norm_M <= high)
        )
    return bad


def _chunks(targets: Targets, sequences: Sequences, rules: Rules) -> dict[str, NDArray[np.bool_]]:
    signed_M = targets.chunk_sizes[:, 0]
    sizes_M = np.abs(signed_M)
    begins = np.flatnonzero(sizes_M)
    places = sequences.positions.values + _ROW * np.repeat(
        np.arange(len(sequences)), sequences.positions.lengths
    )
    # the positions of a chunk follow one another, and all positions are in one
    left_M, chunk_M = np.ones(len(sizes_M), np.bool_), np.cumsum(sizes_M > 0) - 1
    if len(begins):
        sizes, first = sizes_M[begins][chunk_M], places[begins][chunk_M]
        offset_M = np.arange(len(sizes_M)) - begins[chunk_M]
        counts = np.bincount(chunk_M.clip(min=0), minlength=len(begins))[chunk_M]
        left_M = (chunk_M < 0) | (sizes != counts) | (places != first + offset_M)
    inside_M = sizes_M == 0
    slack = rules.rounding + _FLOAT
    return {
        "chunks that do not follow one another, or sizes that are not those": left_M
        | (sizes_M > LONGEST_CHUNK),
        "a label inside a chunk with a log-probability of its own": inside_M
        & ~(np.abs(targets.label_logprob) <= slack),
    }


def _label(
    targets: Targets, labels_M: NDArray[np.int32], rules: Rules
) -> dict[str, NDArray[np.bool_]]:
    label = targets.label_logprob[:, None]
    is_label = targets.head_ids == labels_M[:, None]
    gap = np.abs(_root(targets.head_logprobs) - _root(label))
    slack = rules.maximum + _slack(label, rules)
    above = _root(label) - slack > _last_root(targets)
    bad = {
        "a label's log-probability is not its entry in the head": (is_label & (gap > slack)).any(1),
        "a label outside the head is above the head's last entry": above[:, 0] & ~is_label.any(1),
    }
    tail = targets.tail
    if tail.logprobs is not None:
        row_J = tail.rows()
        label_J = targets.label_logprob[row_J]
        off = np.abs(tail.logprobs - label_J)
        wrong = off > 2 * rules.rounding + _FLOAT * np.maximum(1.0, np.abs(label_J))
        wrong &= tail.ids == labels_M[row_J]
        bad["a label's log-probability is not that of its tail sample"] = tail.sums(wrong) > 0
    return bad


def _root(logprobs: NDArray[np.float32]) -> NDArray[np.float64]:
    """The square root of a probability; NaN if the log-probability is NaN."""
    root: NDArray[np.float64] = np.exp(logprobs.astype(np.float64) / 2)
    return root


def _slack(logprobs: NDArray[np.float32], rules: Rules) -> NDArray[np.float64]:
    """Largest accepted error of the root of a rounded log-probability."""
    slack: NDArray[np.float64] = _root(logprobs) * math.expm1(rules.rounding / 2) + _FLOAT
    return slack


def _last_root(targets: Targets) -> NDArray[np.float64]:
    """[M, 1] root of the least probable head entry, which no token outside the head may exceed."""
    if targets.head_logprobs.shape[1] == 0:
        return np.full((len(targets), 1), np.inf)
    return _root(targets.head_logprobs[:, -1:])
