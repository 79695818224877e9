"""Pruned students are cut, trained, cut again, and interrupted in between."""

from __future__ import annotations

import dataclasses
import json
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from coldstill.data.errors import ColdstillError
from coldstill.data.schema import Capture
from coldstill.stages.config import LoraConfig
from coldstill.stages.models.loading import load_model
from coldstill.stages.models.output_head import connect_head
from coldstill.stages.objective_config import ObjectiveConfig
from coldstill.stages.students.pruning import cutting
from coldstill.stages.students.pruning.config import PruneConfig
from coldstill.stages.students.pruning.cutting import make_cut
from coldstill.stages.students.pruning.importance import sample_loss
from coldstill.stages.train_student import prune_student, train_student
from conftest import FAMILIES, VOCABULARY
from small_pruning import pruning_model, whole_sample
from small_runs import SmallCorpus, capture_store, save_teacher
from small_students import KilledError, expect_same_training, killed_at, refusal, student_job
from small_trainings import lines

if TYPE_CHECKING:
    from pathlib import Path

    from coldstill.data.store.reader import StoreReader
    from coldstill.stages.report import Report
    from coldstill.stages.students.job import StudentJob

WHERE = "students.small.prune"
HALF = PruneConfig(parameters="50%")
TWICE = (PruneConfig(parameters="70%"), PruneConfig(feed_forward=16, layers=2))


@pytest.fixture(scope="module")
def teacher(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers in half precision."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, "llama", {**FAMILIES["llama"], "num_hidden_layers": 3})
        folder = save_teacher(tmp_path_factory.mktemp("teacher") / "model", tokenizer)
    load_model(str(folder), "test", precision="bf16").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def store(
    corpus: SmallCorpus, teacher: Path, tmp_path_factory: pytest.TempPathFactory
) -> StoreReader:
    folder = tmp_path_factory.mktemp("run") / "logits"
    return capture_store(corpus, teacher, folder, Capture(head=8, tail=8))


def job_of(folder: Path, teacher: Path | None, *cuts: PruneConfig, **changes: Any) -> StudentJob:
    train = {"checkpoint_every": 2} | changes.pop("train", {})
    return student_job(
        folder, teacher, prune=cuts or (HALF,), objective=ObjectiveConfig(), train=train, **changes
    )


def cut_once(model: Any, store: StoreReader, cut: PruneConfig) -> tuple[Any, dict[str, Any]]:
    return make_cut(model, (cut,), store, seed=5, stage="x", where=WHERE)


def record(folder: Path) -> Any:
    return json.loads((folder / "pruning.json").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_a_pruned_student_starts_with_the_recorded_loss_and_learns(
    store: StoreReader, teacher: Path, tmp_path: Path
) -> None:
    notes: list[str] = []
    job = job_of(tmp_path, teacher, train={"steps": 30})
    train_student(job, store, lambda report: notes.append(report.note))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoints", "metrics.jsonl", "model", "pruning.json",
    ]  # fmt: skip
    recorded, metrics = record(tmp_path), lines(tmp_path)
    assert recorded["loss"]["after"] != recorded["loss"]["before"]
    assert metrics[-1]["kl"] < 0.8 * metrics[0]["kl"]
    whole = load_model(str(teacher), "test", precision="fp32")
    assert (
        recorded["parameters"]["teacher"]
        == whole.num_parameters()
        == recorded["parameters"]["before"]
    )
    small = load_model(str(tmp_path / "model"), "test", precision="auto")
    assert small.dtype == torch.float32
    assert type(small) is type(whole)
    assert recorded["parameters"]["after"] == small.num_parameters() <= whole.num_parameters() // 2
    assert f"{small.num_parameters():,} parameters trained" in notes
    sizes = recorded["sizes"]["after"]
    config = small.config
    assert (sizes["hidden"], sizes["feed_forward"]) == (
        config.hidden_size,
        config.intermediate_size,
    )
    # the recorded loss is that of the same cut
    whole = load_model(str(teacher), "test", precision="auto")
    pruned, _ = cut_once(whole, store, HALF)
    begun = sample_loss(connect_head(pruned, VOCABULARY), whole_sample(store), "test")
    assert begun == pytest.approx(recorded["loss"]["after"], rel=1e-6)


def test_importance_is_measured_once_for_all_cuts_from_the_same_sequences(
    store: StoreReader, teacher: Path, tmp_path: Path
) -> None:
    shared = {"importance": tmp_path / "importance"}
    smaller = dataclasses.replace(HALF, parameters="40%")
    other = dataclasses.replace(HALF, sequences=3)
    for name, cut, measured in (
        ("first", HALF, True), ("again", HALF, False), ("smaller", smaller, False),
        ("other", other, True),
    ):  # fmt: skip
        stages: set[str] = set()
        notes: list[str] = []

        def report(each: Report, stages: set[str] = stages, notes: list[str] = notes) -> None:
            stages.add(each.stage)
            notes.append(each.note)

        prune_student(job_of(tmp_path / name, teacher, cut, **shared), store, report)
        prune_student(job_of(tmp_path / f"{name}-alone", teacher, cut), store)
        assert any(stage.endswith(" importance") for stage in stages) == measured
        assert any("known from another cut" in note for note in notes) != measured
        assert record(tmp_path / name) == record(tmp_path / f"{name}-alone")
        for part in ("config.json", "model.safetensors"):
            made, alone = (tmp_path / n / "start" / part for n in (name, f"{name}-alone"))
            assert made.read_bytes() == alone.read_bytes()
    files = sorted((tmp_path / "importance").iterdir())
    assert len(files) == 2
    for file in files:
        file.write_bytes(file.read_bytes()[:-1])
    warned: list[str] = []
    job = job_of(tmp_path / "damaged", teacher, HALF, **shared)
    prune_student(job, store, lambda each: warned.append(each.note if each.warning else ""))
    assert next(note for note in warned if note).endswith(" is damaged")
    assert record(tmp_path / "damaged") == record(tmp_path / "first")


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2)], ids=["full", "lora"])
def test_pruning_before_training_changes_nothing_and_reads_the_teacher_once(
    lora: LoraConfig | None, store: StoreReader, teacher: Path, tmp_path: Path
) -> None:
    train_student(job_of(tmp_path / "at-once", teacher, lora=lora), store)
    first = job_of(tmp_path / "first", teacher, lora=lora)
    notes: list[str] = []
    recorded = prune_student(first, store, lambda report: notes.append(report.note))
    assert recorded == [record(tmp_path / "first")]
    assert sorted(path.name for path in (tmp_path / "first").iterdir()) == ["pruning.json", "start"]
    start = {p: p.stat().st_mtime_ns for p in (tmp_path / "first").rglob("*")}
    without = dataclasses.replace(first, teacher=None)
    assert prune_student(without, store, lambda report: notes.append(report.note)) == recorded
    assert start == {p: p.stat().st_mtime_ns for p in (tmp_path / "first").rglob("*")}
    assert [note for note in notes if "start" in note] == [
        f"{recorded[0]['parameters']['after']:,} parameters left: {first.start}",
        f"already pruned: {first.start}",
    ]
    train_student(without, store)
    expect_same_training(tmp_path / "first", tmp_path / "at-once")
    assert not first.start.exists()
    assert prune_student(without, store, lambda report: notes.append(report.note)) == recorded
    assert notes[-1] == f"already trained: {first.model_folder}"


