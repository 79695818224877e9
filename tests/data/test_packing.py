from __future__ import annotations

import itertools
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import pytest
from coldstill.data.alignment import labels
from coldstill.data.columns import check_hashes
from coldstill.data.prepared import OPEN_SEQUENCES, Packer, TokenizedDocument, build_sequences

if TYPE_CHECKING:
    from collections.abc import Iterator


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


def pack(
    documents: list[TokenizedDocument], length: int, *, together: bool
) -> tuple[list[list[TokenizedDocument]], Packer]:
    packer = Packer(length, together=together)
    packed = [pieces for document in documents for pieces in packer.add(document)]
    return packed + list(packer.finish()), packer


@dataclass(frozen=True)
class Case:
    """Random documents and the sequences that they are packed into."""

    length: int
    together: bool
    documents: list[TokenizedDocument]
    packed: list[list[TokenizedDocument]]
    packer: Packer


def cases(share: float = 1.0) -> Iterator[Case]:
    """Packed documents of which this share of the tokens is learned."""
    for seed, together in itertools.product(range(25), (True, False)):
        length = 2 + seed % 9
        documents = random_documents(seed, length, share)
        packed, packer = pack(documents, length, together=together)
        yield Case(length, together, documents, packed, packer)


@pytest.mark.parametrize("share", [1.0, 0.3])
def test_each_learned_token_but_the_first_of_a_document_is_the_label_of_one_position(
    share: float,
) -> None:
    for case in cases(share):
        found = labels(build_sequences(0, case.packed)).tolist() if case.packed else []
        learned = [d.tokens_T[1:][d.learned_T[1:]].tolist() for d in case.documents]
        assert sorted(found) == [token for tokens in learned for token in tokens]


def test_a_document_that_fits_is_never_cut_and_pieces_of_others_share_one_token() -> None:
    for case in cases():
        for pieces in case.packed:
            assert 0 < sum(len(piece.tokens_T) for piece in pieces) <= case.length
            assert case.together or len(pieces) == 1
        found: dict[int, list[list[int]]] = {}
        for piece in itertools.chain(*case.packed):
            found.setdefault(piece.index, []).append(piece.tokens_T.tolist())
        for document in case.documents:
            tokens = document.tokens_T.tolist()
            parts = sorted(found.get(document.index, []))
            if len(tokens) == 1:
                assert parts == []  # nothing in it could ever be a label
            elif len(tokens) <= case.length:
                assert parts == [tokens]
            else:
                assert len(parts) > 1
                assert all(before[-1] == after[0] for before, after in pairwise(parts))
                assert all(len(part) == case.length for part in parts[:-1])
                assert [parts[0][0]] + [t for part in parts for t in part[1:]] == tokens


def test_counts_report_cut_and_skipped_documents() -> None:
    for case in cases(share=0.2):
        counts, length = case.packer.counts, case.length
        sizes = [len(document.tokens_T) for document in case.documents]
        assert counts["documents"] == len(sizes)
        assert counts["cut_documents"] == sum(size > length for size in sizes)
        pieces = [
            document.learned_T[first + 1 : first + length]
            for document, size in zip(case.documents, sizes, strict=True)
            for first in range(0, max(size - 1, 1), length - 1)
        ]
        assert counts["unlearnable_pieces"] == sum(not learned.any() for learned in pieces)
        assert all(piece.learned_T[1:].any() for piece in itertools.chain(*case.packed))


def test_sequences_hold_document_borders_and_their_hash() -> None:
    for case in cases(share=0.8):
        sequences = build_sequences(100, case.packed)
        check_hashes(sequences)
        assert sequences.ids.tolist() == list(range(100, 100 + len(case.packed)))
        for row, pieces in enumerate(case.packed):
            borders = [*sequences.document_starts[row].tolist(), len(sequences.tokens[row])]
            assert sequences.document_ids[row].tolist() == [piece.index for piece in pieces]
            for piece, (start, end) in zip(pieces, pairwise(borders), strict=True):
                assert sequences.tokens[row][start:end].tolist() == piece.tokens_T.tolist()
        again, _ = pack(case.documents, case.length, together=case.together)
        assert build_sequences(100, again).hashes.tolist() == sequences.hashes.tolist()


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
    with pytest.raises(ValueError, match="at least 2 tokens, got 1"):
        Packer(1, together=True)
