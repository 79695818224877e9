"""Checks the targets that a caller passes, and computes missing fields from the others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .alignment import labels
from .errors import ColdstillError
from .order import uniform
from .schema import Tail, Targets, target_shapes
from .selection import select

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from .schema import Capture, Sequences

_SAME = 1e-4
"""Largest difference of two log-probabilities of one token."""
_WHOLE = 1e-3
"""Largest distance from 1 of the sum of a whole distribution."""
_SMALLEST_TAIL = 1e-9
"""Smallest mass outside a head that is not the whole vocabulary. The mass is 1 minus the head's,
and float32 log-probabilities of a head may sum to 1."""


def given_targets(
    where: str,
    given: Mapping[str, Any],
    labels_M: NDArray[np.int32],
    capture: Capture,
    vocabulary: int,
) -> Targets:
    """The targets of M positions from array-likes by field; None means "not passed". Raises
    ColdstillError for a wrong shape or dtype, or for a missing field that cannot be computed."""
    arrays = _arrays(where, given, capture, len(labels_M))
    for name in ("head_ids", "head_logprobs", "tail_ids"):  # nothing else can replace these
        if name not in arrays:
            raise ColdstillError(
                f"{where}: {name} is missing; the capture has head = {capture.head} and "
                f"tail = {capture.tail}"
            )
    with np.errstate(all="ignore"):  # numbers that are not finite are reported by `check_block`
        _derive(arrays, labels_M, vocabulary)
    if missing := _shapes(capture, len(labels_M)).keys() - arrays.keys():
        raise ColdstillError(
            f"{where}: {min(missing)} is missing and cannot be computed from the other arguments; "
            "pass it"
        )
    ids, known = arrays.pop("tail_ids"), arrays.pop("tail_logprobs", None)
    _expect_one_value(where, ids, known)
    tail = Tail.from_draws(ids, known)
    return Targets(**arrays, tail=tail)


def guesses_labels(targets: Targets, labels_M: NDArray[np.int32]) -> bool:
    """Whether the record lacks the log-probability of some label that was not passed."""
    known_M = (targets.head_ids == labels_M[:, None]).any(1)
    if targets.tail.logprobs is not None:
        known_M |= targets.tail.sums(targets.tail.ids == labels_M[targets.tail.rows()]) > 0
    return bool((~known_M).any())


def selected_targets(
    where: str, logprobs: Any, sequences: Sequences, capture: Capture, vocabulary: int
) -> Targets:
    """The targets of one sequence from whole distributions, drawn as stage one draws them: a
    function of seed, sequence and position. Raises ColdstillError for a wrong shape, a number above
    0 or that is none, or a sum that is not 1."""
    labels_M, positions_M = labels(sequences), sequences.positions.values
    wanted = (len(labels_M), vocabulary)
    logprobs_MV = numbers(where, "logprobs", logprobs, np.float64, wanted)
    if not (logprobs_MV <= _SAME).all():  # NaN too
        raise ColdstillError(f"{where}: logprobs: above 0, or not a number")
    sums_M = np.exp(logprobs_MV).sum(1)
    if (bad_M := np.abs(sums_M - 1.0) > _WHOLE).any():
        place = int(bad_M.argmax())
        raise ColdstillError(
            f"{where}, position {positions_M[place]}: logprobs sum to {sums_M[place]:.6g} as "
            "probabilities, expected 1; subtract their logsumexp"
        )
    ids_M = np.repeat(sequences.ids, len(labels_M))
    shift_M = uniform(capture.seed, ids_M, positions_M)
    return select(logprobs_MV, labels_M, shift_M, capture)


def _expect_one_value(where: str, ids_MR: NDArray[Any], logprobs_MR: NDArray[Any] | None) -> None:
    """Raises ColdstillError if draws of one token have different log-probabilities, of which only
    one would be kept, or one that is not a number."""
    if logprobs_MR is None:
        return
    order = np.argsort(ids_MR, axis=1, kind="stable")
    ids, known = (np.take_along_axis(array, order, axis=1) for array in (ids_MR, logprobs_MR))
    differ = ~(np.abs(np.diff(known, axis=1)) <= _SAME) & (np.diff(ids, axis=1) == 0)
    if differ.any():
        row, place = np.argwhere(differ)[0].tolist()
        raise ColdstillError(
            f"{where}: tail_logprobs: token {ids[row, place]} was drawn twice, with "
            f"{known[row, place]:.6g} and {known[row, place + 1]:.6g}"
        )


def _shapes(capture: Capture, count: int) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Shape and dtype of each argument; of samples, every draw is passed."""
    shapes = target_shapes(capture, count)
    shapes["tail_ids"] = ((count, capture.tail), np.int32)
    if capture.keeps_tail_logprobs:
        shapes["tail_logprobs"] = ((count, capture.tail), np.float32)
    return shapes


