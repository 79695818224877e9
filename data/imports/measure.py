"""Measures what a source does not say: where its rows belong, and what their numbers are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..alignment import READINGS, row_positions
from ..errors import ColdstillError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from .rows import Format, SourceRows

_DISTANCES = {"the token before": -1, **READINGS, "two tokens on": 2}
_FIT, _MARGIN, _FEW = 0.08, 2.0, 48
"""The smallest mean of 1 / rank of the label that fits, how far the best reading must be ahead of
the others, and the fewest rows that decide. (Measured on caches of twelve kinds: 0.60 to 0.74 under
the right reading, 0.02 to 0.13 under the others.)"""
_FLOAT, _HALF, _ALMOST_ALL = 2e-6, 2e-3, 0.98
"""Distance from 1 of the sums of a source that was renormalised and stored as float32 or in half
precision, and the share of its rows for which that holds; others may be damaged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """How well the label is predicted under each reading."""

    rows: int
    """Rows that were looked at."""
    scores: dict[str, float]
    """Mean of 1 / rank of the label among a row's entries, 0 where it is not, by reading."""
    hits: dict[str, float]
    """Share of rows with the label among their entries."""
    probability: dict[str, float]
    """Mean of the label's probability, normalised over the row's entries."""

    @property
    def best(self) -> str:
        return max(self.scores, key=lambda reading: self.scores[reading])

    @property
    def is_clear(self) -> bool:
        """Whether one reading fits and no other one comes near."""
        first, second = sorted(self.scores.values(), reverse=True)[:2]
        return self.rows >= _FEW and first >= _FIT and first >= _MARGIN * second

    def text(self) -> str:
        """The figures in words."""
        names = {"own": "rows about their own token", "next": "rows about the next token"}
        parts = [
            f"{names.get(reading, f'rows about {reading}')}: label in {self.hits[reading]:.0%} of "
            f"the rows, mean 1/rank {score:.2f}, mean probability {self.probability[reading]:.2f}"
            for reading, score in self.scores.items()
        ]
        return "; ".join(parts)


