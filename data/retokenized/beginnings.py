"""The beginnings of the teacher's tokens, as the student spells them."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray


class Beginnings:
    """The beginnings of the teacher's tokens, as the student spells them.

    A beginning is the first tokens of a spelling without the last one. The number of a beginning is
    above 0; 0 is the empty one.
    """

    def __init__(self, pieces: Sequence[Sequence[int]], student: int) -> None:
        """Number them.

        pieces   [V of the teacher] the student's tokens of each token of the teacher
        student  V of the student
        """
        self._size = student
        numbers: dict[tuple[int, int], int] = {}
        nodes: list[int] = []
        nexts: list[int] = []
        lengths = np.zeros(len(pieces), np.int64)
        for index, spelling in enumerate(pieces):
            node = 0
            for own, following in pairwise(spelling):
                node = numbers.setdefault((node, own), len(numbers) + 1)
                nodes.append(node)
                nexts.append(following)
            lengths[index] = max(0, len(spelling) - 1)
        self.count = len(numbers) + 1
        self.offsets_V = np.append(0, np.cumsum(lengths))
        """[V of the teacher + 1] token t goes through the beginnings of `nodes` in this range."""
        self.nodes = np.array(nodes, np.int64)
        self.nexts = np.array(nexts, np.int64)
        """The student's token that follows each of them."""
        keys = np.array([before * student + own for before, own in numbers], np.int64)
        order = np.argsort(keys)
        self._keys, self._numbers = keys[order], np.array([*numbers.values()], np.int64)[order]

    def of_chunks(
        self, sizes_M: NDArray[np.int32], labels_M: NDArray[np.int32]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """[M] the beginning that each chunk has up to a position, -1 if no token of the teacher has
        it, and [M] the number of its tokens, 0 at a chunk's first position."""
        nodes_M, depths_M = np.full(len(sizes_M), -1, np.int64), np.zeros(len(sizes_M), np.int64)
        at = np.flatnonzero(sizes_M > 1)
        left, node = sizes_M[at].astype(np.int64) - 1, np.zeros(len(at), np.int64)
        while len(at):
            node = self._after(node, labels_M[at])
            at, left = at + 1, left - 1
            nodes_M[at] = node
            depths_M[at] = depths_M[at - 1] + 1
            kept = left > 0
            at, left, node = at[kept], left[kept], node[kept]
        return nodes_M, depths_M

    def _after(self, node: NDArray[np.int64], label: NDArray[np.int32]) -> NDArray[np.int64]:
        if len(self._keys) == 0:
            return np.full(len(node), -1, np.int64)
        asked = node * self._size + label
        place = np.searchsorted(self._keys, asked).clip(max=len(self._keys) - 1)
        return np.where((node >= 0) & (self._keys[place] == asked), self._numbers[place], -1)
