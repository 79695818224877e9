"""Maps the teacher's records to the tokens of a student.

Every token of the head and every sample becomes the student's first token for its bytes, and
probabilities that meet add up. Samples stay unbiased: a mapped sample is a sample of the mapped
distribution. So is the whole record with samples, head included. Without samples, the tokens
outside the head cannot be mapped: their probability stays in the bucket, though part of it belongs
to tokens of the new head.

Inside a chunk the record holds the next tokens that `continued` finds. Where nothing is known, it
says that the label is certain.

A head has K tokens at every position. Where fewer are known, it is filled with tokens that nothing
is known of, those that no token of the teacher maps to first, at a probability of 1e-30.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from ..order import systematic, uniform
from ..schema import Capture, Tail, Targets, count_type
from .continued import Inside
from .known import Following, sums_at

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..schema import Sequences
    from .continued import Continuations
    from .known import Entries, KnownTokens
    from .mapping import TokenMap

FLOOR = math.log(1e-30)
"""Log-probability of what fills a head or a tail."""
_ROUNDING = 1e-9
"""Largest difference of two sums of the same probabilities."""
_ROWS = 1024
"""Positions that are mapped at a time."""
_SEED = 0x5245_544F_4B45_4E
"""Added to the capture's seed: draws must be independent of those of the capture."""


def mapped_capture(old: Capture, teacher: int, student: int, *, branches: bool = False) -> Capture:
    """The capture of the new store.

    A mapped token has no probability at another temperature than 1, and samples that meet have none
    of their own. A whole distribution stays whole; any other head is so small that it can always be
    filled with tokens that were not drawn.

    teacher, student  V of both tokenizers
    branches          whether it has branches
    """
    whole = old.head == teacher
    head = student if whole else min(old.head, max(0, student - 1 - old.tail))
    tail = 0 if whole else old.tail
    return Capture(head=head, tail=tail, seed=old.seed, chunks=True, branches=branches)


