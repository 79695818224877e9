"""Maps the teacher's records to the tokens of a student.

Every token of the head and every sample becomes the student's first token for its bytes, and
probabilities that meet add up. Samples stay unbiased: a mapped sample is a sample of the mapped
distribution. So is the whole record with samples, head included. Without samples, the tokens
outside the head cannot be mapped: their probability stays in the bucket, though part of it belongs
to tokens of the new head.

A head has K tokens at every position. Where fewer are known, it is filled with tokens that nothing
is known of, those that no token of the teacher maps to first, at a probability of 1e-30.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..order import uniform
from ..schema import Capture, Tail, Targets, count_type

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..schema import Sequences
    from .mapping import TokenMap

FLOOR = math.log(1e-30)
"""Log-probability of what fills a head or a tail."""
_SEED = 0x5245_544F_4B45_4E
"""Added to the capture's seed: draws must be independent of those of the capture."""


def mapped_capture(old: Capture, teacher: int, student: int) -> Capture:
    """The capture of the new store.

    A mapped token has no probability at another temperature than 1, and samples that meet have none
    of their own. The head is so small that it can always be filled with tokens that were not drawn.

    teacher, student  V of both tokenizers
    """
    whole = old.head == teacher
    head = min(old.head, student if whole else max(0, student - 1 - old.tail))
    return Capture(head=head, tail=0 if whole else old.tail, seed=old.seed, chunks=True)


@dataclass(frozen=True, slots=True, eq=False)
class _Entries:
    """Known tokens of D positions, each once a position: first by position, then by token."""

    rows_E: NDArray[np.int64]
    ids_E: NDArray[np.int64]
    masses_E: NDArray[np.float64]
    in_head_E: NDArray[np.bool_]
    """Whether a token of the teacher's head maps to it."""
    counts_E: NDArray[np.int64]
    """How often samples map to it."""
    merged_E: NDArray[np.float64]
    """The entropy that is lost where several tokens of the teacher meet, in nats."""


@dataclass(frozen=True, slots=True, eq=False)
class Masses:
    """Probability at D positions, as far as their records know it."""

    ambiguous_D: NDArray[np.float64]
    unmapped_D: NDArray[np.float64]


