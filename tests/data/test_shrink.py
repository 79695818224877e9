"""Smaller heads and tails: equal to captured ones, or without bias."""

from __future__ import annotations

import functools
import itertools
import tracemalloc
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from coldstill.data.maintenance.shrink import shrink, shrink_block, smaller_capture
from coldstill.data.prepared import TokenizedDocument, build_sequences
from coldstill.data.schema import Block, Capture, Sequences, Tail, Targets
from coldstill.data.store.reader import open_store
from oracles import VOCABULARY, draws, manifest_for, numbers, random_block, write_missing
from refusals import refusal

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

LARGE = Capture(head=16, tail=6, temperatures=(0.5, 2.0), tail_logprobs=True, seed=7)
SEED, COUNT = 3, 12
WHOLE = replace(LARGE, head=VOCABULARY, tail=0)
SIZES = [(8, 0), (8, 4), (16, 4), (16, 1), (0, 6), (1, 6), (12, 6)]


def dense_logprobs() -> NDArray[np.float32]:
    """[M, V] the log-probabilities of the teacher of `random_block(SEED, COUNT, ...)`."""
    targets = random_block(SEED, COUNT, WHOLE).targets
    dense = np.empty_like(targets.head_logprobs)
    np.put_along_axis(dense, targets.head_ids.astype(np.int64), targets.head_logprobs, axis=1)
    return dense


def shrunk(head: int, tail: int, old: Capture = LARGE) -> Block:
    return shrink_block(random_block(SEED, COUNT, old), replace(old, head=head, tail=tail))


def assert_same(found: Targets, wanted: Targets) -> None:
    ours, theirs = numbers(found), numbers(wanted)
    np.testing.assert_equal(ours, theirs)
    for name, array in theirs.items():
        assert array is None or ours[name].dtype == array.dtype, name


def test_a_smaller_head_equals_a_captured_one() -> None:
    for old, head in itertools.product((VOCABULARY, 16), (1, 8, 16)):
        found = shrunk(head, 0, replace(LARGE, head=old, tail=0)).targets
        wanted = random_block(SEED, COUNT, replace(LARGE, head=head, tail=0)).targets
        assert np.abs(found.log_tail - wanted.log_tail).max() < 1e-6
        assert_same(replace(found, log_tail=wanted.log_tail), wanted)
    same = shrunk(LARGE.head, LARGE.tail).targets
    assert_same(same, random_block(SEED, COUNT, LARGE).targets)


@pytest.mark.parametrize(("head", "tail"), SIZES)
def test_mass_is_kept_and_samples_are_known_tokens_outside_the_head(head: int, tail: int) -> None:
    old, targets = random_block(SEED, COUNT, LARGE).targets, shrunk(head, tail).targets
    assert targets.head_ids.shape == targets.head_logprobs.shape == (len(targets), head)
    mass_M = np.exp(targets.head_logprobs.astype(np.float64)).sum(1)
    mass_M += np.exp(targets.log_tail.astype(np.float64))
    assert np.abs(mass_M - 1).max() < 1e-6
    assert (targets.log_tail <= 0).all()
    assert targets.tail.ids.dtype == np.int32
    tail_ids, old_ids = draws(targets.tail), draws(old.tail)
    assert tail_ids.shape == (len(old), tail)
    for row, ids in enumerate(tail_ids):
        assert not set(ids) & set(targets.head_ids[row])
        assert set(ids) <= set(old.head_ids[row, head:]) | set(old_ids[row])
    assert_known(targets)


def assert_known(targets: Targets) -> None:
    """The samples have the teacher's log-probabilities, if there are samples."""
    if len(targets.tail.ids):
        expected = dense_logprobs()[targets.tail.rows(), targets.tail.ids]
        np.testing.assert_array_equal(targets.tail.logprobs, expected)
    else:
        assert targets.tail.logprobs is None


