"""From records of a source to a block of a store: every row checked, its numbers normalised."""

from __future__ import annotations

from dataclasses import dataclass, fields
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
    for chosen, content in _parts(rows, kept, reading):
        with np.errstate(all="ignore"):
            good = good_of(_bad(content, chosen, rows, reading), chosen)
        goods.append(good)
        if not good.all():
            chosen, content = chosen[good], content[good]
        if isinstance(content, _Entries):
            own = rows.own_logprob if reading.alignment == "own" else None
            own_M = None if own is None else own[chosen]
            parts.append(_targets(content, label_S[chosen], own_M, reading, tally))
        else:
            parts.append(select(content, label_S[chosen], shift_S[chosen], reading.capture))
    return np.concatenate(goods), Targets.concatenate(parts)


_ELEMENTS = 1 << 17
"""Entries that are converted at a time: their arrays stay in the processor's cache, which made the
conversion of heads three times as fast."""


@dataclass(frozen=True, slots=True, eq=False)
class _Entries:
    """Some rows of entries. The exponentials are computed once, for the checks and the targets."""

    ids: NDArray[Any]
    """[M, K] token ids, `NOTHING` where a row has fewer entries."""
    values: NDArray[np.float32]
    """[M, K] as the source stores them; -inf where a row has fewer entries."""
    top: NDArray[np.float64]
    """[M] the largest value for logits, 0 for log-probabilities."""
    p: NDArray[np.float64]
    """[M, K] exponentials of the values after the top is taken off."""
    sums: NDArray[np.float64]
    """[M] their sums."""

    @classmethod
    def of(cls, ids: NDArray[Any], values: NDArray[Any], reading: Reading) -> _Entries:
        if ids.min(initial=0) < 0:
            values = np.where(ids != NOTHING, values, np.float32(-np.inf))
        top = np.zeros(len(ids))
        with np.errstate(all="ignore"):  # numbers that are not finite are found by the checks
            if reading.values == "logits":
                top = values.max(axis=1, initial=-np.inf).astype(np.float64)
                p = np.exp(values - top[:, None])
            else:
                p = np.exp(values, dtype=np.float64)
        return cls(ids, values, top, p, p.sum(1))

    def __getitem__(self, chosen: NDArray[np.bool_]) -> _Entries:
        return _Entries(*(getattr(self, each.name)[chosen] for each in fields(self)))