class RecordMap:
    """Maps records by one table."""

    def __init__(self, table: TokenMap, old: Capture, new: Capture, *, bucket: bool) -> None:
        """Use a table.

        bucket  leave the probability of ambiguous tokens in the bucket instead of mapping it
        """
        self._table, self._old, self._new, self._bucket = table, old, new, bucket
        self._size = len(table.unreached)

    def masses(self, targets: Targets) -> Masses:
        """Probability of ambiguous tokens, and of those that the student cannot spell."""
        rows, ids, masses, _ = _flat(targets, self._old)
        count = len(targets)

        def summed(chosen: NDArray[np.bool_]) -> NDArray[np.float64]:
            return _sums(rows, masses * chosen, count)

        table = self._table
        return Masses(summed(table.ambiguous_V[ids]), summed(table.first_V[ids] < 0))

    def lacking(self, targets: Targets) -> NDArray[np.bool_]:
        """[M] whether no known token of a position can be mapped, so that nothing is left."""
        rows, ids, _, _ = _flat(targets, self._old)
        kept = np.bincount(rows, self._is_kept(ids), minlength=len(targets))
        return np.asarray(kept == 0)

    def __call__(
        self,
        targets: Targets,
        sequences: Sequences,
        labels_M: NDArray[np.int32],
        sizes_M: NDArray[np.int32],
        logprobs_M: NDArray[np.float32],
    ) -> Targets:
        """The records of M positions of the student.

        targets     the teacher's records where chunks begin that have one, in order
        sequences   the student's, with M positions
        labels_M    the student's labels
        sizes_M     sizes of chunks, 0 inside a chunk, negative where nothing can be mapped
        logprobs_M  log-probabilities of chunks, 0 inside a chunk
        """
        begins = np.flatnonzero(sizes_M > 0)
        ids_M = np.repeat(sequences.ids, sequences.positions.lengths)[begins]
        seed = self._old.seed + _SEED
        uniform_D = uniform(seed, ids_M, sequences.positions.values[begins])
        mapped = self._mapped(targets, uniform_D)
        if len(begins) == len(sizes_M):
            made = mapped
        else:
            inside = np.flatnonzero(sizes_M <= 0)
            both = Targets.concatenate([mapped, self._certain(labels_M[inside])])
            order = np.empty(len(sizes_M), np.int64)
            order[begins] = np.arange(len(begins))
            order[inside] = len(begins) + np.arange(len(inside))
            made = both.take(order)
        return Targets(
            head_ids=made.head_ids,
            head_logprobs=made.head_logprobs,
            log_tail=made.log_tail,
            tail=made.tail,
            label_logprob=logprobs_M,
            entropy=made.entropy,
            log_norm=made.log_norm,
            chunk_sizes=sizes_M[:, None],
        )

    def _is_kept(self, ids: NDArray[np.int64]) -> NDArray[np.bool_]:
        kept = self._table.first_V[ids] >= 0
        return kept & ~self._table.ambiguous_V[ids] if self._bucket else kept

    def _mapped(self, targets: Targets, uniform_D: NDArray[np.float64]) -> Targets:
        entries, left_D = self._entries(targets)
        count, head = len(targets), self._new.head
        # the head: the most probable of the tokens that a head's token maps to
        order = np.lexsort((entries.ids_E, -entries.masses_E, ~entries.in_head_E, entries.rows_E))
        places = _places(entries.rows_E[order], count)
        chosen_E = np.zeros(len(order), np.bool_)
        chosen_E[order] = (places < head) & entries.in_head_E[order]
        slots = places[chosen_E[order]]
        ordered = order[chosen_E[order]]
        filled = np.bincount(entries.rows_E[chosen_E], minlength=count)
        head_ids = np.full((count, head), -1, np.int64)
        head_masses = np.zeros((count, head))
        head_ids[entries.rows_E[ordered], slots] = entries.ids_E[ordered]
        head_masses[entries.rows_E[ordered], slots] = entries.masses_E[ordered]
        outside = np.flatnonzero(~chosen_E)
        none_D = np.bincount(entries.rows_E[outside], minlength=count) == 0
        needs_tail = self._new.tail > 0
        wanted_D = head - filled + (none_D & needs_tail)
        fill = self._fillers(entries.rows_E, entries.ids_E, wanted_D)
        head_ids[np.arange(head) >= filled[:, None]] = np.concatenate(
            [np.zeros(0, np.int64), *(own[: head - n] for own, n in zip(fill, filled, strict=True))]
        )
        with np.errstate(divide="ignore"):
            logs = np.log(head_masses)
        head_logprobs = np.maximum(logs, FLOOR).clip(max=0.0).astype(np.float32)
        tail, log_tail = self._tail(targets, entries, outside, left_D, none_D, fill, uniform_D)
        lost_D = np.bincount(entries.rows_E, entries.merged_E, minlength=count)
        entropy = (targets.entropy - lost_D).clip(0.0, math.log(self._size))
        return Targets(
            head_ids=head_ids.astype(np.int32),
            head_logprobs=head_logprobs,
            log_tail=log_tail,
            tail=tail,
            label_logprob=targets.label_logprob,
            entropy=entropy.astype(np.float32),
            log_norm=np.zeros((count, 0), np.float32),
            chunk_sizes=np.zeros((count, 1), np.int32),
        )

    def _entries(self, targets: Targets) -> tuple[_Entries, NDArray[np.float64]]:
        """The known tokens, and [D] the probability that is in the bucket."""
        rows, ids, masses, counts = _flat(targets, self._old)
        total = len(targets)
        kept = self._is_kept(ids)
        lost_D = _sums(rows, masses * ~kept, total)
        rows, ids, masses, counts = rows[kept], ids[kept], masses[kept], counts[kept]
        keys, inverse = np.unique(rows * self._size + self._table.first_V[ids], return_inverse=True)
        found = len(keys)
        sums_E = _sums(inverse, masses, found)
        with np.errstate(divide="ignore", invalid="ignore"):
            own = np.where(masses > 0, masses * np.log(masses), 0.0)
            joint_E = np.where(sums_E > 0, sums_E * np.log(sums_E), 0.0)
        several = np.bincount(inverse, minlength=found) > 1
        merged_E = np.where(several, joint_E - np.bincount(inverse, own, minlength=found), 0.0)
        rows_E = keys // self._size
        left_D = np.zeros(total)
        if self._new.tail:
            # what is lost counts as if the mapped tokens had been drawn instead
            shares = _sums(rows_E, sums_E, total)
            scales_D = np.where(lost_D > 0, (shares + lost_D) / np.maximum(shares, 1e-300), 1.0)
            sums_E = sums_E * scales_D[rows_E]
        else:
            left_D = np.exp(targets.log_tail.astype(np.float64)) + lost_D
        entries = _Entries(
            rows_E=rows_E,
            ids_E=keys % self._size,
            masses_E=sums_E,
            in_head_E=np.bincount(inverse, counts == 0, minlength=found) > 0,
            counts_E=np.bincount(inverse, counts, minlength=found).astype(np.int64),
            merged_E=merged_E.clip(min=0.0),
        )
        return entries, left_D

    def _tail(
        self,
        targets: Targets,
        entries: _Entries,
        outside: NDArray[np.int64],
        left_D: NDArray[np.float64],
        none_D: NDArray[np.bool_],
        fill: list[NDArray[np.int64]],
        uniform_D: NDArray[np.float64],
    ) -> tuple[Tail, NDArray[np.float32]]:
        """The samples and [D] log of the mass outside the head."""
        draws, count = self._new.tail, len(targets)
        rows, masses = entries.rows_E[outside], entries.masses_E[outside]
        sums_D = np.bincount(rows, masses, minlength=count) + left_D
        with np.errstate(divide="ignore"):
            log_tail = np.maximum(np.log(sums_D), FLOOR).clip(max=0.0)
        if self._new.head == self._size:
            return Tail.empty(count), np.full(count, -np.inf, np.float32)
        if draws == 0:
            return Tail.empty(count), log_tail.astype(np.float32)
        counts = entries.counts_E[outside]
        # positions that keep all of their draws, and nothing but them
        exact = ~entries.in_head_E[outside]
        same_D = np.bincount(rows, counts * exact, minlength=count) == draws
        same_D &= np.bincount(rows, ~exact, minlength=count) == 0
        log_tail = np.where(same_D, targets.log_tail, log_tail)
        redrawn = np.flatnonzero(~same_D & ~none_D)
        if len(redrawn):
            counts = np.where(same_D[rows], counts, 0)
            place_D = np.zeros(count, np.int64)
            place_D[redrawn] = np.arange(len(redrawn))
            own = np.flatnonzero(~same_D[rows])
            counts[own] = _systematic(place_D[rows[own]], masses[own], uniform_D[redrawn], draws)
        kept = counts > 0
        empty = np.flatnonzero(none_D)
        filler = np.array([fill[row][-1] for row in empty.tolist()], np.int64)
        all_rows = np.concatenate([rows[kept], empty])
        order = np.argsort(all_rows, kind="stable")
        ids = np.concatenate([entries.ids_E[outside][kept], filler])[order]
        drawn = np.concatenate([counts[kept], np.full(len(empty), draws)])[order]
        lengths = np.bincount(all_rows, minlength=count)
        tail = Tail(
            ids=ids.astype(np.int32),
            counts=drawn.astype(count_type(draws)),
            offsets=np.append(0, np.cumsum(lengths, dtype=np.int64)),
        )
        return tail, log_tail.astype(np.float32)

    def _fillers(
        self, rows_E: NDArray[np.int64], ids_E: NDArray[np.int64], wanted_D: NDArray[np.int64]
    ) -> list[NDArray[np.int64]]:
        """[D] tokens that nothing is known of: as many as each position wants."""
        count = len(wanted_D)
        most = int(wanted_D.max(initial=0))
        if most == 0:
            return [np.zeros(0, np.int64)] * count
        known = int(np.bincount(rows_E, minlength=count).max(initial=0))
        candidates = self._table.unreached[: most + known].astype(np.int64)
        keys = rows_E * self._size + ids_E  # increasing
        asked = np.arange(count)[:, None] * self._size + candidates
        at = np.searchsorted(keys, asked).clip(max=max(0, len(keys) - 1))
        free = keys[at] != asked if len(keys) else np.ones(asked.shape, np.bool_)
        free &= free.cumsum(1) <= wanted_D[:, None]
        return np.split(candidates[np.nonzero(free)[1]], np.cumsum(free.sum(1))[:-1])

    def _certain(self, labels_M: NDArray[np.int32]) -> Targets:
        """Records that say that the label is certain."""
        count, capture = len(labels_M), self._new
        rows, ids = np.arange(count, dtype=np.int64), labels_M.astype(np.int64)
        whole = capture.head == self._size
        fill = self._fillers(rows, ids, np.full(count, max(0, capture.head - 1 + (not whole))))
        head_ids = np.zeros((count, capture.head), np.int32)
        head_logprobs = np.full((count, capture.head), FLOOR, np.float32)
        drawn = labels_M
        if capture.head:
            head_ids[:, 0], head_logprobs[:, 0] = labels_M, 0.0
            for row, own in enumerate(fill):
                head_ids[row, 1:] = own[: capture.head - 1]
            if not whole:
                drawn = np.array([own[-1] for own in fill], np.int32)
        log_tail = np.full(count, -np.inf if whole else FLOOR if capture.head else 0.0, np.float32)
        tail = Tail.empty(count)
        if capture.tail:
            tail = Tail(
                ids=drawn.astype(np.int32),
                counts=np.full(count, capture.tail, count_type(capture.tail)),
                offsets=np.arange(count + 1, dtype=np.int64),
            )
        zeros = np.zeros(count, np.float32)
        return Targets(
            head_ids=head_ids,
            head_logprobs=head_logprobs,
            log_tail=log_tail,
            tail=tail,
            label_logprob=zeros,
            entropy=zeros,
            log_norm=np.zeros((count, 0), np.float32),
            chunk_sizes=np.zeros((count, 1), np.int32),
        )