@pytest.mark.slow
def test_iterated_pruning_continues_bit_for_bit_wherever_it_was_killed(
    store: StoreReader, teacher: Path, tmp_path: Path
) -> None:
    straight = tmp_path / "straight"
    train_student(job_of(straight, teacher, *TWICE), store)
    assert sorted(str(p.relative_to(straight)) for p in (straight / "rounds").rglob("*")) == [
        "rounds/1", "rounds/1/metrics.jsonl", "rounds/1/pruning.json",
    ]  # fmt: skip
    first, second = record(straight / "rounds" / "1"), record(straight)
    whole = first["parameters"]["teacher"]
    assert second["parameters"]["teacher"] == whole
    assert 0.6 * whole < first["parameters"]["after"] <= 0.7 * whole
    assert second["parameters"]["before"] == first["parameters"]["after"]
    # importance is measured on the trained model
    assert second["loss"]["before"] < first["loss"]["after"]
    assert second["loss"]["before"] != first["loss"]["before"]
    assert second["sizes"]["before"] == first["sizes"]["after"]
    assert (second["sizes"]["after"]["layers"], second["sizes"]["after"]["feed_forward"]) == (2, 16)

    job = job_of(tmp_path / "killed", teacher, *TWICE)
    for stage, step in (("round 1", 1), ("round 1", 4), ("round 2", 1), ("round 2", 5)):
        with pytest.raises(KilledError):
            train_student(job, store, killed_at(step, f"train-student small {stage}"))
        job = dataclasses.replace(job, teacher=None)
        begun = tmp_path / "killed" / ("start" if stage == "round 2" else "rounds/1/start")
        assert begun.is_dir()
    train_student(job, store)
    expect_same_training(tmp_path / "killed", straight)
    assert lines(tmp_path / "killed" / "rounds" / "1") == lines(straight / "rounds" / "1")
    assert record(tmp_path / "killed") == second