def _parts(
    rows: SourceRows, kept: NDArray[np.int64], reading: Reading
) -> Iterator[tuple[NDArray[np.int64], Any]]:
    """Some rows at a time: their numbers, and their entries or their distributions."""
    if rows.full is not None:
        for part, full in rows.full.take(kept).parts():
            yield kept[part], full
        return
    size = max(1, _ELEMENTS // max(1, rows.ids.shape[1]))
    for start in range(0, len(kept), size):
        chosen = kept[start : start + size]
        first, last = int(chosen[0]), int(chosen[-1])
        # neighbours are not copied
        own: Any = slice(first, last + 1) if last - first == len(chosen) - 1 else chosen
        yield chosen, _Entries.of(rows.ids[own], rows.values[own], reading)


def _bad(
    content: Any, chosen: NDArray[np.int64], rows: SourceRows, reading: Reading
) -> Mapping[str, NDArray[np.bool_]]:
    """The rules that rows break."""
    if not isinstance(content, _Entries):
        return _bad_distributions(content, reading)
    bad = _bad_rows(content, reading)
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


def _bad_rows(entries: _Entries, reading: Reading) -> dict[str, NDArray[np.bool_]]:
    """Rows of entries that break a rule, by rule; the first rule that a row breaks counts."""
    values, sums = entries.values, entries.sums
    finite = np.isfinite(values)
    ordered = np.sort(entries.ids, axis=1)
    repeats = ordered[:, 1:] == ordered[:, :-1]
    if ordered.min(initial=0) < 0:
        finite |= entries.ids == NOTHING
        repeats &= ordered[:, 1:] != NOTHING
    bad = {
        "numbers that are not finite": ~finite.all(1),
        f"ids outside the tokenizer's vocabulary of {reading.vocabulary:,}": (
            (ordered[:, 0] < NOTHING) | (ordered[:, -1] >= reading.vocabulary)
        ),
        "an id twice in a row": repeats.any(1),
    }
    if reading.exact > 1:
        rise = np.diff(values[:, : reading.exact], axis=1)
        scale = 1.0 + np.abs(values[:, 1 : reading.exact])
        bad["log-probabilities that rise where they were stored in falling order"] = (
            (rise > _ORDER * scale).any(1)
        )  # fmt: skip
    if reading.values == "renormalised":
        bad["probabilities that do not sum to 1 as those of the first rows do"] = ~(
            np.abs(sums - 1.0) <= _RENORMALISED
        )
    elif reading.values == "logprobs":
        bad["probabilities that sum to more than 1"] = ~(sums <= 1.0 + reading.rounding)
    return bad


def _bad_distributions(full: NDArray[Any], reading: Reading) -> Mapping[str, NDArray[np.bool_]]:
    sums = np.exp(full.astype(np.float64)).sum(1)
    return {
        "numbers that are not finite": (np.isnan(full) | np.isposinf(full)).any(1),
        "probabilities that do not sum to 1": ~(np.abs(sums - 1.0) <= reading.rounding),
    }


def _targets(
    content: _Entries,
    label_M: NDArray[np.int64],
    own_M: NDArray[Any] | None,
    reading: Reading,
    tally: Tally,
) -> Targets:
    """The head of rows that break no rule."""
    ids, logp, p = _most_probable_first(content, reading, tally)
    count, head, rows_M = len(logp), reading.capture.head, np.arange(len(logp))
    left = np.maximum(1.0 - p.sum(1), SMALLEST)
    is_whole = ids.min(initial=0) >= 0
    entries = np.full(count, ids.shape[1]) if is_whole else (ids != NOTHING).sum(1)
    at_label = ids == label_M[:, None]
    place_M = at_label.argmax(1)
    known = at_label[rows_M, place_M]
    label = np.where(known, logp[rows_M, place_M], np.nan)
    wide = ids.shape[1]
    if wide > head:
        cut = entries > head
        tally.counts["rows that were cut to the width of the head"] += int(cut.sum())
        left += p[:, head:].sum(1)
        ids, logp, p = ids[:, :head], logp[:, :head], p[:, :head]
        entries = np.minimum(entries, head)
    elif wide < head:
        more = ((0, 0), (0, head - wide))
        ids = np.pad(ids, more, constant_values=NOTHING)
        logp = np.pad(logp, more, constant_values=-np.inf)
        p = np.pad(p, more)
    ids, logp = np.ascontiguousarray(ids, np.int32), np.ascontiguousarray(logp, np.float32)
    short = np.flatnonzero(entries < head)
    if len(short):
        tally.counts["rows with fewer entries than the head, filled up"] += len(short)
        if own_M is not None:  # the label is the first token to fill up with: it is known
            chosen = short[~known[short]]
            place = entries[chosen]
            own = np.minimum(own_M[chosen], logp[chosen, place - 1])
            ids[chosen, place], logp[chosen, place], p[chosen, place] = (
                label_M[chosen], own, np.exp(own.astype(np.float64)))  # fmt: skip
            left[chosen] = np.maximum(left[chosen] - p[chosen, place], SMALLEST)
            label[chosen], known[chosen] = own, True
            entries[chosen] += 1
            short = np.flatnonzero(entries < head)
    log_left = np.log(left)
    outside = np.maximum(1, reading.vocabulary - entries)
    last = logp[rows_M, np.maximum(entries - 1, 0)] if head else np.zeros(count)
    # a token outside the head is at most as probable as the last one inside
    even = np.minimum(log_left - np.log(outside), last)
    if len(short):
        _fill(ids, logp, short, entries, even, reading.vocabulary)
        filled = head - entries[short]
        rest = np.exp(log_left[short]) - filled * np.exp(even[short])
        log_left[short] = np.log(np.maximum(rest, SMALLEST))
        p[short] = np.exp(logp[short].astype(np.float64))
    if head >= reading.vocabulary:
        log_left = np.full(count, -np.inf)
    if own_M is not None:
        label = np.where(known, label, np.minimum(own_M, last))
    label = np.where(np.isnan(label), even, label)
    entropy = -np.einsum("mk,mk->m", p, logp)
    entropy -= np.where(log_left > -np.inf, np.exp(log_left) * even, 0.0)
    if head and (logp[:, 0] > 0.0).any():
        logp = np.minimum(logp, 0.0)
    return Targets(
        head_ids=ids,
        head_logprobs=logp,
        log_tail=np.minimum(log_left, 0.0).astype(np.float32),
        tail=Tail.empty(count),
        label_logprob=np.minimum(label, 0.0).astype(np.float32),
        entropy=entropy.clip(0.0, np.log(reading.vocabulary)).astype(np.float32),
        log_norm=np.zeros((count, 0), np.float32),
    )


def _most_probable_first(
    content: _Entries, reading: Reading, tally: Tally
) -> tuple[NDArray[Any], NDArray[np.float32], NDArray[np.float64]]:
    """[M, K] ids, log-probabilities, most probable first, and probabilities. A missing entry has
    the log-probability -inf."""
    ids, logp, p, sums = content.ids, content.values, content.p, content.sums
    if reading.values == "logprobs":
        over = np.flatnonzero(sums > 1.0 + _SUM)
        if len(over):
            tally.counts["rows whose sum was above 1 and was rounded to 1"] += len(over)
            # all entries alike, which changes none of them much
            logp = logp.copy()
            logp[over] -= np.log(sums[over, None]).astype(np.float32)
            p[over] = np.exp(logp[over].astype(np.float64))
    else:
        norm = (content.top + np.log(sums))[:, None]
        logp = np.subtract(
            logp, norm, dtype=np.float64, out=np.empty_like(logp), casting="same_kind"
        )
        p /= sums[:, None]
    unordered = np.flatnonzero(~(logp[:, 1:] <= logp[:, :-1]).all(1))
    if len(unordered):
        order = np.argsort(-logp[unordered], axis=1, kind="stable")
        ids, logp = ids.copy(), logp.copy()
        for column in (ids, logp, p):
            column[unordered] = np.take_along_axis(column[unordered], order, 1)
    return ids, logp, p


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
