"""From records of a source to a block of a store: every row checked, its numbers normalised."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..alignment import READINGS, row_positions
from ..order import uniform
from ..schema import Block, Tail, Targets
from ..selection import select
from .records import first_real, sequences_of, usable_records, without_padding
from .rows import NOTHING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray

    from ..ragged import Ragged
    from ..schema import Capture
    from .reading import Reading, Tally
    from .rows import SourceRows

SMALLEST = 1e-9
"""Mass outside a head where the source says nothing of it, or its values sum to 1."""
_SUM = 5e-5
"""Excess of a sum over 1 that float32 explains."""
_RENORMALISED = 5e-3
"""Largest distance from 1 of the sum of a renormalised row."""
_ORDER = 1e-3
"""Largest rise between entries that a source stored in falling order, relative."""


def block_of(rows: SourceRows, reading: Reading, first: int, tally: Tally) -> Block:
    """The records as sequences with their targets.

    first  number of the first record among all records of the source: sequence i of the store is
           record i. A record that is skipped becomes a sequence of one token without a target.

    Raises
        ColdstillError: a row or a record breaks a rule, and bad ones are not skipped
    """
    rows, good_N = usable_records(rows, reading, tally)
    tokens, places, starts = without_padding(rows)
    position_S, label_S, has_S = row_positions(tokens, places, starts, READINGS[reading.alignment])
    record_S = np.repeat(np.arange(len(rows)), places.lengths)
    tally.counts["rows whose label is not in their record"] += int((~has_S).sum())
    if rows.learned is not None:
        real = first_real(rows)
        flat = rows.tokens.offsets[record_S] + real[record_S] + position_S + 1
        learned_S = np.zeros(len(has_S), np.bool_)
        learned_S[has_S] = rows.learned.values[flat[has_S]]
        tally.counts["rows whose label is not to be learned"] += int((has_S & ~learned_S).sum())
        has_S &= learned_S
    if rows.full is None:
        nothing_S = ~(rows.ids != NOTHING).any(1) if rows.ids.shape[1] else np.ones_like(has_S)
        tally.counts["rows without an entry"] += int((has_S & nothing_S).sum())
        has_S &= ~nothing_S
    kept = np.flatnonzero(has_S)
    shift_S = uniform(reading.capture.seed, first + record_S, position_S.astype(np.int32))
    good, targets = _converted(rows, kept, record_S, places, label_S, shift_S, reading, tally)
    kept = kept[good]
    sequences = sequences_of(tokens, starts, record_S[kept], position_S[kept], first)
    tally.documents += len(sequences.document_ids.values)
    tally.longest = max(tally.longest, int(tokens.lengths.max(initial=0)))
    tally.counts["records without a target"] += int(
        (good_N & (sequences.positions.lengths == 0)).sum()
    )
    return Block(sequences=sequences, targets=targets, capture=reading.capture)


def _converted(
    rows: SourceRows,
    kept: NDArray[np.int64],
    record_S: NDArray[np.int64],
    places: Ragged,
    label_S: NDArray[np.int64],
    shift_S: NDArray[np.float64],
    reading: Reading,
    tally: Tally,
) -> tuple[NDArray[np.bool_], Targets]:
    """Which of the kept rows break no rule, and the targets of those."""

    def good_of(bad: Mapping[str, NDArray[np.bool_]], chosen: NDArray[np.int64]) -> Any:
        good = np.ones(len(chosen), np.bool_)
        for what, wrong in bad.items():
            wrong = wrong & good
            if not wrong.any():
                continue
            row = int(chosen[int(wrong.argmax())])
            where = f"{rows.where(int(record_S[row]))}, row of token {int(places.values[row])}"
            tally.bad(where, what + _shown(what, rows, row), int(wrong.sum()))
            good &= ~wrong
        return good

    goods, parts = [np.zeros(0, np.bool_)], [_no_targets(reading.capture)]
    for chosen, content in _parts(rows, kept):
        with np.errstate(all="ignore"):
            good = good_of(_bad(content, chosen, rows, reading), chosen)
        goods.append(good)
        chosen = chosen[good]
        if isinstance(content, tuple):
            ids, values = (each[good] for each in content)
            own = rows.own_logprob if reading.alignment == "own" else None
            own_M = None if own is None else own[chosen]
            parts.append(_targets(ids, values, label_S[chosen], own_M, reading, tally))
        else:
            parts.append(select(content[good], label_S[chosen], shift_S[chosen], reading.capture))
    return np.concatenate(goods), Targets.concatenate(parts)


_ELEMENTS = 1 << 17
"""Entries that are converted at a time: their arrays stay in the processor's cache, which made the
conversion of heads three times as fast."""


def _parts(rows: SourceRows, kept: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64], Any]]:
    """Some rows at a time: their numbers, and their ids and values or their distributions."""
    if rows.full is not None:
        for part, full in rows.full.take(kept).parts():
            yield kept[part], full
        return
    size = max(1, _ELEMENTS // max(1, rows.ids.shape[1]))
    for start in range(0, len(kept), size):
        chosen = kept[start : start + size]
        yield chosen, (rows.ids[chosen], rows.values[chosen])


def _bad(
    content: Any, chosen: NDArray[np.int64], rows: SourceRows, reading: Reading
) -> Mapping[str, NDArray[np.bool_]]:
    """The rules that rows break."""
    if not isinstance(content, tuple):
        return _bad_distributions(content, reading)
    ids, values = content
    bad = _bad_rows(ids, values, reading)
    if rows.own_logprob is not None:
        own = rows.own_logprob[chosen]
        bad["a label with a log-probability above 0, or none"] = ~((own <= 1e-5) & (own > -np.inf))
    return bad


def _no_targets(capture: Capture) -> Targets:
    return select(np.zeros((0, 1)), np.zeros(0, np.int64), np.zeros(0), capture)


def _shown(what: str, rows: SourceRows, row: int) -> str:
    if "sum to" not in what or rows.full is not None:
        return ""
    own = rows.ids[row] != NOTHING
    return f": {np.exp(rows.values[row][own].astype(np.float64)).sum():.6g}"


def _bad_rows(
    ids: NDArray[Any], values: NDArray[Any], reading: Reading
) -> dict[str, NDArray[np.bool_]]:
    """Rows of entries that break a rule, by rule; the first rule that a row breaks counts."""
    own = ids != NOTHING
    finite = np.isfinite(values) | ~own
    ordered = np.sort(ids, axis=1)
    repeats = (np.diff(ordered, axis=1) == 0) & (ordered[:, 1:] != NOTHING)
    bad = {
        "numbers that are not finite": ~finite.all(1),
        f"ids outside the tokenizer's vocabulary of {reading.vocabulary:,}": (
            ((ids < 0) & own) | (ids >= reading.vocabulary)
        ).any(1),
        "an id twice in a row": repeats.any(1),
    }
    if reading.exact > 1:
        rise = np.diff(values[:, : reading.exact], axis=1)
        scale = 1.0 + np.abs(values[:, 1 : reading.exact])
        bad["log-probabilities that rise where they were stored in falling order"] = (
            (rise > _ORDER * scale).any(1)
        )  # fmt: skip
    if reading.values in ("logprobs", "renormalised"):
        sums = np.exp(np.where(own, values, -np.inf).astype(np.float64)).sum(1)
        if reading.values == "renormalised":
            bad["probabilities that do not sum to 1 as those of the first rows do"] = ~(
                np.abs(sums - 1.0) <= _RENORMALISED
            )
        else:
            bad["probabilities that sum to more than 1"] = ~(sums <= 1.0 + reading.rounding)
    return bad


def _bad_distributions(full: NDArray[Any], reading: Reading) -> Mapping[str, NDArray[np.bool_]]:
    sums = np.exp(full.astype(np.float64)).sum(1)
    return {
        "numbers that are not finite": (np.isnan(full) | np.isposinf(full)).any(1),
        "probabilities that do not sum to 1": ~(np.abs(sums - 1.0) <= reading.rounding),
    }


def _targets(
    ids: NDArray[Any],
    values: NDArray[Any],
    label_M: NDArray[np.int64],
    own_M: NDArray[Any] | None,
    reading: Reading,
    tally: Tally,
) -> Targets:
    """The head of rows that break no rule."""
    logp, ids = _log_probabilities(ids, values, reading, tally)
    count, head = len(logp), reading.capture.head
    left = np.maximum(1.0 - np.exp(logp.astype(np.float64)).sum(1), SMALLEST)
    entries = (ids != NOTHING).sum(1)
    at_label = (ids == label_M[:, None]) & (ids != NOTHING)
    known = at_label.any(1)
    label = np.where(known, np.where(at_label, logp, 0.0).sum(1), np.nan)
    wide = ids.shape[1]
    if wide > head:
        cut = entries > head
        tally.counts["rows that were cut to the width of the head"] += int(cut.sum())
        left += np.exp(logp[:, head:].astype(np.float64)).sum(1)
        ids, logp = ids[:, :head], logp[:, :head]
        entries = np.minimum(entries, head)
    elif wide < head:
        more = ((0, 0), (0, head - wide))
        ids = np.pad(ids, more, constant_values=NOTHING)
        logp = np.pad(logp, more, constant_values=-np.inf)
    ids, logp = np.ascontiguousarray(ids, np.int32), np.ascontiguousarray(logp, np.float32)
    log_left = np.log(left)
    outside = np.maximum(1, reading.vocabulary - entries)
    last = logp[np.arange(count), np.maximum(entries - 1, 0)] if head else np.zeros(count)
    # a token outside the head is at most as probable as the last one inside
    even = np.minimum(log_left - np.log(outside), last)
    short = np.flatnonzero(entries < head)
    if len(short):
        tally.counts["rows with fewer entries than the head, filled up"] += len(short)
        _fill(ids, logp, short, entries, even, reading.vocabulary)
        filled = head - entries[short]
        rest = np.exp(log_left[short]) - filled * np.exp(even[short])
        log_left[short] = np.log(np.maximum(rest, SMALLEST))
    if head >= reading.vocabulary:
        log_left = np.full(count, -np.inf)
    if own_M is not None:
        label = np.where(known, label, np.minimum(own_M, last))
    label = np.where(np.isnan(label), even, label)
    p = np.exp(logp.astype(np.float64))
    entropy = -(p * logp).sum(1) - np.where(log_left > -np.inf, np.exp(log_left) * even, 0.0)
    return Targets(
        head_ids=ids,
        head_logprobs=np.minimum(logp, 0.0),
        log_tail=np.minimum(log_left, 0.0).astype(np.float32),
        tail=Tail.empty(count),
        label_logprob=np.minimum(label, 0.0).astype(np.float32),
        entropy=entropy.clip(0.0, np.log(reading.vocabulary)).astype(np.float32),
        log_norm=np.zeros((count, 0), np.float32),
    )


def _log_probabilities(
    ids: NDArray[Any], values: NDArray[Any], reading: Reading, tally: Tally
) -> tuple[NDArray[np.float32], NDArray[Any]]:
    """[M, K] log-probabilities, most probable first, and the ids. A missing entry is -inf."""
    logp = np.where(ids != NOTHING, values, np.float32(-np.inf)).astype(np.float32)
    if reading.values != "logprobs":
        top = logp.max(axis=1, keepdims=True, initial=-np.inf).astype(np.float64)
        sums = np.exp(logp - top).sum(1, keepdims=True)
        logp = (logp - (top + np.log(sums))).astype(np.float32)
    mass = np.exp(logp.astype(np.float64)).sum(1)
    over = np.flatnonzero(mass > 1.0 + _SUM)
    if len(over):
        tally.counts["rows whose sum was above 1 and was rounded to 1"] += len(over)
        # all entries alike, which changes none of them much
        logp[over] -= np.log(mass[over, None]).astype(np.float32)
    if logp.shape[1] > 1:
        with np.errstate(invalid="ignore"):
            unordered = np.flatnonzero(~(np.diff(logp, axis=1) <= 0).all(1))
        if len(unordered):
            order = np.argsort(-logp[unordered], axis=1, kind="stable")
            ids = ids.copy()
            ids[unordered] = np.take_along_axis(ids[unordered], order, 1)
            logp[unordered] = np.take_along_axis(logp[unordered], order, 1)
    return logp, ids


def _fill(
    ids: NDArray[np.int32],
    logp: NDArray[np.float32],
    short: NDArray[np.int64],
    entries: NDArray[np.int64],
    even: NDArray[np.float64],
    vocabulary: int,
) -> None:
    """Fill rows with the last tokens of the vocabulary that they lack, each with the mean
    probability outside."""
    for row in short.tolist():
        have, missing = int(entries[row]), ids.shape[1] - int(entries[row])
        last = np.arange(vocabulary - 1, max(-1, vocabulary - 1 - ids.shape[1]), -1)
        free = last[~np.isin(last, ids[row, :have])][:missing]
        ids[row, have:] = free
        logp[row, have:] = even[row]