def test_a_token_that_leaves_the_head_is_drawn_by_its_probability() -> None:
    # 0.6 of the tail: systematic sampling takes it 60 times of 100, give or take one
    targets = replace(
        repeated([0.5, 0.3, 0.2], head=1, tail=2, random=np.random.default_rng(0)),
        head_ids=np.array([[0, 1]], np.int32),
        head_logprobs=np.log(np.array([[0.5, 0.3]])).astype(np.float32),
        log_tail=np.log(np.array([0.2])).astype(np.float32),
        tail=Tail.from_draws(np.array([[2, 2]], np.int32)),
    )
    block = Block(sequences=one_each(1), targets=targets, capture=Capture(head=2, tail=2))
    ids = draws(shrink_block(block, Capture(head=1, tail=100)).targets.tail)
    assert 59 <= int((ids == 1).sum()) <= 61


def test_a_record_does_not_depend_on_its_block(tmp_path: Path) -> None:
    block, capture = random_block(SEED, COUNT, LARGE), replace(LARGE, head=8, tail=4)
    wanted = shrink_block(block, capture).targets
    for size in (1, 5):
        ends = range(0, COUNT, size)
        rows = (np.arange(first, min(first + size, COUNT)) for first in ends)
        parts = [shrink_block(block.take(chosen), capture) for chosen in rows]
        assert_same(Block.concatenate(parts).targets, wanted)
    write_missing(tmp_path / "a", manifest_for(block), block)
    shrink(str(tmp_path / "a"), str(tmp_path / "b"), capture.head, capture.tail)
    store = open_store(tmp_path / "b")
    assert store.manifest == replace(open_store(tmp_path / "a").manifest, capture=capture)
    assert_same(store.read(np.arange(COUNT)).targets, wanted)


def test_a_capture_that_is_not_smaller_is_refused() -> None:
    for old, head, tail, message in (
        (LARGE, 17, 6, "17 and 6 would need the teacher"),
        (LARGE, 16, 7, "16 and 7 would need the teacher"),
        (LARGE, 0, 0, "keep nothing"),
        (replace(LARGE, tail=0), 8, 1, "8 and 1 would need the teacher"),
        (WHOLE, VOCABULARY, 1, "nothing is left to sample"),
        (WHOLE, VOCABULARY + 1, 0, "would need the teacher"),
    ):
        manifest = manifest_for(random_block(SEED, 2, old))
        found = refusal(smaller_capture, manifest, head, tail, "here")
        assert found.startswith("here: ")
        assert message in found


def test_a_head_of_the_whole_vocabulary_may_get_samples() -> None:
    manifest = manifest_for(random_block(SEED, COUNT, WHOLE))
    assert smaller_capture(manifest, 8, 30, "here") == replace(WHOLE, head=8, tail=30)
    assert_known(shrunk(8, 30, WHOLE).targets)
    without = Capture(head=16, tail=6, seed=7)  # samples without log-probabilities
    assert shrunk(8, 4, without).targets.tail.logprobs is None


P = np.array([0.03, 0.2, 0.01, 0.3, 0.08, 0.002, 0.12, 0.05, 0.1, 0.06, 0.04, 0.008])
"""A distribution over twelve tokens."""
DRAWS = 20_000
FAR = 4.5
"""Limit in standard errors: chance alone exceeds it once in 150,000."""


@functools.cache
def one_each(count: int) -> Sequences:
    """Sequences of two tokens with one supervised position each."""
    learned = np.ones(2, np.bool_)
    documents = (TokenizedDocument(i, np.zeros(2, np.int32), learned) for i in range(count))
    return build_sequences(0, [[document] for document in documents])


def repeated(
    p: list[float] | NDArray[np.float64],
    head: int,
    tail: int,
    random: np.random.Generator,
    count: int = 1,
) -> Targets:
    """The same distribution captured many times, with different samples."""
    p_V = np.asarray(p)
    head_ids = np.argsort(-p_V)[:head]
    outside = np.setdiff1d(np.arange(len(p_V)), head_ids)
    ends = p_V[outside].cumsum()
    mass = ends[-1] if len(outside) else 0.0
    tail_ids = np.zeros((count, 0), np.int64)
    if tail:
        points = (random.random((count, 1)) + np.arange(tail)) / tail * mass
        places = np.searchsorted(ends, points, side="right").clip(max=len(outside) - 1)
        tail_ids = outside[places]
    with np.errstate(divide="ignore"):
        log_tail = np.full(count, np.log(mass))
    return Targets(
        head_ids=np.tile(head_ids.astype(np.int32), (count, 1)),
        head_logprobs=np.tile(np.log(p_V[head_ids]).astype(np.float32), (count, 1)),
        log_tail=log_tail.astype(np.float32),
        tail=Tail.from_draws(tail_ids.astype(np.int32)),
        label_logprob=np.zeros(count, np.float32),
        entropy=np.zeros(count, np.float32),
        log_norm=np.zeros((count, 0), np.float32),
    )


