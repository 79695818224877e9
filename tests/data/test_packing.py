from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from coldstill.data.alignment import labels
from coldstill.data.prepared import OPEN_SEQUENCES, Packer, TokenizedDocument, build_sequences
from coldstill.data.schema import check_hashes

CASES = [(seed, together) for seed in range(25) for together in (True, False)]
several = pytest.mark.parametrize(("seed", "together"), CASES)


def random_documents(seed: int, length: int, share: float = 1.0) -> list[TokenizedDocument]:
    """Documents of 1 to 3 sequences' length; no token id occurs twice among all of them."""
    random = np.random.default_rng(seed)
    documents: list[TokenizedDocument] = []
    number = 0
    for index in range(int(random.integers(1, 90))):
        size = int(random.integers(1, 3 * length + 1))
        tokens = np.arange(number, number + size, dtype=np.int32)
        documents.append(TokenizedDocument(index, tokens, random.random(size) < share))
        number += size
    return documents


def length_for(seed: int) -> int:
    return 2 + seed % 9


def pack(
    documents: list[TokenizedDocument], length: int, *, together: bool
) -> tuple[list[list[TokenizedDocument]], Packer]:
    packer = Packer(length, together=together)
    packed = [pieces for document in documents for pieces in packer.add(document)]
    return packed + list(packer.finish()), packer


@several
def test_each_token_except_the_first_of_a_document_is_the_label_of_one_position(
    seed: int, together: bool
) -> None:
    documents = random_documents(seed, length_for(seed))
    packed, _ = pack(documents, length_for(seed), together=together)
    found = labels(build_sequences(0, packed)) if packed else np.zeros(0, np.int32)
    assert sorted(found.tolist()) == [int(t) for d in documents for t in d.tokens_T[1:]]


@several
def test_only_learned_tokens_are_labels(seed: int, together: bool) -> None:
    documents = random_documents(seed, length_for(seed), share=0.3)
    packed, _ = pack(documents, length_for(seed), together=together)
    found = labels(build_sequences(0, packed)) if packed else np.zeros(0, np.int32)
    expected = [int(t) for d in documents for t in d.tokens_T[1:][d.learned_T[1:]]]
    assert sorted(found.tolist()) == expected


@several
def test_no_sequence_is_too_long_and_alone_means_alone(seed: int, together: bool) -> None:
    packed, _ = pack(random_documents(seed, length_for(seed)), length_for(seed), together=together)
    for pieces in packed:
        assert 0 < sum(len(piece.tokens_T) for piece in pieces) <= length_for(seed)
        assert together or len(pieces) == 1


@several
def test_a_document_that_fits_is_never_cut_and_pieces_of_others_share_one_token(
    seed: int, together: bool
) -> None:
    length = length_for(seed)
    documents = random_documents(seed, length)
    packed, _ = pack(documents, length, together=together)
    pieces_of: dict[int, list[list[int]]] = {}
    for piece in (piece for pieces in packed for piece in pieces):
        pieces_of.setdefault(piece.index, []).append(piece.tokens_T.tolist())
    for document in documents:
        tokens = document.tokens_T.tolist()
        pieces = sorted(pieces_of.get(document.index, []))
        if len(tokens) == 1:
            assert pieces == []  # nothing in it could ever be a label
        elif len(tokens) <= length:
            assert pieces == [tokens]
        else:
            assert len(pieces) > 1
            assert all(before[-1] == after[0] for before, after in pairwise(pieces))
            assert all(len(piece) == length for piece in pieces[:-1])
            assert [pieces[0][0]] + [t for piece in pieces for t in piece[1:]] == tokens


@several
def test_counts_report_cut_and_skipped_documents(seed: int, together: bool) -> None:
    length = length_for(seed)
    documents = random_documents(seed, length, share=0.2)
    packed, packer = pack(documents, length, together=together)
    assert packer.counts["documents"] == len(documents)
    assert packer.counts["cut_documents"] == sum(len(d.tokens_T) > length for d in documents)
    unlearnable = 0
    for document in documents:
        first = 0
        while True:
            unlearnable += not document.learned_T[first + 1 : first + length].any()
            first += length - 1
            if first >= len(document.tokens_T) - 1:
                break
    assert packer.counts["unlearnable_pieces"] == unlearnable
    assert all(piece.learned_T[1:].any() for pieces in packed for piece in pieces)


@several
def test_the_same_documents_give_the_same_sequences(seed: int, together: bool) -> None:
    documents = random_documents(seed, length_for(seed))
    once, _ = pack(documents, length_for(seed), together=together)
    again, _ = pack(documents, length_for(seed), together=together)
    assert [[p.tokens_T.tolist() for p in s] for s in once] == [
        [p.tokens_T.tolist() for p in s] for s in again
    ]


@several
def test_sequences_hold_document_borders_and_their_hash(seed: int, together: bool) -> None:
    documents = random_documents(seed, length_for(seed), share=0.8)
    packed, _ = pack(documents, length_for(seed), together=together)
    sequences = build_sequences(100, packed)
    check_hashes(sequences)
    assert sequences.ids.tolist() == list(range(100, 100 + len(packed)))
    for row, pieces in enumerate(packed):
        borders = [*sequences.document_starts[row].tolist(), len(sequences.tokens[row])]
        assert sequences.document_ids[row].tolist() == [piece.index for piece in pieces]
        for piece, (start, end) in zip(pieces, pairwise(borders), strict=True):
            assert sequences.tokens[row][start:end].tolist() == piece.tokens_T.tolist()


def test_the_hash_depends_on_tokens_borders_and_mask() -> None:
    def hash_of(tokens: list[list[int]], learned: bool) -> int:
        pieces = [
            TokenizedDocument(0, np.array(t, np.int32), np.array([True, True, learned][: len(t)]))
            for t in tokens
        ]
        return int(build_sequences(0, [pieces]).hashes[0])

    hashes = {
        hash_of([[1, 2, 3], [4, 5]], True),
        hash_of([[1, 2, 3], [4, 6]], True),
        hash_of([[1, 2, 3], [4, 5]], False),
        hash_of([[1, 2], [3, 4, 5]], True),
    }
    assert len(hashes) == 4


def test_short_documents_are_packed_tightly() -> None:
    random = np.random.default_rng(0)
    documents = [
        TokenizedDocument(i, np.zeros(size, np.int32), np.ones(size, np.bool_))
        for i, size in enumerate(random.integers(2, 200, 1000))
    ]
    packed, _ = pack(documents, 256, together=True)
    tokens = sum(len(document.tokens_T) for document in documents)
    assert tokens / (len(packed) * 256) > 0.95


def test_few_sequences_are_open_at_a_time() -> None:
    packer = Packer(8, together=True)
    waiting = 0
    for index in range(1000):  # no two of these fit together
        document = TokenizedDocument(index, np.zeros(5, np.int32), np.ones(5, np.bool_))
        waiting += 1 - len(list(packer.add(document)))
        assert waiting <= OPEN_SEQUENCES
    assert len(list(packer.finish())) == waiting


def test_a_sequence_of_one_token_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 tokens, got 1"):
        Packer(1, together=True)