def relabelled(targets: Targets, ids_V: NDArray[np.int32]) -> Targets:
    """The same records under other ids.  ids_V  [V] the new id of each token"""
    tail = targets.tail
    made = {name: getattr(targets, name) for name in Targets.__dataclass_fields__}
    made["head_ids"] = ids_V[targets.head_ids]
    made["tail"] = Tail(
        ids=ids_V[tail.ids], counts=tail.counts, logprobs=tail.logprobs, offsets=tail.offsets
    )
    return Targets(**made)


def _flat(
    targets: Targets, capture: Capture
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64], NDArray[np.int64]]:
    """The position, the token, the probability and the count of every known token; the head's have
    a count of 0."""
    count, head = targets.head_ids.shape
    tail, drawn_J = targets.tail, targets.tail.rows()
    each_M = np.exp(targets.log_tail.astype(np.float64)) / max(1, capture.tail)
    return (
        np.concatenate([np.repeat(np.arange(count), head), drawn_J]),
        np.concatenate([targets.head_ids.ravel(), tail.ids]).astype(np.int64),
        np.concatenate(
            [
                np.exp(targets.head_logprobs.astype(np.float64)).ravel(),
                each_M[drawn_J] * tail.counts,
            ]
        ),
        np.concatenate([np.zeros(count * head, np.int64), tail.counts.astype(np.int64)]),
    )


