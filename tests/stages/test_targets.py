"""What a record says at a temperature, and the shape of batches that have none."""

from __future__ import annotations

from dataclasses import fields

import dense
import numpy as np
import pytest
import torch
from coldstill.data.prepared import TokenizedDocument, build_sequences
from coldstill.data.schema import Block, Capture, Targets
from coldstill.stages.targets.tensors import TargetTensors, tempered

TEMPERATURES = (0.5, 2.0, 4.0)


def record(capture: Capture, rows: int = 6) -> tuple[torch.Tensor, TargetTensors]:
    random = torch.Generator().manual_seed(0)
    logits_MV = torch.randn(rows, 80, generator=random, dtype=torch.float64) * 3
    shifts_M = torch.rand(rows, generator=random, dtype=torch.float64)
    return logits_MV, dense.record(logits_MV, torch.arange(rows), shifts_M, capture)


@pytest.mark.parametrize("temperature", [1.0, *TEMPERATURES])
def test_head_and_rest_are_exact_at_every_captured_temperature(temperature: float) -> None:
    logits_MV, target = record(Capture(head=7, tail=5, temperatures=TEMPERATURES))
    probs_MV = (logits_MV / temperature).softmax(1)
    says = tempered(target, temperature)
    torch.testing.assert_close(says.head, probs_MV.gather(1, target.head_ids))
    torch.testing.assert_close(says.log_head, says.head.log())
    torch.testing.assert_close(says.rest, 1 - says.head.sum(1))


def test_at_temperature_1_every_sample_stands_for_an_equal_share() -> None:
    _, target = record(Capture(head=7, tail=5))
    says = tempered(target, 1.0)
    torch.testing.assert_close(says.tail, (target.log_tail.exp() / 5)[:, None].expand(-1, 5))


def test_an_empty_tail_is_empty_at_every_temperature() -> None:
    _, target = record(Capture(head=80, tail=0, temperatures=TEMPERATURES))
    for temperature in (1.0, *TEMPERATURES):
        assert not tempered(target, temperature).rest.any()


def test_a_tail_beyond_fp32_has_numbers_for_its_samples() -> None:
    """Four hundred nats below the head: nothing at T = 2, and nothing that is no number."""
    log = torch.full((1, 3), -400.0)
    target = TargetTensors(
        labels=torch.zeros(1, dtype=torch.long),
        head_ids=torch.zeros(1, 1, dtype=torch.long),
        head_logprobs=torch.zeros(1, 1),
        log_tail=torch.tensor([-398.0]),
        tail_ids=torch.tensor([[1, 2, 3]]),
        tail_logprobs=log,
        label_logprob=torch.zeros(1),
        entropy=torch.zeros(1),
        log_norm=torch.zeros(1, 2),
        capture=Capture(head=1, tail=3, temperatures=(2.0, 100.0)),
    )
    assert not tempered(target, 2.0).tail.any()
    expected = torch.tensor(2.0 - 4.0).exp() / 3  # e^2 tokens' worth of e^-4 each
    torch.testing.assert_close(tempered(target, 100.0).tail, expected.expand(1, 3))


def test_rows_are_rows_of_every_part() -> None:
    _, target = record(Capture(head=7, tail=5, temperatures=TEMPERATURES))
    part = target.rows(2, 5)
    assert len(part) == 3
    for field in fields(target):
        value = getattr(target, field.name)
        if isinstance(value, torch.Tensor):
            assert torch.equal(getattr(part, field.name), value[2:5])
    assert part.capture == target.capture
    assert torch.equal(target.to(torch.device("cpu")).log_norm, target.log_norm)


def test_without_targets_only_the_labels_are_there() -> None:
    tokens_T = np.array([5, 6, 7, 8], dtype=np.int32)
    learned_T = np.array([True, False, True, True])
    sequences = build_sequences(0, [[TokenizedDocument(0, tokens_T, learned_T)]])
    targets, capture = Targets.empty(2), Capture(tail=0)
    target = TargetTensors.from_block(Block(sequences=sequences, targets=targets, capture=capture))
    assert target.labels.tolist() == [7, 8]
    assert target.head_ids.shape == target.tail_ids.shape == target.log_norm.shape == (2, 0)
    assert target.tail_logprobs is None
