from __future__ import annotations

import numpy as np
from coldstill.data.alignment import labels, supervised_positions
from coldstill.data.prepared import TokenizedDocument, build_sequences


def test_supervised_positions_are_those_of_a_loop() -> None:
    """A position is supervised if the token after it is learned and of the same document."""
    random = np.random.default_rng(0)
    for _ in range(300):
        size = int(random.integers(1, 20))
        learned = random.random(size) < 0.6
        others = np.flatnonzero(random.random(size) < 0.2)
        starts = np.unique(np.concatenate([[0], others])).astype(np.int32)
        found = supervised_positions(learned, starts)
        expected = [p for p in range(size - 1) if learned[p + 1] and p + 1 not in starts]
        assert found.tolist() == expected
        assert found.dtype == np.int32


def test_the_answer_is_shifted_by_one_and_the_mask_is_unchanged() -> None:
    learned = np.array([False, False, False, True, True, False])
    before = learned.copy()
    assert supervised_positions(learned, np.array([0], np.int32)).tolist() == [2, 3]  # not [3, 4]
    np.testing.assert_array_equal(learned, before)
    document = TokenizedDocument(0, np.array([10, 11, 12, 13, 14, 15], np.int32), learned)
    assert labels(build_sequences(0, [[document]])).tolist() == [13, 14]  # not [12, 13]


def test_labels_are_those_of_a_loop_over_sequences_and_documents() -> None:
    random = np.random.default_rng(1)
    for _ in range(100):
        packed, expected, number = [], [], 0
        for _ in range(int(random.integers(1, 5))):
            pieces = []
            for _ in range(int(random.integers(1, 4))):
                size = int(random.integers(1, 7))
                tokens = np.arange(number, number + size, dtype=np.int32)  # no two alike
                number += size
                learned = random.random(size) < 0.7
                pieces.append(TokenizedDocument(0, tokens, learned))
                expected += [int(tokens[i]) for i in range(1, size) if learned[i]]
            packed.append(pieces)
        assert labels(build_sequences(0, packed)).tolist() == expected
