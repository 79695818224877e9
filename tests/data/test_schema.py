from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import pytest
from coldstill.data.schema import (
    Block,
    Capture,
    Ragged,
    Sequences,
    Targets,
    sequence_hash,
    target_shapes,
)
from oracles import random_block


def rows_of(block: Block) -> list[list[Any]]:
    """A block as one list per sequence, its positions as one list each: slow and obvious."""
    rows = []
    place = 0
    for row in range(len(block)):
        sequences = []
        for f in fields(Sequences):
            value = getattr(block.sequences, f.name)
            sequences.append(value[row].tolist())
        count = len(block.sequences.positions[row])
        positions = []
        for position in range(place, place + count):
            for f in fields(Targets):
                value = getattr(block.targets, f.name)
                positions.append(None if value is None else value[position].tolist())
        place += count
        rows.append([sequences, positions])
    assert place == len(block.targets)
    return rows


@pytest.mark.parametrize("capture", [Capture(head=3, tail=2), Capture(head=2, temperatures=(2.0,))])
def test_blocks_are_taken_and_joined_with_the_targets_of_their_sequences(capture: Capture) -> None:
    block = random_block(0, 9, capture)
    assert 0 in random_block(1, 8).sequences.positions.lengths  # one without any target
    rows = rows_of(block)
    random = np.random.default_rng(0)
    for _ in range(50):
        chosen = random.integers(0, 9, int(random.integers(1, 15)))
        taken = block.take(chosen)
        assert rows_of(taken) == [rows[i] for i in chosen]
        assert taken.capture == capture
    parts = [random_block(seed, count, capture) for seed, count in enumerate((3, 1, 5))]
    assert rows_of(Block.concatenate(parts)) == [row for part in parts for row in rows_of(part)]
    assert Block.concatenate(parts[:1]) is parts[0]


def test_target_shapes_are_those_of_targets() -> None:
    for capture in (Capture(), Capture(head=3, tail=2, temperatures=(2.0, 0.5))):
        targets = random_block(0, 9, capture).targets
        shapes = target_shapes(capture, len(targets))
        for f in fields(Targets):
            value = getattr(targets, f.name)
            assert (value is None) == (f.name not in shapes)
            assert value is None or (value.shape, value.dtype) == shapes[f.name]


@pytest.mark.parametrize(
    ("capture", "keeps"),
    [
        (Capture(tail=4), False),
        (Capture(tail=4, tail_logprobs=True), True),
        (Capture(tail=4, temperatures=(2.0,)), True),
        (Capture(tail=0, temperatures=(2.0,), tail_logprobs=True), False),
    ],
)
def test_tail_logprobs_are_kept_where_they_are_needed(capture: Capture, keeps: bool) -> None:
    assert capture.keeps_tail_logprobs is keeps


def test_a_hash_depends_on_values_and_not_on_dtype_or_layout() -> None:
    tokens, starts, positions = np.arange(6), np.array([0, 3]), np.array([0, 4])
    expected = sequence_hash(tokens, starts, positions)
    wide = Ragged.from_rows([tokens], np.int64)[0]
    assert sequence_hash(wide.astype(">i4"), starts.astype(np.int32), positions) == expected
    strided = np.repeat(tokens, 2)[::2]
    assert sequence_hash(strided, starts, positions) == expected
    assert 0 <= expected < 2**64


def test_a_hash_changes_with_each_part_and_with_the_border_between_them() -> None:
    a, b = np.array([1, 2]), np.array([3])
    hashes = [
        sequence_hash(a, b, b),
        sequence_hash(b, a, b),
        sequence_hash(a, b, a),
        sequence_hash(np.array([1, 2, 3]), b[:0], b),
        sequence_hash(np.array([1, 2, 3]), b, b[:0]),
        sequence_hash(np.array([2, 1]), b, b),
    ]
    assert len(set(hashes)) == len(hashes)
