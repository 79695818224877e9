"""Captures through an engine, which gives the states of single documents."""

from __future__ import annotations

import contextlib
import dataclasses
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from coldstill.data.errors import ColdstillError
from coldstill.data.maintenance.merge import merge
from coldstill.data.ragged import Ragged
from coldstill.data.schema import Capture
from coldstill.data.store.manifest import EngineIdentity
from coldstill.data.store.reader import open_store
from coldstill.stages.capture.forward import capture_batch
from coldstill.stages.config import GenerateConfig
from coldstill.stages.models.loading import load_head, load_model
from coldstill.stages.teacher_logits import capture_split, is_captured
from conftest import FAMILIES, VOCABULARY, make_model
from engine_double import OneByOne, engine_teacher
from small_runs import LENGTH, SmallCorpus, capture_store, load_teacher, plan_capture, save_teacher

if TYPE_CHECKING:
    from pathlib import Path

    from coldstill.stages.capture.plan import CapturePlan

CAPTURE = Capture(head=6, tail=8, temperatures=(2.0,))
ENGINE = EngineIdentity(name="vllm", version="1.0", options={"block_size": 16})


def _by_engine(plan: CapturePlan) -> CapturePlan:
    return dataclasses.replace(plan, teacher=dataclasses.replace(plan.teacher, engine=ENGINE))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_alone_is_that_of_the_whole_model(family: str, tmp_path: Path) -> None:
    make_model(family, VOCABULARY).save_pretrained(tmp_path)
    whole = load_model(str(tmp_path), "m", precision="fp32")
    alone = load_head(str(tmp_path), "m", precision="fp32")
    head, own = whole.get_output_embeddings(), alone.get_output_embeddings()
    assert torch.equal(head.weight, own.weight)
    layers = sum(p.numel() for p in whole.parameters()) - sum(p.numel() for p in alone.parameters())
    assert layers > 0
    assert alone.config.get_text_config().num_hidden_layers == 0


