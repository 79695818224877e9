"""The tokens that records know, under the ids of a student: mapped, split and added up.

Every token of the head and every sample becomes the student's first token for its bytes, and
probabilities that meet add up. An ambiguous token of the teacher (`TokenMap.ambiguous_V`) may be
the beginning of several tokens of the student. It is mapped like the others, or left in the bucket,
or split: shared out among the tokens that it begins in the texts of the store. Where the text
itself goes on with it, the share of the next token is known: the probability of the whole chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..ragged import places_in

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..schema import Capture, Targets
    from .mapping import Shares, TokenMap


_GOLDEN = 0.6180339887498949
"""Its multiples are spread evenly between 0 and 1."""
_Flat = tuple["NDArray[np.int64]", "NDArray[np.int64]", "NDArray[np.float64]", "NDArray[np.int64]"]
"""The position, the token, the probability and the count of entries."""


@dataclass(frozen=True, slots=True, eq=False)
class Entries:
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
class Following:
    """What is known of the tokens that follow at D positions, if the teacher spells the student's
    with several of its own."""

    firsts_D: NDArray[np.int64]
    """[D] the teacher's first token; -1 if it has only one."""
    labels_D: NDArray[np.int64]
    """[D] the student's token."""
    shares_D: NDArray[np.float64]
    """[D] its share of the probability of the teacher's first token."""

    def part(self, start: int, end: int) -> Following:
        """Some positions."""
        own = slice(start, end)
        return Following(self.firsts_D[own], self.labels_D[own], self.shares_D[own])


@dataclass(frozen=True, slots=True, eq=False)
class Masses:
    """Probability at D positions, as far as their records know it."""

    ambiguous_D: NDArray[np.float64]
    unmapped_D: NDArray[np.float64]
    spelled_D: NDArray[np.float64]
    """Of tokens that the student spells with several of its own."""