def drawn(head: int, tail: int, seed: int) -> Block:
    targets = repeated(P, head, tail, np.random.default_rng(seed), DRAWS)
    capture = Capture(head=head, tail=tail, seed=seed)
    return Block(sequences=one_each(DRAWS), targets=targets, capture=capture)


def smaller(block: Block, head: int, tail: int) -> Block:
    return shrink_block(block, replace(block.capture, head=head, tail=tail))


def farthest(targets: Targets) -> float:
    """The largest error of the mean record, in standard errors."""
    tail_ids = draws(targets.tail)
    weight_M = np.exp(targets.log_tail.astype(np.float64)) / tail_ids.shape[1]
    worst = 0.0
    for token in set(range(len(P))) - set(targets.head_ids[0].tolist()):
        found_M = (tail_ids == token).sum(1) * weight_M
        error = float(found_M.std()) / np.sqrt(len(found_M)) + 1e-7
        worst = max(worst, abs(float(found_M.mean()) - P[token]) / error)
    return worst


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    "sizes",
    [
        ((3, 6), (3, 5)),
        ((3, 6), (1, 6)),
        ((3, 1), (0, 1)),
        ((6, 4), (2, 3)),
        ((0, 8), (0, 3)),
        ((12, 0), (0, 1)),
        ((3, 8), (3, 4), (3, 2)),
        ((12, 0), (3, 4), (3, 2), (3, 1)),
        ((6, 6), (4, 6), (2, 6)),
    ],
)
def test_the_smaller_targets_represent_the_teacher_without_bias(
    sizes: tuple[tuple[int, int], ...], seed: int
) -> None:
    """Also if they are made smaller again and again."""
    block = drawn(*sizes[0], seed)
    for size in sizes[1:]:
        assert block.capture.tail == 0 or farthest(block.targets) < FAR
        block = smaller(block, *size)
    assert farthest(block.targets) < FAR


def test_the_measure_detects_a_bias() -> None:
    block = drawn(3, 6, seed=0)
    targets = block.targets
    first_two = replace(targets, tail=Tail.from_draws(draws(targets.tail)[:, :2]))
    assert farthest(first_two) > 4 * FAR
    # the samples of the smaller tail alone, as if nothing had left the head
    mass_M = np.logaddexp.reduce(np.c_[targets.log_tail, targets.head_logprobs[:, 1:]], axis=1)
    forgetful = replace(targets, head_ids=targets.head_ids[:, :1], log_tail=mass_M)
    assert farthest(forgetful) > 4 * FAR


def test_a_tail_too_small_for_float64_is_shared_out() -> None:
    block = drawn(3, 6, seed=0)
    lost = np.full(DRAWS, -2000.0, np.float32)
    targets = replace(block.targets, log_tail=lost)
    found = smaller(replace(block, targets=targets), 3, 2).targets
    assert np.array_equal(found.log_tail, lost)
    wanted = smaller(block, 3, 2).targets
    assert np.array_equal(draws(found.tail), draws(wanted.tail))


def test_shrinking_a_block_takes_little_memory() -> None:
    count = 20_000
    block = replace(drawn(12, 0, seed=0), sequences=one_each(count))
    block = replace(block, targets=block.targets.take(np.arange(count)))
    wide = np.tile(block.targets.head_logprobs - np.float32(np.log(12)), (1, 12))
    ids = np.tile(np.arange(144, dtype=np.int32), (count, 1))
    block = replace(block, targets=replace(block.targets, head_ids=ids, head_logprobs=wide))
    tracemalloc.start()
    try:
        smaller(block, 16, 32)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 * count * 144 * 8  # a few arrays of its own size, not one for each sample