def numbers(
    where: str, name: str, value: Any, dtype: Any, shape: tuple[int | None, ...]
) -> NDArray[Any]:
    """An array of this dtype and shape; None in a shape stands for any length. Raises
    ColdstillError for other values or another shape."""
    try:
        array = np.asarray(value)
        whole = array.size == 0 or array.dtype.kind in "iu"
        if np.dtype(dtype).kind == "i" and not whole:
            raise ValueError(f"has dtype {array.dtype}, expected whole numbers")
        cast = array.astype(dtype)
        if whole and array.size and not np.array_equal(cast, array):
            raise ValueError("holds numbers beyond 32 bits")
        if array.size == 0 and 0 in shape:  # a sequence without supervised positions
            cast = np.zeros([length or 0 for length in shape], dtype)
    except (TypeError, ValueError) as error:
        raise ColdstillError(f"{where}: {name}: {error}") from error
    if len(cast.shape) != len(shape) or any(
        wanted not in (None, found) for found, wanted in zip(cast.shape, shape, strict=True)
    ):
        if None in shape:
            raise ColdstillError(f"{where}: {name} has shape {cast.shape}, expected a flat list")
        raise ColdstillError(
            f"{where}: {name} has shape {cast.shape}, expected {shape}: one entry per "
            "supervised position, with the width of the capture"
        )
    return cast


def _arrays(where: str, given: Mapping[str, Any], capture: Capture, count: int) -> dict[str, Any]:
    """The arguments that were passed as arrays, and empty arrays for fields of width 0."""
    shapes = _shapes(capture, count)
    arrays: dict[str, Any] = {}
    for name, value in given.items():
        if value is not None and name not in shapes:
            raise ColdstillError(
                f"{where}: {name} was passed, but the capture does not keep it; set "
                "Capture(tail_logprobs=True)"
            )
        if value is not None:
            shape, dtype = shapes[name]
            arrays[name] = numbers(where, name, value, dtype, shape)
    for name, (shape, dtype) in shapes.items():
        if 0 in shape[1:]:
            arrays.setdefault(name, np.zeros(shape, dtype))
    return arrays


def _derive(arrays: dict[str, Any], labels_M: NDArray[np.int32], vocabulary: int) -> None:
    """Add log_tail, label_logprob and entropy where they were not passed and follow."""
    ids_MK, logp_MK = arrays["head_ids"], arrays["head_logprobs"].astype(np.float64)
    head, outside = ids_MK.shape[1], vocabulary - ids_MK.shape[1]
    mass_M = np.exp(logp_MK).sum(1)
    if "log_tail" not in arrays:
        left_M = np.maximum(1.0 - mass_M, _SMALLEST_TAIL if outside else 0.0)
        arrays["log_tail"] = np.log(left_M).astype(np.float32)
    log_tail_M = arrays["log_tail"].astype(np.float64)
    samples = arrays.get("tail_logprobs")
    if head == 0 and samples is None:
        return
    # outside the head: the samples where they are known, otherwise an even distribution
    even_M = log_tail_M - np.log(max(1, outside))
    if "label_logprob" not in arrays:
        label_M = even_M
        if samples is not None:
            label_M = _at_label(arrays["tail_ids"], samples, labels_M, label_M)
        label_M = _at_label(ids_MK, logp_MK, labels_M, label_M)
        arrays["label_logprob"] = label_M.astype(np.float32)
    if "entropy" not in arrays:
        mean_M = even_M if samples is None else samples.astype(np.float64).mean(1)
        rest_M = np.where(log_tail_M > -np.inf, np.exp(log_tail_M) * mean_M, 0.0)
        entropy_M = -(np.exp(logp_MK) * logp_MK).sum(1) - rest_M
        arrays["entropy"] = entropy_M.clip(0.0, np.log(vocabulary)).astype(np.float32)


def _at_label(
    ids: NDArray[Any], logp: NDArray[Any], labels_M: NDArray[Any], otherwise_M: NDArray[Any]
) -> NDArray[Any]:
    """[M] the log-probability of the label if it is among the ids."""
    is_label = ids == labels_M[:, None]
    found = np.take_along_axis(logp, is_label.argmax(1)[:, None], axis=1)[:, 0] if ids.size else 0.0
    return np.where(is_label.any(1), found, otherwise_M)
