"""Reads the data sets that Megatron-LM trains on: tokens in a `.bin` file, their borders in `.idx`.

The index is `MMIDIDX` with two zero bytes, the version 1 as uint64, a code for the type of a token,
the numbers of sequences and of documents as uint64, then lengths (int32) and first bytes (int64) of
all sequences.
"""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from ..errors import ColdstillError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from .files import SourceFile

ENDINGS = (".idx", ".bin")
_MAGIC, _HEAD = b"MMIDIDX\0\0", struct.Struct("<9sQBQQ")
_TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}


def token_sequences(file: SourceFile, rows: int, start: int) -> Iterator[NDArray[np.int64]]:
    """Sequences of a data set from number `start` on, as the trainer reads them without shuffling.

    file  its index or its tokens
    rows  positions of a sequence of the trainer. If all sequences of the data set have as many
          tokens, or one more, each is one; otherwise all tokens in order are cut into pieces of one
          more, each beginning with the last token of the piece before

    Raises
        ColdstillError: the file is not an index, or one of the files is cut short
    """
    stem = file.address[: -len(ENDINGS[0])]
    index, tokens = (replace(file, name=stem + end, address=stem + end) for end in ENDINGS)
    kind, lengths, firsts = _index(index)
    places: Iterator[tuple[int, int]]
    if ((lengths == rows) | (lengths == rows + 1)).all():
        places = zip(firsts[start:].tolist(), lengths[start:].tolist(), strict=True)
    else:
        borders = np.append(0, np.cumsum(lengths, dtype=np.int64) * kind.itemsize)
        if (firsts != borders[:-1]).any():
            raise ColdstillError(
                f"{index.name}: its sequences are not one after the other, so the trainer's cannot "
                "be made of them; give these as a column input_ids"
            )
        pieces = max(0, int(lengths.sum(dtype=np.int64)) - 1) // rows
        places = ((n * rows * kind.itemsize, rows + 1) for n in range(start, pieces))
    with tokens.open() as stream:
        for first, length in places:
            stream.seek(first)
            content = stream.read(length * kind.itemsize)
            if len(content) < length * kind.itemsize:
                raise ColdstillError(f"{tokens.name}: is cut short; fetch it again")
            yield np.frombuffer(content, kind).astype(np.int64)


def _index(file: SourceFile) -> tuple[np.dtype, NDArray[np.int32], NDArray[np.int64]]:
    """Type of a token, and length and first byte of each sequence."""
    with file.open() as stream:
        head = stream.read(_HEAD.size)
        if len(head) < _HEAD.size or head[:9] != _MAGIC:
            raise ColdstillError(f"{file.name}: is not the index of a data set of Megatron-LM")
        _, version, code, count, _ = _HEAD.unpack(head)
        if version != 1 or code not in _TYPES:
            raise ColdstillError(
                f"{file.name}: version {version} with tokens of type {code}, which is not read"
            )
        content = stream.read(12 * count) if count < 1 << 40 else b""
    if len(content) < 12 * count or not count:
        raise ColdstillError(f"{file.name}: is cut short; fetch it again")
    lengths = np.frombuffer(content[: 4 * count], "<i4")
    return np.dtype(_TYPES[code]), lengths, np.frombuffer(content[4 * count :], "<i8")
