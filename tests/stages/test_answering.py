"""The answer to a prompt does not depend on the other prompts in its batch."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from bordered import VOCABULARY, bordered
from coldstill.data.errors import ColdstillError
from coldstill.data.prepared import TokenizedDocument, build_sequences
from coldstill.data.schema import Capture
from coldstill.data.store.reader import open_store
from coldstill.stages.capture.generate import answer, answered_together, choose_answering
from coldstill.stages.config import CorpusConfig, GenerateConfig
from coldstill.stages.models.output_head import connect_head
from coldstill.stages.models.rotary import scale_by_document
from coldstill.stages.models.rounding import agree
from coldstill.stages.prepare_corpus import prepare_corpus
from coldstill.stages.teacher_logits import capture_split
from conftest import sentences
from small_runs import LENGTH as SMALL_LENGTH
from small_runs import SmallCorpus, load_teacher, plan_capture, save_teacher

if TYPE_CHECKING:
    from pathlib import Path

    from coldstill.data.schema import Sequences
    from coldstill.stages.capture.generate import Answering
    from coldstill.stages.capture.plan import CapturePlan
    from coldstill.stages.capture.teacher import Teacher
    from coldstill.stages.models.output_head import OutputHead
    from coldstill.stages.report import Report

LENGTH = 40
LENGTHS = [1, 9, 14, 9, 4, 17, 14, 25]
"""Prompts whose answers end before the border, cross it, and start after it."""
CONFIG = GenerateConfig(max_new_tokens=20, temperature=0.0)
EXPECTED: dict[str, Answering] = {
    "llama": "padded",
    "phi3 longrope": "equal",  # it recomputes a text when its batch becomes long
    "llama dynamic": "equal",
    "gemma3 window": "padded",
    "llama4 queries scaled by place": "equal",
    "bloom": "padded",
    "mamba": "padded",
    "rwkv": "alone",  # it reads padding, and its batches mix rows
}


def prompts() -> Sequences:
    random = np.random.default_rng(0)
    texts = [random.integers(0, VOCABULARY, n).astype(np.int32) for n in LENGTHS]
    return build_sequences(0, [[TokenizedDocument(0, text, text < 0)] for text in texts])


def answers(head: OutputHead, asked: Sequences, answering: Answering | None) -> list[list[int]]:
    found = answer(
        head, asked, CONFIG, seed=1, ends=frozenset(), sequence_length=LENGTH, answering=answering
    )
    return [tokens.tolist() for tokens in found.tokens]


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPECTED)
def test_answers_equal_those_of_each_prompt_alone(name: str) -> None:
    model = bordered(name)
    scale_by_document(model)
    head = connect_head(model, VOCABULARY)
    notes: list[Report] = []
    assert choose_answering(head, LENGTH, "teacher.model", notes.append) == EXPECTED[name]
    asked = prompts()
    alone = [answers(head, asked.take(np.array([row])), "alone")[0] for row in range(len(asked))]
    assert answers(head, asked, None) == alone
    assert len(notes) == (EXPECTED[name] != "padded")
    for report in notes:
        how = {"equal": "prompts of equal length in a batch", "alone": "one prompt at a time"}
        assert report.stage == "teacher.model"
        assert f"different lengths; answering {how[EXPECTED[name]]}, which" in report.note
    if name == "rwkv":  # without the test, padding would change its answers
        assert answers(head, asked, "padded") != alone


def test_every_prompt_is_in_exactly_one_batch() -> None:
    lengths = np.array(LENGTHS)
    assert list(answered_together(lengths, "padded")) == [list(range(8))]
    assert list(answered_together(lengths, "equal")) == [[0], [4], [1, 3], [2, 6], [5], [7]]
    assert list(answered_together(lengths, "alone")) == [[row] for row in range(8)]


def test_a_model_that_cannot_generate_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def failing(*_: Any, **__: Any) -> Any:
        raise AttributeError("no cache of this kind\nTraceback")

    model = bordered("llama")
    monkeypatch.setattr(model, "generate", failing)
    message = r"^teacher\.model: transformers cannot generate answers: no cache of this kind; take "
    with pytest.raises(ColdstillError, match=message):
        choose_answering(connect_head(model, VOCABULARY), LENGTH, "teacher.model")


def test_logits_of_half_precision_are_measured_at_each_position() -> None:
    """A few logits may be rounded by more than a share of the largest one, as in a deep Mamba. A
    position with small logits must not be judged by the large logits of another position."""
    model = SimpleNamespace(dtype=torch.bfloat16)
    wanted_SV = torch.randn(4, 1000, generator=torch.Generator().manual_seed(0))
    wanted_SV[0] *= 0.01
    few_SV, other_SV = wanted_SV + 3.0, wanted_SV.clone()  # a shift changes no probability
    few_SV[1:, 0] += 0.5
    other_SV[0] = wanted_SV[0].flip(0)
    for found_SV, same in ((few_SV, True), (other_SV, False)):
        assert agree(found_SV, wanted_SV, model, wanted_SV.clone, logits=True) is same
        assert agree(found_SV, wanted_SV, model, wanted_SV.clone) is not same


def test_a_capture_that_stops_while_the_teacher_answers_loses_only_that_batch(
    tokenizer: Any, tmp_path: Path
) -> None:
    rows = [json.dumps({"prompt": text[:20], "completion": ""}) for text in sentences(16)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(rows), encoding="utf-8")
    config = CorpusConfig(files=("prompts.jsonl",), sequence_length=SMALL_LENGTH, holdout=0.3)
    record = prepare_corpus(
        tmp_path / "corpus", config, tmp_path, tokenizer, together=False, prompts=True
    )
    corpus, saved = (
        SmallCorpus(tmp_path / "corpus", record),
        save_teacher(tmp_path / "t", tokenizer),
    )
    generate = GenerateConfig(max_new_tokens=8)

    def plan(name: str) -> CapturePlan:
        return plan_capture(
            corpus, saved, tmp_path / name, Capture(tail=4), generate=generate,
            batch_tokens=5 * SMALL_LENGTH,  # a batch is a shard
        )  # fmt: skip

    def answering() -> Teacher:
        return dataclasses.replace(load_teacher(saved), answering="padded")

    capture_split(plan("whole"), answering())
    teacher, steps = answering(), list[Any]()
    teacher.head.model.register_forward_hook(lambda *_: steps.append(1))
    # the first shard takes 8 passes for its answers and one for its targets
    capture_split(plan("stopped"), teacher, begin=steps.clear, stop=lambda: len(steps) >= 9 + 3)
    assert len(steps) == 12
    assert len(open_store(tmp_path / "stopped", incomplete=True).done) == 1
    capture_split(plan("stopped"), answering())
    ours, wanted = (open_store(tmp_path / name) for name in ("stopped", "whole"))
    assert len(wanted) > 8
    assert [c.files for c in ours.commits()] == [c.files for c in wanted.commits()]