def _sums(places: NDArray[np.int64], weights: NDArray[Any], count: int) -> NDArray[np.float64]:
    """The sum of the weights at each of `count` places."""
    sums: NDArray[Any] = np.bincount(places, weights, minlength=count)
    return sums.astype(np.float64)


def _places(rows: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """The place of each entry among those of its position; `rows` does not decrease."""
    lengths = np.bincount(rows, minlength=count)
    return np.arange(len(rows)) - np.repeat(np.cumsum(lengths) - lengths, lengths)


def _systematic(
    rows: NDArray[np.int64],
    weights: NDArray[np.float64],
    uniform_D: NDArray[np.float64],
    draws: int,
) -> NDArray[np.int64]:
    """How often each entry is drawn by equally spaced points with one random shift a position.

    rows     the position of each entry, not decreasing; every position has some
    weights  at least one is above 0 at each position
    """
    count = len(uniform_D)
    totals = np.bincount(rows, weights, minlength=count)
    before = np.cumsum(weights) - weights
    firsts = np.searchsorted(rows, np.arange(count))
    ends = before + weights - before[firsts][rows]
    shares = ends / np.maximum(totals, 1e-300)[rows] * draws
    # the points are shift, shift + 1, ...: those below the end of an entry
    below = np.ceil(shares - uniform_D[rows]).astype(np.int64).clip(0, draws)
    lasts = np.append(firsts[1:], len(rows)) - 1
    below[lasts] = draws  # rounding must not lose the last point
    drawn = np.diff(below, prepend=0)
    drawn[firsts] = below[firsts]
    return drawn.clip(min=0)