@pytest.mark.slow
def test_each_cut_can_be_made_without_training(
    store: StoreReader, teacher: Path, tmp_path: Path
) -> None:
    job = job_of(tmp_path, teacher, *TWICE)
    recorded = prune_student(job, store)
    assert len(recorded) == 1
    assert (tmp_path / "rounds" / "1" / "start").is_dir()
    with pytest.raises(KilledError):  # after the first round is trained
        train_student(job, store, killed_at(1, "train-student small round 2"))
    shutil.rmtree(tmp_path / "start")
    recorded = prune_student(dataclasses.replace(job, teacher=None), store)
    assert len(recorded) == 2
    assert (tmp_path / "start").is_dir()


def test_an_impossible_later_cut_is_refused_before_the_first(
    store: StoreReader, teacher: Path, tmp_path: Path
) -> None:
    job = job_of(tmp_path, teacher, PruneConfig(layers=2), PruneConfig(layers=3))
    line = refusal(lambda: train_student(job, store), tmp_path)
    assert line == (
        f"{WHERE} (2 of 2): layers = 3, the model to cut has 2 layers; choose at most this"
    )


def test_layers_by_makes_the_cut_choose_layers_by_the_loss(
    store: StoreReader, teacher: Path
) -> None:
    def record_of(how: Any) -> Any:
        model = load_model(str(teacher), "test", precision="fp32")
        cut = PruneConfig(layers=2, layers_by=how)
        return cut_once(model, store, cut)[1]

    by_loss, by_influence = record_of("loss"), record_of("influence")
    increase = by_loss["loss"]["after"] - by_loss["loss"]["before"]
    assert min(by_loss["layer_scores"]) == pytest.approx(increase, abs=1e-4)
    assert by_influence["layer_scores"] != by_loss["layer_scores"]
    assert by_loss["loss"]["after"] <= by_influence["loss"]["after"] + 1e-6


def test_other_settings_another_teacher_and_several_processes_are_refused(
    store: StoreReader, teacher: Path, tokenizer: Any, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    out = tmp_path / "out"
    prune_student(job_of(out, teacher), store)
    other = job_of(out, None, PruneConfig(hidden=16))
    for call in (train_student, prune_student):
        line = refusal(lambda call=call: call(other, store), tmp_path)  # type: ignore[misc]
        assert line == (
            f"{out}: {WHERE} was pruned without hidden, now with hidden = 16; make another under "
            "a new name (--student NEW), or delete this folder"
        )
    line = refusal(lambda: train_student(job_of(out, None, seed=6), store), tmp_path)
    assert f"{WHERE} was pruned with seed = 5, now with seed = 6" in line
    stranger = save_teacher(tmp_path / "stranger", tokenizer, seed=8)
    line = refusal(lambda: prune_student(job_of(tmp_path / "new", stranger), store), tmp_path)
    assert line.startswith(f"{WHERE}: {stranger} is not the teacher of the store (model): its fin")
    monkeypatch.setenv("WORLD_SIZE", "2")
    line = refusal(lambda: train_student(job_of(tmp_path / "new", teacher), store), tmp_path)
    assert line == (
        f"{WHERE}: cutting takes one process, this is one of 2; run coldstill prune-student "
        "--student small first, then this again"
    )


def test_a_model_that_overflows_is_refused(
    store: StoreReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    # its trial, on other tokens, need not overflow
    monkeypatch.setattr(cutting, "student_isolation", lambda *_: "positions")
    broken = pruning_model("llama")
    with torch.no_grad():  # finite weights whose product overflows in one layer
        broken.model.layers[1].mlp.up_proj.weight.fill_(3e38)
        broken.model.layers[1].mlp.gate_proj.weight.fill_(3e38)
    with pytest.raises(ColdstillError, match="activations on the store's sequences are NaN or inf"):
        cut_once(broken, store, HALF)


def test_the_loss_before_the_first_cut_is_the_stores(store: StoreReader) -> None:
    _, record = cut_once(pruning_model("llama"), store, HALF)
    labels = store.read(np.arange(len(store))).targets.label_logprob
    assert record["loss"]["sequences"] == len(store)
    assert record["loss"]["before"] == pytest.approx(-float(labels.mean()), abs=1e-6)