def test_a_head_that_is_not_in_the_file_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    make_model("llama", VOCABULARY).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["lm_head.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ColdstillError, match=r"lm_head\.weight"):
        load_head(str(tmp_path), "teacher.model", precision="fp32")


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_store_is_that_of_transformers(
    corpus: SmallCorpus, tokenizer: Any, family: str, tmp_path: Path
) -> None:
    folder = save_teacher(tmp_path / "teacher", tokenizer, family)
    own = capture_store(corpus, folder, tmp_path / "own", CAPTURE)
    plan = _by_engine(plan_capture(corpus, folder, tmp_path / "engine", CAPTURE))
    teacher = engine_teacher(folder)
    capture_split(plan, teacher)
    store = open_store(tmp_path / "engine")
    assert is_captured(plan)
    ours, theirs = (each.read(np.arange(len(each))) for each in (own, store))
    for name in ("tokens", "document_starts", "document_ids", "positions"):
        a, b = getattr(ours.sequences, name), getattr(theirs.sequences, name)
        assert np.array_equal(a.values, b.values)
        assert np.array_equal(a.offsets, b.offsets)
    assert np.array_equal(ours.targets.head_ids[:, 0], theirs.targets.head_ids[:, 0])
    for name in ("head_logprobs", "label_logprob", "entropy", "log_norm"):
        a, b = getattr(ours.targets, name), getattr(theirs.targets, name)
        np.testing.assert_allclose(a, b, atol=2e-4)
    assert store.manifest.teacher.engine == ENGINE
    old, new = own.manifest.to_json(), store.manifest.to_json()
    changed = {key for key in old if old[key] != new[key]}
    assert changed == {"teacher", "packing", "seal"}  # the engine, and that documents go alone


def test_only_what_the_supervised_positions_need_is_computed(
    corpus: SmallCorpus, saved_teacher: Path, tmp_path: Path
) -> None:
    plan = plan_capture(corpus, saved_teacher, tmp_path / "store", CAPTURE)
    teacher = engine_teacher(saved_teacher)
    engine = teacher.engine
    assert isinstance(engine, OneByOne)
    capture_split(plan, teacher)
    sequences = open_store(tmp_path / "store").read(np.arange(len(plan.rows))).sequences
    needed = 0
    for row in range(len(sequences)):
        starts, positions = sequences.document_starts[row], sequences.positions[row]
        for start, end in zip(starts, [*starts[1:], LENGTH], strict=True):
            own = positions[(positions >= start) & (positions < end)]
            needed += int(own[-1]) - int(start) + 1 if len(own) else 0
    first = engine.tokens - needed  # the first batch measures the codec's error, twice computed
    assert 0 <= first <= plan.batch_tokens + 64 * LENGTH


def test_answers_of_an_engine_are_captured(
    corpus: SmallCorpus, saved_teacher: Path, tmp_path: Path
) -> None:
    generate = GenerateConfig(max_new_tokens=5)
    plan = plan_capture(
        corpus, saved_teacher, tmp_path / "store", CAPTURE, generate=generate, sequence_length=64
    )
    single = np.flatnonzero(
        [len(plan.sequences.read(np.array([r])).document_starts[0]) == 1 for r in plan.rows]
    )
    plan = dataclasses.replace(plan, rows=np.asarray(plan.rows)[single])
    capture_split(plan, engine_teacher(saved_teacher))
    sequences = open_store(tmp_path / "store").read(np.arange(len(single))).sequences
    for row in range(len(sequences)):
        answer = sequences.tokens[row][sequences.positions[row] + 1]
        assert len(answer) == 5
        assert len(set(answer.tolist())) == 1


def test_a_store_is_not_continued_by_another_engine(
    corpus: SmallCorpus, saved_teacher: Path, tmp_path: Path
) -> None:
    plan = plan_capture(corpus, saved_teacher, tmp_path / "store", CAPTURE)
    stopping = iter([False, False, True, True, True, True, True])
    capture_split(plan, load_teacher(saved_teacher), stop=lambda: next(stopping, True))
    done = open_store(tmp_path / "store", incomplete=True).done
    assert 0 < len(done) < open_store(tmp_path / "store", incomplete=True).manifest.shards
    other = _by_engine(plan)
    with pytest.raises(ColdstillError, match=r"teacher\.engine.*add --other-engine"):
        is_captured(other)
    agreed = dataclasses.replace(other, other_engine=True)
    different = dataclasses.replace(other.teacher, fingerprint="0" * 64)
    with pytest.raises(ColdstillError, match="give this run another name"):
        is_captured(dataclasses.replace(agreed, teacher=different))
    capture_split(agreed, engine_teacher(saved_teacher))
    store = open_store(tmp_path / "store")
    assert store.manifest.teacher.engines == (None, ENGINE)
    for either in (plan, other):  # both engines have worked on it
        assert is_captured(either)


def test_a_complete_store_needs_no_engine(
    corpus: SmallCorpus, saved_teacher: Path, tmp_path: Path
) -> None:
    plan = plan_capture(corpus, saved_teacher, tmp_path / "store", CAPTURE)
    capture_split(plan, load_teacher(saved_teacher))
    assert is_captured(_by_engine(plan))
    assert open_store(tmp_path / "store").manifest.teacher.engines == (None,)


def test_sequences_without_supervised_positions_ask_for_nothing(
    corpus: SmallCorpus, saved_teacher: Path, tmp_path: Path
) -> None:
    plan = plan_capture(corpus, saved_teacher, tmp_path / "store", CAPTURE)
    teacher = engine_teacher(saved_teacher)
    sequences = plan.sequences.read(plan.rows[:2])
    nothing = Ragged(np.zeros(0, np.int32), np.zeros(3, np.int64))
    empty = dataclasses.replace(sequences, positions=nothing)
    assert len(capture_batch(teacher, empty, CAPTURE)) == 0
    assert isinstance(teacher.engine, OneByOne)
    assert teacher.engine.documents == 0


def test_a_merged_store_names_all_engines(
    corpus: SmallCorpus, saved_teacher: Path, tmp_path: Path
) -> None:
    plan = plan_capture(corpus, saved_teacher, tmp_path / "own", CAPTURE)
    half = len(plan.rows) // 2
    capture_split(dataclasses.replace(plan, rows=plan.rows[:half]), load_teacher(saved_teacher))
    other = dataclasses.replace(_by_engine(plan), rows=plan.rows[half:], folder=tmp_path / "other")
    capture_split(other, engine_teacher(saved_teacher))
    for first, second, named in (
        ("own", "other", (None, ENGINE)),
        ("other", "own", (ENGINE, None)),
    ):
        merged = merge(
            [str(tmp_path / first), str(tmp_path / second)],
            str(tmp_path / f"{first}-first"),
            None,
            None,
        )
        assert merged.teacher.engines == named


def test_an_error_of_the_engine_ends_the_capture_and_closes_it(
    corpus: SmallCorpus, saved_teacher: Path, tmp_path: Path
) -> None:
    class Failing(OneByOne):
        def submit(self, documents: Any) -> Any:
            if self.documents < 8:
                return super().submit(documents)
            failed: Future[Any] = Future()
            failed.set_exception(ColdstillError("the engine is gone"))
            return failed

    plan = plan_capture(corpus, saved_teacher, tmp_path / "store", CAPTURE)
    engine = Failing(saved_teacher)
    with (
        pytest.raises(ColdstillError, match=r"^the engine is gone$"),
        contextlib.closing(engine_teacher(saved_teacher, engine)) as teacher,
    ):
        capture_split(plan, teacher)
    assert engine.closed
    capture_split(plan, engine_teacher(saved_teacher))
    assert is_captured(plan)