class KnownTokens:
    """Finds the known tokens of records by one table."""

    def __init__(
        self,
        table: TokenMap,
        old: Capture,
        new: Capture,
        *,
        bucket: bool = False,
        shares: Shares | None = None,
    ) -> None:
        """Use a table.

        old, new  capture of the teacher's records and of the student's
        bucket    leave the probability of ambiguous tokens in the bucket
        shares    share it out; without both it goes to the student's first token for their bytes
        """
        self._table, self._old, self._new, self._bucket = table, old, new, bucket
        self.size = len(table.unreached)
        """V of the student."""
        self._shares = shares

    def masses(self, targets: Targets) -> Masses:
        """Probability of ambiguous tokens, of those that the student cannot spell, and of those
        that it spells with several of its own."""
        rows, ids, masses, _ = known_tokens(targets, self._old)
        count = len(targets)

        def summed(chosen: NDArray[np.bool_]) -> NDArray[np.float64]:
            return sums_at(rows, masses * chosen, count)

        table = self._table
        several_V = np.diff(table.beginnings.offsets_V) > 0
        return Masses(
            summed(table.ambiguous_V[ids]),
            summed(table.first_V[ids] < 0),
            summed(several_V[ids]),
        )

    def sums(self, targets: Targets) -> NDArray[np.float64]:
        """[V of the teacher] the probability of each token, summed over the records."""
        _, ids, masses, _ = known_tokens(targets, self._old)
        return sums_at(ids, masses, len(self._table.first_V))

    def spelled(self) -> NDArray[np.float64]:
        """[V of the teacher] the share of each token's probability that goes to the first token of
        its own spelling: 1 unless it is ambiguous."""
        table, found_V = self._table, np.ones(len(self._table.first_V))
        if self._bucket:
            found_V[table.ambiguous_V] = 0.0
        elif (shares := self._shares) is not None:
            words = np.repeat(np.arange(len(found_V)), np.diff(shares.offsets_V))
            found_V[words] = 0.0
            own = shares.ids == table.first_V[words]
            found_V[words[own]] = shares.shares[own]
        return found_V

    def lacking(self, targets: Targets) -> NDArray[np.bool_]:
        """[M] whether no known token of a position can be mapped, so that nothing is left."""
        rows, ids, _, _ = known_tokens(targets, self._old)
        kept = np.bincount(rows, self._is_kept(ids), minlength=len(targets))
        return np.asarray(kept == 0)

    def _is_kept(self, ids: NDArray[np.int64]) -> NDArray[np.bool_]:
        kept = self._table.first_V[ids] >= 0
        return kept & ~self._table.ambiguous_V[ids] if self._bucket else kept

    def entries(
        self, targets: Targets, following: Following, uniform_D: NDArray[np.float64]
    ) -> tuple[Entries, NDArray[np.float64], NDArray[np.float64]]:
        """The known tokens, [D] the probability that is in the bucket, and [D] the entropy that is
        gained where a token is split."""
        rows, ids, masses, counts = known_tokens(targets, self._old)
        total = len(targets)
        kept = self._is_kept(ids)
        lost_D = sums_at(rows, masses * ~kept, total)
        flat = rows[kept], ids[kept], masses[kept], counts[kept]
        (rows, ids, masses, counts), gained_D = self._split(flat, following, uniform_D)
        keys, inverse = np.unique(rows * self.size + ids, return_inverse=True)
        found = len(keys)
        sums_E = sums_at(inverse, masses, found)
        with np.errstate(divide="ignore", invalid="ignore"):
            own = np.where(masses > 0, masses * np.log(masses), 0.0)
            joint_E = np.where(sums_E > 0, sums_E * np.log(sums_E), 0.0)
        several = np.bincount(inverse, minlength=found) > 1
        merged_E = np.where(several, joint_E - np.bincount(inverse, own, minlength=found), 0.0)
        rows_E = keys // self.size
        left_D = np.zeros(total)
        if self._new.tail:
            # what is lost counts as if the mapped tokens had been drawn instead
            shares = sums_at(rows_E, sums_E, total)
            scales_D = np.where(lost_D > 0, (shares + lost_D) / np.maximum(shares, 1e-300), 1.0)
            sums_E = sums_E * scales_D[rows_E]
        else:
            left_D = np.exp(targets.log_tail.astype(np.float64)) + lost_D
        entries = Entries(
            rows_E=rows_E,
            ids_E=keys % self.size,
            masses_E=sums_E,
            in_head_E=np.bincount(inverse, counts == 0, minlength=found) > 0,
            counts_E=np.bincount(inverse, counts, minlength=found).astype(np.int64),
            merged_E=merged_E.clip(min=0.0),
        )
        return entries, left_D, gained_D

    def _split(
        self,
        flat: _Flat,
        following: Following,
        uniform_D: NDArray[np.float64],
    ) -> tuple[_Flat, NDArray[np.float64]]:
        """Known tokens under the student's ids, ambiguous ones shared out: those of a head by their
        shares, samples one draw at a time. Also [D] the entropy that this adds."""
        rows, ids, masses, counts = flat
        mapped, none_D = self._table.first_V[ids].astype(np.int64), np.zeros(len(uniform_D))
        if self._shares is None:
            return (rows, mapped, masses, counts), none_D
        several = np.diff(self._shares.offsets_V)[ids] > 0
        in_head = counts == 0
        parts = [
            _Shared.of_head(self._shares, following, rows, ids, several & in_head),
            _Shared.of_samples(
                self._shares, following, rows, ids, several & ~in_head, counts, uniform_D
            ),
        ]
        made = [(rows[~several], mapped[~several], masses[~several], counts[~several])]
        gained_D = none_D
        for part in parts:
            made.append(
                (
                    rows[part.entries],
                    part.ids,
                    masses[part.entries] * part.shares,
                    np.where(in_head[part.entries], 0, 1),
                )
            )
            terms = -part.shares * np.log(np.maximum(part.shares, 1e-300))
            # as if the other shares of a sample were as its draws
            gained_D = gained_D + sums_at(
                rows[part.entries], masses[part.entries] * terms, len(uniform_D)
            )
        joined = [np.concatenate(column) for column in zip(*made, strict=True)]
        return (joined[0], joined[1], joined[2], joined[3]), gained_D


