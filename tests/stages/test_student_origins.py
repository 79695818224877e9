"""The origins of a student's first weights, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from coldstill.data.ragged import Ragged
from coldstill.data.schema import Capture, sequence_hash
from coldstill.data.store.reader import open_store
from coldstill.stages.config import ArchitectureConfig, LayersConfig, LoraConfig
from coldstill.stages.models.loading import load_model
from coldstill.stages.students.pruning.layers import cut_to_layers
from coldstill.stages.train_student import train_student
from conftest import FAMILIES, VOCABULARY, make_model
from oracles import write_missing
from safetensors.torch import load_file
from small_runs import SmallCorpus, capture_store, save_teacher
from small_students import KilledError, expect_same_training, killed_at, refusal, saved, student_job
from small_trainings import lines

if TYPE_CHECKING:
    from pathlib import Path

    from coldstill.data.store.reader import StoreReader
    from coldstill.stages.students.job import StudentJob

SMALL = ArchitectureConfig(layers=1, hidden=32, heads=2)
LORA = LoraConfig(rank=4, alpha=8.0)
EVERY_SECOND = LayersConfig(every=2)


@pytest.fixture(scope="module")
def teacher(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four layers in half precision, as most teachers are kept."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, "llama", {**FAMILIES["llama"], "num_hidden_layers": 4})
        folder = save_teacher(tmp_path_factory.mktemp("teacher") / "model", tokenizer)
    load_model(str(folder), "test", precision="bf16").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def store(
    corpus: SmallCorpus, teacher: Path, tmp_path_factory: pytest.TempPathFactory
) -> StoreReader:
    capture = Capture(head=8, tail=8)
    return capture_store(corpus, teacher, tmp_path_factory.mktemp("run") / "logits", capture)


def refused(job: StudentJob, store: StoreReader) -> str:
    return refusal(lambda: train_student(job, store), job.folder.parent)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [VOCABULARY, VOCABULARY + 16, VOCABULARY + 60])
def test_a_pretrained_model_may_have_other_padding_than_the_teacher(
    rows: int, store: StoreReader, tokenizer: Any, tmp_path: Path
) -> None:
    make_model("llama", rows, seed=4).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    steps: dict[str, Any] = {"train": {"weight_decay": 0.0}}
    train_student(student_job(tmp_path / "out", model=str(tmp_path / "base"), **steps), store)
    old, new = load_file(tmp_path / "base" / "model.safetensors"), saved(tmp_path / "out")
    assert new["lm_head.weight"].shape == (rows, 32)
    changed = (new["lm_head.weight"] != old["lm_head.weight"]).any(1)
    assert bool(changed[:VOCABULARY].all())
    assert not bool(changed[VOCABULARY:].any())
    # padding does not change the loss
    if rows > VOCABULARY:
        narrow = make_model("llama", rows, seed=4)
        narrow.resize_token_embeddings(VOCABULARY)
        narrow.save_pretrained(tmp_path / "narrow")
        tokenizer.save_pretrained(tmp_path / "narrow")
        train_student(
            student_job(tmp_path / "other", model=str(tmp_path / "narrow"), **steps), store
        )
        for ours, theirs in zip(lines(tmp_path / "out"), lines(tmp_path / "other"), strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


def of_layers(folder: Path, teacher: Path, **changes: Any) -> StudentJob:
    return student_job(folder, teacher, **({"layers": EVERY_SECOND} | changes))


@pytest.mark.slow
def test_a_student_of_layers_starts_with_their_loss_and_learns(
    store: StoreReader, teacher: Path, tmp_path: Path
) -> None:
    train_student(of_layers(tmp_path, teacher, train={"steps": 30}), store)
    first, last = lines(tmp_path)[0], lines(tmp_path)[-1]
    assert last["kl"] < 0.8 * first["kl"]
    config = json.loads((tmp_path / "model" / "config.json").read_text(encoding="utf-8"))
    assert (config["num_hidden_layers"], config["dtype"]) == (2, "float32")
    assert config["use_cache"] is True  # the trainer switches it off
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoints", "metrics.jsonl", "model",
    ]  # fmt: skip

    # the loss of the first step is that of the layers themselves
    whole = load_model(str(teacher), "test", precision="auto")
    cut_to_layers(whole, [0, 2], "test").float().save_pretrained(tmp_path / "base")
    shutil.copytree(store.tokenizer_folder(), tmp_path / "base", dirs_exist_ok=True)
    train_student(student_job(tmp_path / "other", model=str(tmp_path / "base")), store)
    assert lines(tmp_path / "other")[0]["loss"] == first["loss"]


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_a_killed_training_continues_bit_for_bit_without_the_teacher(
    lora: LoraConfig | None, store: StoreReader, teacher: Path, tmp_path: Path
) -> None:
    mine = tmp_path / "teacher"
    shutil.copytree(teacher, mine)
    settings: dict[str, Any] = {"lora": lora, "train": {"steps": 9, "checkpoint_every": 3}}
    train_student(of_layers(tmp_path / "straight", mine, **settings), store)

    job = of_layers(tmp_path / "killed", mine, **settings)
    with pytest.raises(KilledError):  # before there is a checkpoint
        train_student(job, store, killed_at(2))
    shutil.rmtree(mine)
    job = dataclasses.replace(job, teacher=None)
    with pytest.raises(KilledError):
        train_student(job, store, killed_at(5))
    notes: list[str] = []
    train_student(job, store, lambda report: notes.append(report.note))
    assert "resuming from step 3" in notes
    expect_same_training(tmp_path / "killed", tmp_path / "straight")
    assert not (tmp_path / "killed" / "start").exists()


def test_impossible_layers_and_other_teachers_are_refused(
    store: StoreReader, teacher: Path, tokenizer: Any, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    where = "students.small.layers"
    line = refused(of_layers(out, teacher, layers=LayersConfig(only=(0, 4))), store)
    assert line == f"{where}: asks for layer 4, the teacher has 4 layers (0 to 3)"
    line = refused(of_layers(out, teacher, layers=LayersConfig(every=5)), store)
    assert line == f"{where}: asks for one layer in 5, the teacher has 4 layers (0 to 3)"
    assert (
        refused(of_layers(out, tmp_path / "gone"), store) == f"{where}: no folder {tmp_path}/gone"
    )
    other = save_teacher(tmp_path / "other", tokenizer, seed=8)
    line = refused(of_layers(out, other), store)
    assert line.startswith(f"{where}: {other} is not the teacher of the store (model): its finger")
    line = refused(of_layers(out, teacher, lora=LoraConfig(targets=("query",))), store)
    assert line.startswith("students.small.lora.targets: no linear layer below the output head is")


@pytest.mark.slow
@pytest.mark.parametrize("origin", ["model", "layers"])
def test_only_adapters_are_trained_and_they_are_merged(
    origin: str, store: StoreReader, teacher: Path, tokenizer: Any, tmp_path: Path
) -> None:
    notes: list[str] = []
    settings: dict[str, Any] = {"lora": LORA, "train": {"steps": 20, "learning_rate": 2e-2}}
    if origin == "layers":
        job = of_layers(tmp_path / "out", teacher, **settings)
    else:
        teacher = save_teacher(tmp_path / "base", tokenizer, seed=6)
        job = student_job(tmp_path / "out", model=str(teacher), **settings)
    train_student(job, store, lambda report: notes.append(report.note))
    found = lines(tmp_path / "out")
    assert found[-1]["kl"] < 0.9 * found[0]["kl"]
    old = load_model(str(teacher), "test", precision="fp32")
    if origin == "layers":
        old = cut_to_layers(old, [0, 2], "test")
    new = saved(tmp_path / "out")
    kept = dict(old.state_dict())
    assert new.keys() == kept.keys()
    for name, weight in new.items():
        adapted = name.endswith("_proj.weight")
        assert torch.equal(weight, kept[name]) != adapted, name
    learned = 4 * sum(sum(kept[n].shape) for n in kept if n.endswith("_proj.weight"))
    assert notes[-1] == (
        f"{learned:,} adapter weights trained and merged into {old.num_parameters():,} parameters"
    )
    checkpoint = load_file(tmp_path / "out" / "checkpoints" / "checkpoint-20" / "model.safetensors")
    assert all("lora_" in name for name in checkpoint)


@pytest.mark.slow
def test_a_frozen_output_head_has_no_gradient(
    store: StoreReader, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from coldstill.stages.training import chunked_loss

    made: list[tuple[bool, bool]] = []

    class Watched(chunked_loss._Gradients):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            made.append((self.hidden is not None, self.weight is not None))

    monkeypatch.setattr(chunked_loss, "_Gradients", Watched)
    one: dict[str, Any] = {"model": str(teacher), "train": {"steps": 1}}
    train_student(student_job(tmp_path / "full", **one), store)
    train_student(student_job(tmp_path / "lora", lora=LORA, **one), store)
    assert made == [(True, True), (True, False)]
    full, lora = lines(tmp_path / "full"), lines(tmp_path / "lora")
    assert full[0]["loss"] == lora[0]["loss"]  # untrained adapters change nothing


def test_a_store_with_no_supervised_position_is_refused(store: StoreReader, tmp_path: Path) -> None:
    block = store.read(np.arange(len(store)))
    sequences, nothing = block.sequences, np.zeros(0, np.int64)
    read = zip(sequences.tokens, sequences.document_starts, strict=True)
    without = dataclasses.replace(
        sequences,
        positions=Ragged.from_rows([nothing] * len(sequences), np.int32),
        hashes=np.array([sequence_hash(*tokens, nothing) for tokens in read], np.uint64),
    )
    empty = dataclasses.replace(block, sequences=without, targets=block.targets.take(nothing))
    write_missing(tmp_path / "empty", store.manifest, empty)
    shutil.copytree(store.tokenizer_folder(), tmp_path / "empty" / "tokenizer")
    line = refused(
        student_job(tmp_path / "out", architecture=SMALL), open_store(tmp_path / "empty")
    )
    assert line == f"{tmp_path / 'empty'}: no supervised position, nothing to learn"
