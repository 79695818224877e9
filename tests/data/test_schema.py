"""Blocks, their lists and their columns."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from coldstill.data.columns import (
    check_hashes,
    expect_column,
    from_positions,
    from_sequences,
    to_positions,
    to_sequences,
)
from coldstill.data.ragged import Ragged
from coldstill.data.schema import (
    Block,
    Capture,
    Sequences,
    Tail,
    Targets,
    sequence_hash,
    target_shapes,
)
from oracles import random_block, random_branches, random_sequences


def rows_of(block: Block) -> list[list[Any]]:
    """A block as one list per sequence, its positions as one list each: slow and obvious."""
    found, place = [], 0
    for row, positions in enumerate(block.sequences.positions):
        own = [getattr(block.sequences, f.name) for f in fields(Sequences) if f.name != "branches"]
        if block.sequences.branches is not None:
            own += block.sequences.branches.columns().values()
        values = [array[row].tolist() for array in own]
        tail = block.targets.tail
        arrays = [getattr(block.targets, f.name) for f in fields(Targets) if f.name != "tail"]
        known = [] if tail.logprobs is None else [tail.logprobs]
        arrays += [Ragged(values_J, tail.offsets) for values_J in (tail.ids, tail.counts, *known)]
        places = range(place, place + len(positions))
        targets = [[a[m].tolist() for a in arrays] for m in places]
        found.append([values, targets])
        place += len(positions)
    assert place == len(block.targets)
    return found


@pytest.mark.parametrize(
    "capture",
    [
        Capture(head=3, tail=2),
        Capture(head=2, temperatures=(2.0,)),
        Capture(tail=2, branches=True),
    ],
)
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
        assert rows_of(Block.gather([(block, int(i)) for i in chosen])) == rows_of(taken)
    parts = [random_block(seed, count, capture) for seed, count in enumerate((3, 1, 5))]
    assert rows_of(Block.concatenate(parts)) == [row for part in parts for row in rows_of(part)]
    assert Block.concatenate(parts[:1]) is parts[0]


def test_target_shapes_are_those_of_targets() -> None:
    for capture in (Capture(), Capture(head=3, tail=2, temperatures=(2.0, 0.5))):
        targets = random_block(0, 9, capture).targets
        shapes = target_shapes(capture, len(targets))
        assert {f.name for f in fields(Targets)} == {*shapes, "tail"}
        for name, shape in shapes.items():
            value = getattr(targets, name)
            assert (value.shape, value.dtype) == shape
        assert (targets.tail.logprobs is None) != capture.keeps_tail_logprobs


def test_draws_are_counted_and_given_back() -> None:
    random = np.random.default_rng(0)
    ids_MR = random.integers(0, 9, (200, 12)).astype(np.int32)
    logprobs_MR = -np.arange(9, dtype=np.float32)[ids_MR]
    tail = Tail.from_draws(ids_MR, logprobs_MR)
    for row, ids_R in enumerate(ids_MR.tolist()):
        own = tail.take(np.array([row]))
        assert dict(zip(own.ids.tolist(), own.counts.tolist(), strict=True)) == Counter(ids_R)
        assert own.logprobs is not None
        assert (-own.logprobs == own.ids).all()
    assert np.array_equal(tail.ids[tail.draws(12)], np.sort(ids_MR, axis=1))
    with pytest.raises(ValueError, match="do not sum to 11"):
        tail.draws(11)
    assert len(Tail.from_draws(ids_MR[:, :0])) == 200
    assert len(Tail.from_draws(ids_MR[:0])) == 0


def test_tail_logprobs_are_kept_where_they_are_needed() -> None:
    assert not Capture(tail=4).keeps_tail_logprobs
    assert Capture(tail=4, tail_logprobs=True).keeps_tail_logprobs
    assert Capture(tail=4, temperatures=(2.0,)).keeps_tail_logprobs
    without = Capture(tail=0, temperatures=(2.0,), tail_logprobs=True)
    assert not without.keeps_tail_logprobs


def test_a_hash_depends_on_values_and_borders_and_not_on_dtype_or_layout() -> None:
    tokens, starts, positions = np.arange(6), np.array([0, 3]), np.array([0, 4])
    expected = sequence_hash(tokens, starts, positions)
    for same in (tokens.astype(">i4"), np.repeat(tokens, 2)[::2]):
        assert sequence_hash(same, starts.astype(np.int32), positions) == expected
    assert 0 <= expected < 2**64
    a, b, c = np.array([1, 2]), np.array([3]), np.array([1, 2, 3])
    parts = ((a, b, b), (b, a, b), (a, b, a), (c, b[:0], b), (c, b, b[:0]), (a[::-1], b, b))
    assert len({sequence_hash(*arrays) for arrays in parts}) == len(parts)


def lists(ragged: Ragged) -> list[list[Any]]:
    return [row.tolist() for row in ragged]


def random_rows(random: np.random.Generator) -> list[list[int]]:
    count = int(random.integers(0, 9))
    return [random.integers(0, 99, int(random.integers(0, 5))).tolist() for _ in range(count)]


def test_rows_are_laid_out_taken_and_joined_like_lists() -> None:
    random = np.random.default_rng(0)
    for _ in range(100):
        rows, other = [*random_rows(random), []], random_rows(random)
        ragged = Ragged.from_rows(rows, np.int32)
        assert lists(ragged) == rows
        assert len(ragged) == len(rows)
        assert ragged.values.dtype == np.int32
        assert ragged.offsets.dtype == np.int64
        assert ragged.lengths.tolist() == [len(row) for row in rows]
        chosen = random.integers(0, len(rows), int(random.integers(0, 12)))
        taken = ragged.take(chosen)
        assert lists(taken) == [rows[i] for i in chosen]
        assert taken.offsets.dtype == np.int64
        assert ragged.values[ragged.flat_indices(chosen)].tolist() == taken.values.tolist()
        joined = Ragged.concatenate([ragged, Ragged.from_rows(other, np.int32), taken])
        assert lists(joined) == [*rows, *other, *lists(taken)]
        assert (joined.offsets[0], joined.offsets[-1]) == (0, len(joined.values))


def test_take_keeps_the_other_axes_and_a_missing_row_is_an_index_error() -> None:
    ragged = Ragged(np.arange(12).reshape(6, 2), np.array([0, 1, 1, 4, 6]))
    taken = ragged.take(np.array([3, 1, 0, 3]))
    assert lists(taken) == [[[8, 9], [10, 11]], [], [[0, 1]], [[8, 9], [10, 11]]]
    for index in (-1, 4):
        with pytest.raises(IndexError):
            ragged[index]


def test_sequences_are_converted_to_columns_and_back() -> None:
    sequences = random_sequences(0, 7)
    columns = from_sequences(sequences)
    lists = {"token_ids", "document_starts", "document_ids", "positions"}
    assert set(columns) == lists | {"sequence_id", "sequence_hash"}
    back = to_sequences(columns)
    for f in fields(Sequences):
        assert getattr(back, f.name) is getattr(sequences, f.name)
    beside = replace(sequences, branches=random_branches(0, sequences))
    columns = from_sequences(beside)
    found = to_sequences(columns).branches
    assert beside.branches is not None
    assert found is not None
    for name, own in beside.branches.columns().items():
        assert getattr(found, name).values is own.values
        assert getattr(found, name).offsets is own.offsets
    tokens = columns["branch_tokens"]
    assert isinstance(tokens, Ragged)
    for name, wrong, line in (
        ("branch_sizes", Ragged(np.ones(len(found.sizes.values), np.int32), found.sizes.offsets),
         "less than two tokens"),
        ("branch_tokens", Ragged(tokens.values, np.minimum(tokens.offsets, 3)), "as many tokens"),
        ("branch_weights", Ragged(found.weights.values, found.weights.offsets[::-1]), "numbers"),
        ("branch_places", Ragged(found.places.values.astype(np.int64), found.places.offsets),
         "lists of int32"),
        ("branch_weights", np.zeros(7, np.float32), "lists of float32"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=line):
            to_sequences(columns | {name: wrong})
    with pytest.raises(ValueError, match="branch_places"):
        to_sequences({n: each for n, each in columns.items() if n != "branch_places"})


def test_position_columns_are_the_lists_with_the_borders_of_the_positions() -> None:
    sequences = random_sequences(0, 5)
    positions = sequences.positions
    values = np.arange(len(positions.values))
    columns = from_sequences(sequences) | from_positions({"x": values}, positions)
    assert columns["x"].offsets is positions.offsets  # type: ignore[union-attr]
    columns["shifted"] = Ragged(positions.values, np.roll(positions.offsets, 1))
    found = to_positions(columns | {"flat": np.arange(5)}, positions)
    assert list(found) == ["positions", "x"]
    assert found["x"] is values


def test_a_column_of_a_wrong_shape_or_type_is_named() -> None:
    arrays = {"x": np.zeros((3, 2), np.int32)}
    assert expect_column(arrays, "x", (3, 2), np.int32) is arrays["x"]
    assert expect_column(arrays, "none", (3, 0), np.int32).shape == (3, 0)
    for shape, dtype in (((3, 3), np.int32), ((2, 2), np.int32), ((3, 2), np.uint32)):
        with pytest.raises(ValueError, match=r"'x' should be .*: int32 \(3, 2\)"):
            expect_column(arrays, "x", shape, dtype)
    with pytest.raises(ValueError, match=r"'y' should be .*: nothing"):
        expect_column(arrays, "y", (3, 2), np.int32)


@pytest.mark.parametrize("name", ["tokens", "document_starts", "positions"])
def test_a_sequence_that_is_not_what_was_written_is_named(name: str) -> None:
    sequences = random_sequences(0, 6)
    check_hashes(sequences)
    column = getattr(sequences, name)
    row = int(np.flatnonzero(column.lengths)[-1])
    values = column.values.copy()
    values[column.offsets[row]] += 1
    changes: dict[str, Any] = {name: Ragged(values, column.offsets)}
    changed = replace(sequences, ids=sequences.ids + 1000, **changes)
    with pytest.raises(ValueError, match=f"sequence {1000 + row} is not what was written"):
        check_hashes(changed)