def fit_of(samples: Sequence[SourceRows], rows_of_each: int = 1 << 30) -> Fit:
    """The label's rank and probability under each reading.

    rows_of_each  most rows that are looked at in each of the samples, evenly spread
    """
    sums = {reading: np.zeros(4) for reading in _DISTANCES}
    most = 0
    for rows in samples:
        every = max(1, -(-len(rows.ids) // rows_of_each))
        order_SK, probs_SK = _ordered(rows, every)
        for reading, distance in _DISTANCES.items():
            _, labels_S, has_S = row_positions(
                rows.tokens, rows.places, rows.document_starts, distance
            )
            labels_S, has_S = labels_S[::every], has_S[::every]
            has_S &= np.isfinite(probs_SK).all(1) & (probs_SK.sum(1) > 0)
            if not has_S.any():
                continue
            found = order_SK[has_S] == labels_S[has_S, None]
            hit = found.any(1)
            rank = 1.0 + found.argmax(1)
            own = np.where(found, probs_SK[has_S], 0.0).sum(1)
            sums[reading] += (len(hit), hit.sum(), (hit / rank).sum(), own.sum())
            most = max(most, int(sums[reading][0]))

    def means(place: int) -> dict[str, float]:
        return {name: float(each[place] / max(1.0, each[0])) for name, each in sums.items()}

    return Fit(rows=most, scores=means(2), hits=means(1), probability=means(3))


_LOOKED_AT = 1024
"""Rows of each part of a source that are compared with the first ones."""
_LOOKED = 64
"""Most probable tokens of a whole distribution that are looked at."""


def _ordered(rows: SourceRows, every: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """[S, K] ids and probabilities of every n-th row, most probable first."""
    ids, values = rows.ids[::every], rows.values[::every]
    if rows.full is not None:
        tops = [(np.zeros((0, 1), np.int64), np.zeros((0, 1), np.float32))]
        chosen = rows.full.take(np.arange(0, len(rows.ids), every))
        for _, full in chosen.parts():
            width = min(_LOOKED, full.shape[1])
            top = np.argpartition(-full, width - 1, axis=1)[:, :width]
            tops.append((top, np.take_along_axis(full, top, 1)))
        ids = np.concatenate([top for top, _ in tops[1:] or tops])
        values = np.concatenate([value for _, value in tops[1:] or tops])
    with np.errstate(all="ignore"):
        values = np.where(ids >= 0, values, -np.inf)
        order = np.argsort(-values, axis=1, kind="stable")
        ids = np.take_along_axis(ids, order, 1)
        values = np.take_along_axis(values, order, 1).astype(np.float64)
        top = values[:, :1] if values.shape[1] else values
        probs = np.exp(values - top)
        probs = np.where(np.isnan(values), np.nan, probs)
        return ids, np.nan_to_num(probs / probs.sum(1, keepdims=True), nan=0.0)


def decided(fit: Fit, kind: Format, given: str | None, where: str) -> str:
    """The reading of a source: as measured; as given or documented where too few rows decide.
    Raises ColdstillError if no reading fits, or another one than was given."""
    if fit.is_clear and fit.best in READINGS:
        if given not in (None, fit.best):
            raise ColdstillError(f"{where}: --alignment {given} does not fit: {fit.text()}")
        return fit.best
    best = fit.scores[fit.best]
    if fit.rows >= _FEW and not (given and fit.best == given and best >= _FIT):
        raise ColdstillError(
            f"{where}: no alignment fits its tokens, so they are other tokens than the teacher's, "
            f"or not in their order: {fit.text()}"
        )
    if reading := given or kind.documented:
        return reading
    raise ColdstillError(
        f"{where}: {fit.rows} rows are too few to measure the alignment ({fit.text()}); give it "
        "with --alignment own or --alignment next"
    )


def expect_same_fit(rows: SourceRows, reading: str, usual: float) -> None:
    """Refuse records that fit another reading than the first ones. Raises ColdstillError (the
    figures).  usual  the score of the reading in the first records"""
    fit = fit_of([rows], _LOOKED_AT)
    if fit.rows >= _FEW and fit.is_clear and fit.best != reading:
        raise ColdstillError(
            f"{rows.where(0)}: from here the alignment is another one than in the first records "
            f"({reading}): {fit.text()}; import such files one by one"
        )
    if fit.rows >= 4 * _FEW and fit.scores[reading] < usual / 8:
        raise ColdstillError(
            f"{rows.where(0)}: from here the rows no longer fit the tokens: {fit.text()}; in the "
            f"first records the mean 1/rank was {usual:.2f}"
        )


def kind_of_values(samples: Sequence[SourceRows], kind: Format, vocabulary: int) -> str:
    """What the numbers of a source are, by the sums of their exponentials: at most 1 for
    log-probabilities, always 1 if they were renormalised, anything for logits. Where the rows have
    the whole vocabulary, nothing was lost by either."""
    if kind.values not in ("unknown", "probabilities"):
        return kind.values
    with np.errstate(all="ignore"):
        sums = np.concatenate(
            [
                np.exp(np.where(rows.ids >= 0, rows.values, -np.inf).astype(np.float64)).sum(1)
                for rows in samples
            ]
        )
    sums = sums[np.isfinite(sums) & (sums > 0)]
    if len(sums) == 0 or np.mean(sums > 1 + kind.rounding) > 0.1:
        return "logprobs" if kind.values == "probabilities" else "logits"
    if all(((rows.ids >= 0).sum(1) >= vocabulary).all() for rows in samples):
        return "logprobs"
    exact = np.mean(np.abs(sums - 1) <= _FLOAT)
    # in half precision the sums scatter around 1; sums of true probabilities are not above it
    rounded = np.mean(np.abs(sums - 1) <= _HALF) if np.mean(sums > 1 + _FLOAT) >= 0.1 else 0.0
    return "renormalised" if max(exact, rounded) >= _ALMOST_ALL else "logprobs"
