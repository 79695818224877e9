"""Selection against sorting, summing and sampling the whole vocabulary in float64."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from coldstill.data.order import uniform
from coldstill.data.schema import Capture
from coldstill.stages.capture.selection import select
from coldstill.stages.targets.tensors import TargetTensors
from dense import record
from oracles import draws, numbers

if TYPE_CHECKING:
    from coldstill.data.schema import Targets

TEMPERATURES = (0.5, 2.0, 4.0)


def selected(
    logits_MV: torch.Tensor, capture: Capture, labels_M: torch.Tensor, uniform_M: torch.Tensor
) -> Targets:
    before = logits_MV.clone()
    targets = TargetTensors.concatenate(
        list(select(logits_MV, labels_M, uniform_M, capture))
    ).to_targets()
    assert torch.equal(logits_MV.nan_to_num(7.0), before.nan_to_num(7.0))  # read only
    return targets


def draw(rows: int, vocabulary: int, seed: int = 0, scale: float = 3.0) -> tuple[torch.Tensor, ...]:
    """Logits, labels and shifts."""
    generator = torch.Generator().manual_seed(seed)
    logits_MV = torch.randn(rows, vocabulary, generator=generator) * scale
    labels_M = torch.randint(0, vocabulary, (rows,), generator=generator)
    return logits_MV, labels_M, torch.rand(rows, generator=generator, dtype=torch.float64)


def expect_dense(
    logits_MV: torch.Tensor, capture: Capture, labels_M: torch.Tensor, uniform_M: torch.Tensor
) -> None:
    """Everything that was selected is what the dense way finds."""
    ours = selected(logits_MV, capture, labels_M, uniform_M)
    dense = record(logits_MV, labels_M, uniform_M, capture)
    logprobs_MV = logits_MV.double().log_softmax(1)
    label_logprob = logprobs_MV.gather(1, labels_M[:, None])[:, 0]
    for name, expected in {
        "head_logprobs": dense.head_logprobs,
        "log_tail": dense.log_tail,
        "entropy": dense.entropy,
        "label_logprob": label_logprob,
        "log_norm": dense.log_norm,
    }.items():
        found = getattr(ours, name)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected.numpy(), rtol=2e-6, atol=4e-6, err_msg=name)
    # ids of equal logits may come in any order, their logits may not
    head_ids = torch.from_numpy(ours.head_ids).long()
    assert all(len(set(row)) == capture.head for row in head_ids.tolist())
    assert torch.equal(logits_MV.gather(1, head_ids), logits_MV.gather(1, dense.head_ids))
    expect_systematic(ours, logprobs_MV, uniform_M)
    if ours.tail.logprobs is not None:
        expected = logprobs_MV[ours.tail.rows(), ours.tail.ids]
        np.testing.assert_allclose(ours.tail.logprobs, expected.numpy(), rtol=2e-6, atol=4e-6)


def expect_systematic(ours: Targets, logprobs_MV: torch.Tensor, uniform_M: torch.Tensor) -> None:
    """Every sample lies where its point falls, up to the rounding of fp32 weights."""
    tail_ids = draws(ours.tail)
    samples = tail_ids.shape[1]
    for row, (ids, head) in enumerate(zip(tail_ids, ours.head_ids, strict=True)):
        assert not set(ids.tolist()) & set(head.tolist())
        outside_V = logprobs_MV[row].scatter(0, torch.from_numpy(head).long(), -torch.inf)
        ends_V = outside_V.softmax(0).cumsum(0).numpy()
        for j, token in enumerate(ids.tolist()):
            point = (float(uniform_M[row]) + j) / samples
            assert (ends_V[token - 1] if token else 0.0) - 1e-6 <= point <= ends_V[token] + 1e-6


@pytest.mark.parametrize("vocabulary", [50, 128, 129, 300, 4097])
@pytest.mark.parametrize(
    ("head", "tail"), [(16, 16), (1, 0), (0, 12), (0, 0), (49, 3), (-1, 0), (4, 50)]
)
def test_selection_equals_sorting_the_whole_vocabulary(
    vocabulary: int, head: int, tail: int
) -> None:
    capture = Capture(head=vocabulary if head < 0 else head, tail=tail, temperatures=TEMPERATURES)
    logits_MV, labels_M, uniform_M = draw(9, vocabulary, seed=vocabulary + head)
    expect_dense(logits_MV, capture, labels_M, uniform_M)


@pytest.mark.parametrize("vocabulary", [50, 128, 300, 1000])
@pytest.mark.parametrize("head", [0, 1, 3])
def test_one_overwhelming_token_leaves_an_exact_tail(vocabulary: int, head: int) -> None:
    """e^-200 is nothing in fp32, and still has a logarithm and tokens to draw."""
    capture = Capture(head=head, tail=4, temperatures=TEMPERATURES)
    logits_MV, labels_M, uniform_M = draw(6, vocabulary, scale=1.0)
    for row, token in enumerate([0, 1, vocabulary - 1, vocabulary // 2, 5, 7]):
        logits_MV[row, token] = 200.0
    expect_dense(logits_MV, capture, labels_M, uniform_M)


def test_tails_below_the_smallest_number_are_drawn_from_on_their_own_scale() -> None:
    """Several steps of a hundred nats between head, second best and the rest."""
    logits_MV, labels_M, uniform_M = draw(5, 200, scale=1.0)
    logits_MV[:, 3], logits_MV[:, 150], logits_MV[:, 151] = 300.0, 299.0, 150.0
    expect_dense(logits_MV, Capture(head=2, tail=8), labels_M, uniform_M)
    expect_dense(logits_MV, Capture(head=3, tail=8), labels_M, uniform_M)


def test_ties_are_kept_once_each() -> None:
    logits_MV, labels_M, uniform_M = draw(4, 300)
    logits_MV[0] = 1.0
    logits_MV[1] = logits_MV[1].round()
    logits_MV[2, 100:250] = 9.0
    expect_dense(logits_MV, Capture(head=20, tail=20, tail_logprobs=True), labels_M, uniform_M)


@pytest.mark.parametrize("head", [0, 4])
@pytest.mark.parametrize("varied", ["seed", "sequence", "position"])
def test_samples_average_to_the_probabilities_and_vary_less_than_independent_draws(
    varied: str, head: int
) -> None:
    """The mean over seeds, sequences or positions: an exact head, and `tail mass / R` a sample."""
    vocabulary, tail, trials = 140, 5, 3000
    logits_V = draw(1, vocabulary, seed=3, scale=1.5)[0][0]
    many, one = np.arange(trials), np.full(trials, 9)
    sequence_M, position_M = (many if varied == n else one for n in ("sequence", "position"))
    seeds = many if varied == "seed" else one
    shifts = np.concatenate(
        [
            uniform(int(seed), np.array([sequence]), np.array([position], np.int32))
            for seed, sequence, position in zip(seeds, sequence_M, position_M, strict=True)
        ]
    )
    targets = selected(
        logits_V.expand(trials, -1).contiguous(),
        Capture(head=head, tail=tail),
        torch.zeros(trials, dtype=torch.long),
        torch.from_numpy(shifts),
    )
    weights_MV = np.zeros((trials, vocabulary))
    rows_M1 = np.arange(trials)[:, None]
    np.add.at(weights_MV, (rows_M1, targets.head_ids), np.exp(targets.head_logprobs))
    each_M1 = np.exp(targets.log_tail)[:, None] / tail
    tail_ids = draws(targets.tail)
    np.add.at(weights_MV, (rows_M1, tail_ids), np.broadcast_to(each_M1, (trials, tail)))
    np.testing.assert_allclose(weights_MV.sum(1), 1.0, rtol=1e-5)
    expected_V = logits_V.double().softmax(0).numpy()
    independent_V = expected_V * each_M1[0]
    z = (weights_MV.mean(0) - expected_V) / np.sqrt(independent_V / trials)
    assert abs(z).max() < 5
    assert (z**2).mean() < 1.3
    assert abs(weights_MV[0] - expected_V).sum() > 0.2  # a single record differs
    counts_MV = np.zeros((trials, vocabulary))
    np.add.at(counts_MV, (rows_M1, tail_ids), 1)
    variance_V, counts_V = counts_MV.var(0), counts_MV.mean(0)
    independent_V = counts_V * (1 - counts_V / tail)
    assert not counts_MV[:, targets.head_ids[0]].any()
    assert variance_V.sum() < 0.95 * independent_V.sum()
    assert (variance_V <= independent_V * 1.2 + 0.01).all()


@pytest.mark.parametrize("vocabulary", [500, 30_000])
def test_the_sample_does_not_depend_on_how_rows_are_cut(vocabulary: int) -> None:
    """Neither by the caller, nor by selection itself, which takes 17 rows of 30,000 at once."""
    logits_MV, labels_M, uniform_M = draw(40, vocabulary)
    capture = Capture(head=6, tail=9, temperatures=(2.0,))
    whole = selected(logits_MV, capture, labels_M, uniform_M)
    parts = [
        part
        for rows in (slice(0, 1), slice(1, 18), slice(18, 40))
        for part in select(logits_MV[rows], labels_M[rows], uniform_M[rows], capture)
    ]
    cut = TargetTensors.concatenate(parts).to_targets()
    np.testing.assert_equal(numbers(cut), numbers(whole))


def test_logits_that_are_not_finite_give_an_entropy_that_is_not_finite() -> None:
    """The caller can then report the position."""
    logits_MV, labels_M, uniform_M = draw(4, 300)
    logits_MV[1, 5], logits_MV[2] = torch.nan, torch.nan
    logits_MV[3, 7] = torch.inf
    capture = Capture(head=3, tail=3, tail_logprobs=True)
    targets = selected(logits_MV[:, :300], capture, labels_M, uniform_M)
    assert np.isfinite(targets.entropy).tolist() == [True, False, False, False]


@pytest.mark.parametrize(("head", "tail"), [(0, 5), (3, 0), (3, 5), (40, 0)])
def test_a_batch_without_positions_has_no_targets(head: int, tail: int) -> None:
    logits_MV, labels_M, uniform_M = (each[:0] for each in draw(1, 40))
    capture = Capture(head=head, tail=tail)
    parts = list(select(logits_MV, labels_M, uniform_M, capture))
    targets = TargetTensors.concatenate(parts).to_targets()
    assert (len(targets), targets.head_ids.shape, len(targets.tail)) == (0, (0, head), 0)
