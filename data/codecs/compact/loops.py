"""The inner loops of decoding `compact`, compiled by numba: one pass over the entries each.

Importing this file compiles them, or loads what an earlier process has compiled from the disk.
They give the same bits as the numpy code that they replace (`compiled.py`). They release the global
lock, start no threads, and do not check indices: their callers compare all lengths beforehand.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import numba
import numpy as np
from numba import types

from .rounding import STEPS

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    Bytes = NDArray[np.uint8]
    Whole = NDArray[np.int64]

_Loop = TypeVar("_Loop", bound="Callable[..., Any]")


def _given(dtype: Any, axes: int = 1) -> Any:
    """An array that a loop reads; those of a mapped file cannot be written."""
    return types.Array(dtype, axes, "C", readonly=True)


_BYTES, _SHORTS, _WHOLE = map(_given, (types.uint8, types.uint16, types.int64))
_IDS, _BITS = _given(types.int32), _given(types.boolean)
_LISTS = types.UniTuple(_BYTES, 4)
_INT = types.int64
if numba.config.DISABLE_JIT:
    raise ImportError("NUMBA_DISABLE_JIT is set")

_signed: Any = np.int64
_unsigned: Any = np.uint64


def _compiled(*signatures: tuple[Any, ...]) -> Callable[[_Loop], _Loop]:
    """Compile a loop for these types of its arguments, or load it from the disk."""
    compile_: Any = numba.njit(list(signatures), cache=True, nogil=True)
    return lambda loop: compile_(loop)


@_compiled((types.uint16,))
def _unfolded(folded: int) -> Any:
    """0, 1, 2, 3, 4 as 0, -1, 1, -2, 2."""
    half = _signed(folded >> 1)
    return -half - 1 if folded & 1 else half


@_compiled((_WHOLE, _WHOLE))
def quarter_borders(sizes_M: Whole, borders_N: Whole) -> Whole:
    """[4, N + 1] how many entries of each quarter are in the sets before these borders."""
    borders = np.zeros((4, len(borders_N)), np.int64)
    for row in range(1, len(borders_N)):
        borders[:, row] = borders[:, row - 1]
        for m in range(borders_N[row - 1], borders_N[row]):
            start = 0
            for quarter in range(4):
                end = ((quarter + 1) * sizes_M[m] + 3) // 4
                borders[quarter, row] += end - start
                start = end
    return borders


@_compiled((_LISTS, _given(types.int64, 2), _INT, _INT, _INT))
def wide_borders(
    lists: tuple[Bytes, ...], borders_QN: Whole, mask: int, direct: int, narrow_end: int
) -> Whole:
    """[2, N + 1] how many entries with one and with two further bytes are before these borders.

    borders_QN  [4, N + 1] the borders in each list
    """
    borders = np.zeros((2, borders_QN.shape[1]), np.int64)
    for quarter in range(4):
        symbols = lists[quarter]
        for row in range(1, borders_QN.shape[1]):
            narrow = wide = 0
            for place in range(borders_QN[quarter, row - 1], borders_QN[quarter, row]):
                class_ = symbols[place] & mask
                narrow += class_ >= direct
                wide += class_ >= narrow_end
            borders[0, row] += narrow
            borders[1, row] += wide
    for row in range(1, borders_QN.shape[1]):
        borders[:, row] += borders[:, row - 1]
    return borders


@_compiled((_LISTS, _BYTES, _BYTES, _WHOLE, _given(types.uint32), _INT, _INT, _INT, _IDS))
def unpack(
    lists: tuple[Bytes, ...],
    low: Bytes,
    high: Bytes,
    sizes_M: Whole,
    bases: NDArray[np.uint32],
    mask: int,
    direct: int,
    narrow_end: int,
    tokens_V: NDArray[np.int32],
) -> tuple[NDArray[np.int32], NDArray[np.bool_], Whole, int]:
    """[J] ids and flags, [M] how many flags are set, and the largest rank.

    tokens_V  the id of each rank; empty, and the ids are the ranks
    """
    count = sizes_M.sum()
    ids = np.empty(count, np.int32)
    flags = np.empty(count, np.bool_)
    flagged_M = np.empty(len(sizes_M), np.int64)
    largest = 0
    # indices without a sign: numba looks whether one with a sign counts from the end
    one = _unsigned(1)
    at = narrow = wide = _unsigned(0)
    places = np.zeros(4, np.uint64)
    for m in range(len(sizes_M)):
        last, start, flagged = -1, 0, 0
        for quarter in range(4):
            end = ((quarter + 1) * sizes_M[m] + 3) // 4
            symbols, place = lists[quarter], places[quarter]
            stop = place + _unsigned(end - start)
            while place < stop:
                symbol = symbols[place]
                place += one
                class_ = symbol & mask
                gap = _signed(class_)
                if class_ >= direct:
                    gap = _signed(bases[_unsigned(class_)]) + low[narrow]
                    narrow += one
                    if class_ >= narrow_end:
                        gap += _signed(high[wide]) << 8
                        wide += one
                last += gap + 1
                ids[at] = tokens_V[_unsigned(last)] if last < len(tokens_V) else last
                flag = symbol > mask
                flags[at] = flag
                flagged += flag
                at += one
            places[quarter] = stop
            start = end
        flagged_M[m] = flagged
        largest = max(largest, last)
    return ids, flags, flagged_M, largest


@_compiled((types.Array(types.uint32, 2, "C"), _given(types.uint8, 2)))
def head_keys(ranks_MK: NDArray[np.uint32], levels_MK: Bytes) -> None:
    """Put 255 less the level into the highest byte of each rank."""
    for m in range(ranks_MK.shape[0]):
        for k in range(ranks_MK.shape[1]):
            ranks_MK[m, k] |= np.uint32(255 - levels_MK[m, k]) << np.uint32(24)


@_compiled(
    (
        _given(types.uint32, 2), _IDS, _WHOLE, _WHOLE,
        types.Array(types.int32, 2, "C"), types.Array(types.uint8, 2, "C"),
        types.Array(types.int64, 2, "A"),
    )
)  # fmt: skip
def head_rows(
    keys_MK: NDArray[np.uint32],
    tokens_V: NDArray[np.int32],
    parts: Whole,
    terms: Whole,
    tokens_MK: NDArray[np.int32],
    levels_MK: Bytes,
    sums_2M: Whole,
) -> None:
    """The tokens and levels of sorted keys, and the sums of the levels' weights, into the last
    three arrays."""
    for m in range(keys_MK.shape[0]):
        weight = term = 0
        for k in range(keys_MK.shape[1]):
            level = np.uint32(255) - (keys_MK[m, k] >> np.uint32(24))
            tokens_MK[m, k] = tokens_V[keys_MK[m, k] & np.uint32(0xFFFFFF)]
            levels_MK[m, k] = level
            weight += parts[level]
            term += terms[level]
        sums_2M[0, m], sums_2M[1, m] = weight, term


@_compiled((_given(types.uint8, 2), _given(types.float32), _given(types.float32)))
def head_logprobs(
    levels_MK: Bytes, logs: NDArray[np.float32], shift_M: NDArray[np.float32]
) -> NDArray[np.float32]:
    """[M, K] the log of each level, shifted."""
    logprobs = np.empty(levels_MK.shape, np.float32)
    for m in range(levels_MK.shape[0]):
        for k in range(levels_MK.shape[1]):
            logprobs[m, k] = logs[levels_MK[m, k]] + shift_M[m]
    return logprobs


@_compiled(*((_BITS, _WHOLE, kind, _INT, _WHOLE) for kind in (_BYTES, _SHORTS)))
def counts(
    often_J: NDArray[np.bool_],
    sizes_M: Whole,
    stored: NDArray[Any],
    draws: int,
    entropies: Whole,
) -> tuple[NDArray[Any], Whole, Whole, bool]:
    """[J] the counts; [M] the first entry that was drawn most often, and the sum of `entropies`
    of the counts; and whether the counts of every position sum to R."""
    counts_J = np.ones(len(often_J), stored.dtype)
    tops_M = np.empty(len(sizes_M), np.int64)
    sums_M = np.empty(len(sizes_M), np.int64)
    fits = True
    one = _unsigned(1)
    at = kept = _unsigned(0)
    for m in range(len(sizes_M)):
        left, top, most, found = draws - sizes_M[m], at, 1, False
        total = sizes_M[m] * entropies[1]
        before, end = at, at + _unsigned(sizes_M[m])
        while at < end:
            if often_J[at]:
                if found:
                    count = _signed(stored[kept]) + 2
                    kept += one
                    counts_J[before] = count
                    left -= count - 1
                    total += entropies[_unsigned(count)] - entropies[1]
                    if count > most:
                        most, top = count, before
                before, found = at, True
            at += one
        if found and left >= 1:
            counts_J[before] = left + 1
            total += entropies[_unsigned(left + 1)] - entropies[1]
            if left + 1 > most:
                top = before
        elif found or left != 0:
            fits = False
        tops_M[m], sums_M[m] = top, total
    return counts_J, tops_M, sums_M, fits


@_compiled(
    *(
        (_BYTES, _SHORTS, _SHORTS, _SHORTS, _WHOLE, _given(types.int32, 2), _given(types.uint8, 2),
         _WHOLE, _WHOLE, _IDS, kind, _WHOLE, _WHOLE, _WHOLE)
        for kind in (_BYTES, _SHORTS)
    )
)  # fmt: skip
def labels(
    code_M: Bytes,
    logprob_M: NDArray[np.uint16],
    entropy_M: NDArray[np.uint16],
    angle_M: NDArray[np.uint16],
    angle_steps: Whole,
    ids_MK: NDArray[np.int32],
    levels_MK: Bytes,
    level_steps: Whole,
    offsets: Whole,
    ids_J: NDArray[np.int32],
    counts_J: NDArray[Any],
    count_steps: Whole,
    tops_M: Whole,
    expected_M: Whole,
) -> tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.float32], bool]:
    """[M] id of each label with a code, its log-probability, and the entropy; and whether every
    code has a place.

    expected_M  about the entropy, in steps
    """
    ids_M = np.zeros(len(code_M), np.int32)
    logprobs_M = np.empty(len(code_M), np.float32)
    entropies_M = np.empty(len(code_M), np.float32)
    head = ids_MK.shape[1]
    step = np.float32(1.0 / STEPS)
    fits = True
    for m in range(len(code_M)):
        code = _signed(code_M[m])
        expected = angle_steps[angle_M[m]]
        if code == 0:
            expected += count_steps[0]
        elif code <= head:
            ids_M[m] = ids_MK[m, code - 1]
            expected = level_steps[levels_MK[m, code - 1]]
        elif code - head - 1 <= offsets[m + 1] - offsets[m] and offsets[m + 1] > offsets[m]:
            entry = tops_M[m] if code == head + 1 else offsets[m] + code - head - 2
            ids_M[m] = ids_J[entry]
            expected += count_steps[counts_J[entry]]
        else:
            fits = False
        logprobs_M[m] = np.float32(np.uint16(expected + _unfolded(logprob_M[m]))) * -step
        entropies_M[m] = np.float32(np.uint16(expected_M[m] + _unfolded(entropy_M[m]))) * step
    return ids_M, logprobs_M, entropies_M, fits


@_compiled(
    *((kind, _WHOLE, _IDS, _WHOLE, _BYTES, _IDS) for kind in (_SHORTS, _given(types.uint32)))
)
def tokens(
    stored: NDArray[Any],
    offsets: Whole,
    positions: NDArray[np.int32],
    borders_N: Whole,
    code_M: Bytes,
    labels_M: NDArray[np.int32],
) -> tuple[NDArray[np.int32], Whole, bool]:
    """All tokens of the sequences, their borders, and whether every label is inside its sequence.

    stored     the tokens that are not labels with a code, with their borders
    positions  the supervised positions, with their borders
    """
    ends = np.zeros(len(offsets), np.int64)
    for row in range(1, len(offsets)):
        known = 0
        for m in range(borders_N[row - 1], borders_N[row]):
            known += code_M[m] > 0
        ends[row] = ends[row - 1] + known + offsets[row] - offsets[row - 1]
    found = np.full(ends[-1], -1, np.int32)
    fits = True
    for row in range(len(offsets) - 1):
        for m in range(borders_N[row], borders_N[row + 1]):
            place = ends[row] + positions[m] + 1
            if code_M[m] > 0:
                if ends[row] <= place < ends[row + 1] and found[place] < 0:
                    found[place] = labels_M[m]
                else:
                    fits = False
    at = 0
    for place in range(len(found)):
        if found[place] < 0 and at < len(stored):
            found[place] = stored[at]
            at += 1
    return found, ends, fits