class RecordMap:
    """Maps records by one table."""

    def __init__(
        self,
        known: KnownTokens,
        continuations: Continuations,
        table: TokenMap,
        old: Capture,
        new: Capture,
    ) -> None:
        """Use what finds the known tokens, and the captures of teacher and student."""
        self._known, self._continuations, self._table = known, continuations, table
        self._old, self._new, self._size = old, new, known.size

    def __call__(
        self,
        targets: Targets,
        sequences: Sequences,
        labels_M: NDArray[np.int32],
        sizes_M: NDArray[np.int32],
        logprobs_M: NDArray[np.float32],
        firsts_M: NDArray[np.int32],
        theirs_D: NDArray[np.int32],
    ) -> Targets:
        """The records of M positions of the student.

        targets     the teacher's records where chunks begin that have one, in order
        sequences   the student's, with M positions
        labels_M    the student's labels
        sizes_M     sizes of chunks, 0 inside a chunk, negative where nothing can be mapped
        logprobs_M  log-probabilities of chunks, 0 inside a chunk
        firsts_M    the teacher's first tokens (`documents.Rewritten`)
        theirs_D    the teacher's labels in these records
        """
        begins = np.flatnonzero(sizes_M > 0)
        ids_M = np.repeat(sequences.ids, sequences.positions.lengths)
        uniform_M = uniform(self._old.seed + _SEED, ids_M, sequences.positions.values)
        uniform_D = uniform_M[begins]
        following = Following(
            firsts_M[begins].astype(np.int64),
            labels_M[begins].astype(np.int64),
            np.exp((logprobs_M[begins] - targets.label_logprob).astype(np.float64)).clip(max=1.0),
        )
        parts = [
            self._mapped(
                targets.take(np.arange(start, min(start + _ROWS, len(begins)))),
                following.part(start, start + _ROWS),
                uniform_D[start : start + _ROWS],
            )
            for start in range(0, max(1, len(begins)), _ROWS)  # all at once would take gigabytes
        ]
        chunk_M = np.cumsum(sizes_M > 0) - 1
        # the positions behind a chunk without a distribution are its own
        lacks_M = np.cumsum(sizes_M != 0) - 1
        signs = sizes_M[sizes_M != 0] > 0
        inside = np.flatnonzero((sizes_M == 0) & signs[lacks_M])
        nodes_M, depths_M = self._table.beginnings.of_chunks(sizes_M, labels_M)
        for start in range(0, len(inside), _ROWS):
            at = inside[start : start + _ROWS]
            own = chunk_M[at]
            found = Inside(
                rows_I=own,
                nodes_I=nodes_M[at],
                depths_I=depths_M[at],
                labels_I=labels_M[at].astype(np.int64),
                firsts_I=theirs_D[own].astype(np.int64),
                logprobs_I=logprobs_M[begins[own]],
            )
            parts.append(self._continued(targets, found, uniform_M[at]))
        nothing = np.flatnonzero((sizes_M <= 0) & ~((sizes_M == 0) & signs[lacks_M]))
        parts.append(self._certain(labels_M[nothing]))
        order = np.empty(len(sizes_M), np.int64)
        order[np.concatenate([begins, inside, nothing])] = np.arange(len(sizes_M))
        made = Targets.concatenate(parts).take(order)
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

    def _mapped(
        self, targets: Targets, following: Following, uniform_D: NDArray[np.float64]
    ) -> Targets:
        entries, left_D, gained_D = self._known.entries(targets, following, uniform_D)
        lost_D = np.bincount(entries.rows_E, entries.merged_E, minlength=len(targets))
        entropy_D = (targets.entropy + gained_D - lost_D).clip(0.0, math.log(self._size))
        return self._record(entries, left_D, entropy_D, targets.log_tail, uniform_D)

    def _continued(
        self, targets: Targets, inside: Inside, uniform_I: NDArray[np.float64]
    ) -> Targets:
        """The records of positions inside chunks."""
        entries, entropy_I = self._continuations.entries(targets, self._old.tail, inside)
        nothing = np.zeros(len(uniform_I))
        return self._record(entries, nothing, entropy_I, nothing, uniform_I)

    def _record(
        self,
        entries: Entries,
        left_D: NDArray[np.float64],
        entropy_D: NDArray[np.float64],
        log_tail_D: NDArray[Any],
        uniform_D: NDArray[np.float64],
    ) -> Targets:
        """Records of known tokens.

        left_D      probability that is in the bucket
        log_tail_D  of the teacher's records, which is kept where their samples are
        """
        count, head = len(uniform_D), self._new.head
        # the head: the most probable of the tokens that a head's token maps to
        order = np.flatnonzero(entries.in_head_E)
        order = order[np.lexsort((-entries.masses_E[order], entries.rows_E[order]))]
        places = _places(entries.rows_E[order], count)
        ordered, slots = order[places < head], places[places < head]
        chosen_E = np.zeros(len(entries.rows_E), np.bool_)
        chosen_E[ordered] = True
        filled = np.bincount(entries.rows_E[chosen_E], minlength=count)
        head_ids = np.full((count, head), -1, np.int64)
        head_masses = np.zeros((count, head))
        head_ids[entries.rows_E[ordered], slots] = entries.ids_E[ordered]
        head_masses[entries.rows_E[ordered], slots] = entries.masses_E[ordered]
        outside = np.flatnonzero(~chosen_E)
        none_D = np.bincount(entries.rows_E[outside], minlength=count) == 0
        needs_tail = self._new.tail > 0
        wanted_D = head - filled + (none_D & needs_tail)
        counts, log_tail = self._drawn(log_tail_D, entries, outside, left_D, none_D, uniform_D)
        used_E = chosen_E.copy()
        used_E[outside] = counts > 0
        fill = self._fillers(entries.rows_E[used_E], entries.ids_E[used_E], wanted_D)
        head_ids[np.arange(head) >= filled[:, None]] = np.concatenate(
            [np.zeros(0, np.int64), *(own[: head - n] for own, n in zip(fill, filled, strict=True))]
        )
        with np.errstate(divide="ignore"):
            logs = np.log(head_masses)
        head_logprobs = np.maximum(logs, FLOOR).clip(max=0.0).astype(np.float32)
        tail = self._tail(entries, outside, counts, none_D, fill)
        zeros = np.zeros(count, np.float32)
        return Targets(
            head_ids=head_ids.astype(np.int32),
            head_logprobs=head_logprobs,
            log_tail=log_tail,
            tail=tail,
            label_logprob=zeros,
            entropy=entropy_D.astype(np.float32),
            log_norm=np.zeros((count, 0), np.float32),
            chunk_sizes=np.zeros((count, 1), np.int32),
        )

    def _drawn(
        self,
        log_tail_D: NDArray[Any],
        entries: Entries,
        outside: NDArray[np.int64],
        left_D: NDArray[np.float64],
        none_D: NDArray[np.bool_],
        uniform_D: NDArray[np.float64],
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """How often each entry outside the head counts, and [D] log of the mass there."""
        draws, count = self._new.tail, len(left_D)
        rows, masses = entries.rows_E[outside], entries.masses_E[outside]
        if self._new.head == self._size:
            return np.zeros(len(rows), np.int64), np.full(count, -np.inf, np.float32)
        sums_D = sums_at(rows, masses, count) + left_D
        with np.errstate(divide="ignore"):
            log_tail = np.maximum(np.log(sums_D), FLOOR).clip(max=0.0)
        if draws == 0:
            return np.zeros(len(rows), np.int64), log_tail.astype(np.float32)
        # positions that keep all of their draws, and nothing but them
        counts = entries.counts_E[outside]
        exact = ~entries.in_head_E[outside]
        same_D = sums_at(rows, counts * exact, count) == draws
        same_D &= sums_at(rows, ~exact, count) == 0
        # of a head that has lost tokens, the rest is scaled
        whole_D = np.abs(sums_D - np.exp(log_tail_D.astype(np.float64))) < _ROUNDING
        log_tail = np.where(same_D & whole_D, log_tail_D, log_tail)
        redrawn = np.flatnonzero(~same_D & ~none_D)
        if len(redrawn):
            place_D = np.zeros(count, np.int64)
            place_D[redrawn] = np.arange(len(redrawn))
            own = np.flatnonzero(~same_D[rows])
            counts[own] = systematic(place_D[rows[own]], masses[own], uniform_D[redrawn], draws)
        return counts, log_tail.astype(np.float32)

    def _tail(
        self,
        entries: Entries,
        outside: NDArray[np.int64],
        counts: NDArray[np.int64],
        none_D: NDArray[np.bool_],
        fill: list[NDArray[np.int64]],
    ) -> Tail:
        """The samples; positions without any have a token that nothing is known of."""
        draws, count = self._new.tail, len(none_D)
        if draws == 0:
            return Tail.empty(count)
        rows, kept, empty = entries.rows_E[outside], counts > 0, np.flatnonzero(none_D)
        filler = np.array([fill[row][-1] for row in empty.tolist()], np.int64)
        all_rows = np.concatenate([rows[kept], empty])
        order = np.argsort(all_rows, kind="stable")
        ids = np.concatenate([entries.ids_E[outside][kept], filler])[order]
        drawn = np.concatenate([counts[kept], np.full(len(empty), draws)])[order]
        return Tail(
            ids=ids.astype(np.int32),
            counts=drawn.astype(count_type(draws)),
            offsets=np.append(0, np.cumsum(np.bincount(all_rows, minlength=count))).astype(
                np.int64
            ),
        )

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


def _places(rows: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """The place of each entry among those of its position; `rows` does not decrease."""
    lengths = np.bincount(rows, minlength=count)
    return np.arange(len(rows)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
