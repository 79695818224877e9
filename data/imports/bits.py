"""Numbers of a fixed number of bits in bytes and words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


def id_bits(vocabulary: int) -> int:
    """Bits of one id: `ceil(log2 V)`, at least 1."""
    return max(1, (vocabulary - 1).bit_length())


def big_endian(packed: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.int32]:
    """[S, count] the numbers of one stream of bits per row, most significant bit first.

    packed  [S, ceil(count * bits / 8)]
    bits    bits of a number, 1 to 25
    """
    numbers = np.empty((len(packed), count), np.int32)
    for start in range(0, len(packed), _ROWS):  # few rows at a time stay in the cache
        _unpack(packed[start : start + _ROWS], bits, numbers[start : start + _ROWS])
    return numbers


_ROWS = 1024


def _unpack(packed: NDArray[np.uint8], bits: int, numbers: NDArray[np.int32]) -> None:
    count = numbers.shape[1]
    # every eighth number begins at the same bit of a byte
    for phase in range(min(8, count)):
        places = np.arange(phase, count, 8)
        first, shift = np.divmod(places * bits, 8)
        width = (int(shift[0]) + bits + 7) // 8
        word = np.zeros((len(packed), len(places)), np.uint32)
        for byte in range(width):
            word <<= np.uint32(8)
            word |= packed[:, first + byte]
        word >>= np.uint32(8 * width - int(shift[0]) - bits)
        numbers[:, places] = word & np.uint32((1 << bits) - 1)


def in_words(words: NDArray[np.uint64], bits: int, count: int) -> NDArray[np.int64]:
    """[S, count] the numbers in 64-bit words, least significant first; no number straddles two.

    words  [S, ceil(count / floor(64 / bits))]
    """
    each = 64 // bits
    mask = np.uint64((1 << bits) - 1)
    numbers = np.empty((len(words), words.shape[1] * each), np.int64)
    for place in range(each):
        numbers[:, place::each] = (words >> np.uint64(place * bits)) & mask
    return numbers[:, :count]


def as_float32(raw: NDArray[np.uint8], dtype: str) -> NDArray[np.float32]:
    """[S, n] float32 from [S, n * size] little-endian bytes of `float32`, `float16`, `float64` or
    `bfloat16`."""
    contiguous = np.ascontiguousarray(raw)
    if dtype == "bfloat16":
        high = contiguous.view("<u2").astype(np.uint32) << np.uint32(16)
        wide: NDArray[Any] = high.view(np.float32)
        return wide
    kind = {"float32": "<f4", "float16": "<f2", "float64": "<f8"}[dtype]
    return contiguous.view(kind).astype(np.float32, copy=False)


SIZES = {"float32": 4, "float16": 2, "bfloat16": 2, "float64": 8}
"""Bytes of a number, by the names of torch's types."""