@dataclass(frozen=True, slots=True, eq=False)
class _Shared:
    """What ambiguous tokens become: the entries that are shared out, again and again."""

    entries: NDArray[np.int64]
    """Index of the entry."""
    ids: NDArray[np.int64]
    """The student's token."""
    shares: NDArray[np.float64]
    """Its share of the entry's probability."""

    @classmethod
    def of_head(
        cls,
        shares: Shares,
        following: Following,
        rows: NDArray[np.int64],
        ids: NDArray[np.int64],
        chosen: NDArray[np.bool_],
    ) -> _Shared:
        """Every share of the chosen entries."""
        lengths = np.diff(shares.offsets_V)[ids] * chosen
        entry, within = places_in(lengths)
        place = shares.offsets_V[ids][entry] + within
        share = shares.shares[place]
        # the share of the token that follows in the text is known, the others have the rest
        label_place, exact = _labels(shares, following, rows, ids)
        is_label = place == label_place[entry]
        known, own = following.shares_D[rows[entry]], shares.shares[label_place[entry]]
        others = share * (1.0 - known) / np.maximum(1.0 - own, 1e-300)
        share = np.where(exact[entry], np.where(is_label, known, others), share)
        return cls(entry, shares.ids[place], share)

    @classmethod
    def of_samples(
        cls,
        shares: Shares,
        following: Following,
        rows: NDArray[np.int64],
        ids: NDArray[np.int64],
        chosen: NDArray[np.bool_],
        counts: NDArray[np.int64],
        uniform_D: NDArray[np.float64],
    ) -> _Shared:
        """One token for each draw of the chosen entries, by equally spaced points."""
        entry, within = places_in(counts * chosen)
        # a shift for each position and token
        shift = (uniform_D[rows[entry]] + ids[entry] * _GOLDEN) % 1.0
        points = (shift + within) / counts[entry]
        label_place, exact = _labels(shares, following, rows, ids)
        label_place, exact = label_place[entry], exact[entry]
        known, own = following.shares_D[rows[entry]], shares.shares[label_place]
        ends = np.cumsum(shares.shares)
        starts = ends - shares.shares
        base = starts[np.minimum(shares.offsets_V[ids[entry]], len(starts) - 1)]
        # what is left of the points lies in the shares of the other tokens
        left = (points - known) / np.maximum(1.0 - known, 1e-300) * (1.0 - own)
        left = left + own * (left >= starts[label_place] - base)
        place = np.searchsorted(ends, base + np.where(exact, left, points), side="right")
        first, last = shares.offsets_V[ids[entry]], shares.offsets_V[ids[entry] + 1] - 1
        place = np.where(exact & (points < known), label_place, place.clip(first, last))
        return cls(entry, shares.ids[place], 1.0 / counts[entry])


def _labels(
    shares: Shares, following: Following, rows: NDArray[np.int64], ids: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """For each entry the place of the share of the token that follows in the text, and whether the
    entry is its beginning and something else shares it."""
    offsets, width = shares.offsets_V, int(shares.ids.max(initial=0)) + 1
    keys = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets)) * width + shares.ids
    labels = following.labels_D[rows]
    asked = ids * width + labels
    place = np.searchsorted(keys, asked).clip(max=max(0, len(keys) - 1))
    if len(keys) == 0:
        return place, np.zeros(len(ids), np.bool_)
    begins = (ids == following.firsts_D[rows]) & (labels < width)
    return place, begins & (keys[place] == asked) & (shares.shares[place] < 1.0)


def known_tokens(
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


def sums_at(places: NDArray[np.int64], weights: NDArray[Any], count: int) -> NDArray[np.float64]:
    """The sum of the weights at each of `count` places."""
    sums: NDArray[Any] = np.bincount(places, weights, minlength=count)
    return sums.astype(np.float64)
