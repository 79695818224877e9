"""Batches that do not fit into memory are halved, with a warning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from coldstill.data.errors import ColdstillError
from coldstill.data.schema import Capture
from coldstill.data.store.reader import open_store
from coldstill.stages.capture.forward import TeacherForward, capture_batch, is_out_of_memory
from coldstill.stages.teacher_logits import capture_split
from small_runs import (
    LENGTH,
    SmallCorpus,
    capture_store,
    load_teacher,
    plan_capture,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from coldstill.stages.report import Report

pytest_plugins = ("captured",)

CAPTURE = Capture(head=6, tail=5, seed=3)


def small_memory(model: Any, tokens: int, error: Callable[[], BaseException]) -> list[int]:
    """Make the model fail above a number of tokens; returns the sizes of all batches."""
    asked: list[int] = []

    def hook(module: Any, arguments: Any, inputs: dict[str, Any]) -> None:
        asked.append(inputs["input_ids"].numel())
        if asked[-1] > tokens:
            raise error()

    model.base_model.register_forward_pre_hook(hook, with_kwargs=True)
    return asked


@pytest.mark.parametrize(
    "error",
    [
        lambda: torch.OutOfMemoryError("CUDA out of memory."),
        lambda: RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you"),
        MemoryError,
    ],
)
def test_a_batch_that_does_not_fit_is_halved_without_loss(
    error: Any, corpus: SmallCorpus, saved_teacher: Path, tmp_path: Path
) -> None:
    expected = capture_store(corpus, saved_teacher, tmp_path / "expected", CAPTURE)
    teacher = load_teacher(saved_teacher)
    asked = small_memory(teacher.head.model, 3 * LENGTH, error)
    reports: list[Report] = []
    plan = plan_capture(
        corpus, saved_teacher, tmp_path / "logits", CAPTURE, batch_tokens=10 * LENGTH
    )
    capture_split(plan, teacher, reports.append)
    warnings = [report.note for report in reports if report.warning]
    assert len(warnings) == 1  # 5 sequences in a shard: 240 tokens, then 120
    assert warnings[0] == (
        f"out of memory with a batch of {5 * LENGTH:,} tokens; continuing with "
        f"{5 * LENGTH // 2:,}, set logits.batch_tokens to start there"
    )
    # the first batch, its half, another large batch, and the one that was prepared ahead
    assert sum(tokens > 3 * LENGTH for tokens in asked) <= 4
    store = open_store(tmp_path / "logits")
    rows = np.arange(len(expected))
    ours, theirs = store.read(rows), expected.read(rows)
    np.testing.assert_array_equal(ours.sequences.hashes, theirs.sequences.hashes)
    assert (ours.targets.head_ids == theirs.targets.head_ids).mean() > 0.999
    np.testing.assert_allclose(
        ours.targets.label_logprob, theirs.targets.label_logprob, rtol=1e-4, atol=1e-4
    )


def test_a_single_sequence_that_does_not_fit_is_refused_with_advice(
    corpus: SmallCorpus, saved_teacher: Path, tmp_path: Path
) -> None:
    teacher = load_teacher(saved_teacher)
    small_memory(teacher.head.model, 1, lambda: torch.OutOfMemoryError("CUDA out of memory."))
    plan = plan_capture(corpus, saved_teacher, tmp_path / "logits", CAPTURE)
    with pytest.raises(ColdstillError, match=r"not enough memory for one sequence of \d+ tokens"):
        capture_split(plan, teacher)
    assert not (tmp_path / "logits").exists()


def test_other_errors_do_not_count_as_out_of_memory() -> None:
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_a_batch_and_its_halves_have_equal_targets(
    corpus: SmallCorpus, saved_teacher: Path, tmp_path: Path
) -> None:
    teacher = load_teacher(saved_teacher)
    plan = plan_capture(corpus, saved_teacher, tmp_path / "logits", CAPTURE)
    sequences = plan.sequences.read(np.arange(7))
    whole = capture_batch(teacher, sequences, CAPTURE)
    forward = TeacherForward(teacher, CAPTURE, budget=2 * LENGTH)
    parts = [part.targets() for part in forward.capture(forward.prepare(sequences))]
    assert len(parts) >= 4
    np.testing.assert_array_equal(np.concatenate([p.tail_ids for p in parts]), whole.tail_ids)
    np.testing.assert_allclose(
        np.concatenate([p.head_logprobs for p in parts]), whole.head_logprobs, atol=1e-4
    )
