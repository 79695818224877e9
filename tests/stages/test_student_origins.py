"""Where a student's first weights come from: what fits the store, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from coldstill.data.errors import ColdstillError
from coldstill.data.ragged import Ragged
from coldstill.data.schema import Capture, sequence_hash
from coldstill.data.store.reader import open_store
from coldstill.stages.config import (
    ArchitectureConfig,
    LayersConfig,
    LoraConfig,
    ObjectiveConfig,
    TrainConfig,
)
from coldstill.stages.models.loading import load_model
from coldstill.stages.students.pruning.layers import TeacherWeights, cut_to_layers
from coldstill.stages.train_student import StudentJob, train_student
from coldstill.stages.training.loop import read_metrics
from conftest import FAMILIES, VOCABULARY, make_model
from oracles import write_missing
from safetensors.torch import load_file
from small_runs import LENGTH, SmallCorpus, capture_store, prepare, save_teacher

if TYPE_CHECKING:
    from pathlib import Path

    from coldstill.data.store.reader import StoreReader
    from coldstill.stages.report import Report, Reporter

Weights = dict[str, torch.Tensor]
SMALL = ArchitectureConfig(layers=1, hidden=32, heads=2)
LORA = LoraConfig(rank=4, alpha=8.0)
EVERY_SECOND = LayersConfig(every=2)


class KilledError(Exception):
    """Stands for whatever ends a process."""


@pytest.fixture(scope="module")
def corpus(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> SmallCorpus:
    return prepare(tmp_path_factory.mktemp("corpus"), tokenizer)


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


def job_of(folder: Path, **changes: Any) -> StudentJob:
    """Six steps; a `train` among the changes is of those."""
    train = {"steps": 6, "batch_tokens": 4 * LENGTH, "learning_rate": 3e-3, "log_every": 1}
    settings: dict[str, Any] = {
        "name": "small",
        "architecture": None,
        "model": None,
        "objective": ObjectiveConfig(cross_entropy=0.5),
        "config": TrainConfig(**(train | changes.pop("train", {}))),
        "seed": 5,
        "folder": folder,
    }
    return StudentJob(**(settings | changes))


def losses(folder: Path) -> list[dict[str, float]]:
    """The metrics, without those that a clock decides."""
    clock = ("per_second", "data_wait")
    return [
        {name: value for name, value in line.items() if not any(part in name for part in clock)}
        for line in read_metrics(folder)
    ]


def saved(folder: Path) -> Weights:
    weights: Weights = load_file(folder / "model" / "model.safetensors")
    return weights


def refused(job: StudentJob, store: StoreReader) -> str:
    """The one line by which training must be refused, writing nothing."""
    before = sorted(job.folder.parent.rglob("*"))
    with pytest.raises(ColdstillError) as error:
        train_student(job, store)
    assert "\n" not in str(error.value)
    assert sorted(job.folder.parent.rglob("*")) == before
    return str(error.value)


@pytest.mark.parametrize("rows", [VOCABULARY, VOCABULARY + 16, VOCABULARY + 60])
def test_a_pretrained_model_may_be_padded_otherwise_than_the_teacher(
    rows: int, store: StoreReader, tokenizer: Any, tmp_path: Path
) -> None:
    make_model("llama", rows, seed=4).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    steps = {"train": {"weight_decay": 0.0}}
    train_student(job_of(tmp_path / "out", model=str(tmp_path / "base"), **steps), store)
    old, new = load_file(tmp_path / "base" / "model.safetensors"), saved(tmp_path / "out")
    assert new["lm_head.weight"].shape == (rows, 32)
    changed = (new["lm_head.weight"] != old["lm_head.weight"]).any(1)
    assert bool(changed[:VOCABULARY].all())
    assert not bool(changed[VOCABULARY:].any())
    # padding is nothing to the loss: the narrowest and the widest learn the same
    if rows > VOCABULARY:
        narrow = make_model("llama", rows, seed=4)
        narrow.resize_token_embeddings(VOCABULARY)
        narrow.save_pretrained(tmp_path / "narrow")
        tokenizer.save_pretrained(tmp_path / "narrow")
        train_student(job_of(tmp_path / "other", model=str(tmp_path / "narrow"), **steps), store)
        for ours, theirs in zip(losses(tmp_path / "out"), losses(tmp_path / "other"), strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


def test_fewer_rows_than_tokens_are_refused(
    store: StoreReader, tokenizer: Any, tmp_path: Path
) -> None:
    make_model("llama", VOCABULARY - 1).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    line = refused(job_of(tmp_path / "out", model=str(tmp_path / "base")), store)
    assert line.startswith("students.small.model: its tokenizer has the token '")
    assert "at id 319, its model has 319 rows (ids 0 to 318)" in line


def of_layers(folder: Path, teacher: Path, **changes: Any) -> StudentJob:
    settings: dict[str, Any] = {
        "layers": EVERY_SECOND,
        "teacher": TeacherWeights(name=str(teacher)),
    }
    return job_of(folder, **(settings | changes))


def test_a_student_of_layers_starts_as_them_and_learns(
    store: StoreReader, teacher: Path, tmp_path: Path
) -> None:
    train_student(of_layers(tmp_path, teacher, train={"steps": 30}), store)
    first, last = losses(tmp_path)[0], losses(tmp_path)[-1]
    assert last["kl"] < 0.8 * first["kl"]
    config = json.loads((tmp_path / "model" / "config.json").read_text(encoding="utf-8"))
    assert (config["num_hidden_layers"], config["dtype"]) == (2, "float32")
    assert config["use_cache"] is True  # the trainer would leave it off
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoints", "metrics.jsonl", "model",
    ]  # fmt: skip

    # what it began with: the loss of the first step is that of the layers themselves
    whole = load_model(str(teacher), "test", precision="auto")
    cut_to_layers(whole, [0, 2], "test").float().save_pretrained(tmp_path / "base")
    shutil.copytree(store.tokenizer_folder(), tmp_path / "base", dirs_exist_ok=True)
    train_student(job_of(tmp_path / "other", model=str(tmp_path / "base")), store)
    assert losses(tmp_path / "other")[0]["loss"] == first["loss"]


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_once_it_was_begun_it_goes_on_bit_for_bit_without_the_teacher(
    lora: LoraConfig | None, store: StoreReader, teacher: Path, tmp_path: Path
) -> None:
    mine = tmp_path / "teacher"
    shutil.copytree(teacher, mine)
    settings: dict[str, Any] = {"lora": lora, "train": {"steps": 9, "checkpoint_every": 3}}
    train_student(of_layers(tmp_path / "straight", mine, **settings), store)

    def kill(at: int) -> Reporter:
        def killed(report: Report) -> None:
            if report.total and report.done == at * 4 * LENGTH:
                raise KilledError

        return killed

    job = of_layers(tmp_path / "killed", mine, **settings)
    with pytest.raises(KilledError):  # before there is a checkpoint
        train_student(job, store, kill(2))
    shutil.rmtree(mine)
    job = dataclasses.replace(job, teacher=None)
    with pytest.raises(KilledError):
        train_student(job, store, kill(5))
    notes: list[str] = []
    train_student(job, store, lambda report: notes.append(report.note))
    assert "going on from step 3" in notes
    assert losses(tmp_path / "killed") == losses(tmp_path / "straight")
    straight, killed = saved(tmp_path / "straight"), saved(tmp_path / "killed")
    assert straight.keys() == killed.keys()
    for name, weight in straight.items():
        assert torch.equal(weight, killed[name]), name
    configs = [
        (tmp_path / n / "model" / "config.json").read_bytes() for n in ("straight", "killed")
    ]
    assert configs[0] == configs[1]
    assert not (tmp_path / "killed" / "start").exists()


def test_layers_that_cannot_be_are_refused(
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


@pytest.mark.parametrize("origin", ["model", "layers"])
def test_adapters_alone_learn_and_are_merged(
    origin: str, store: StoreReader, teacher: Path, tokenizer: Any, tmp_path: Path
) -> None:
    said: list[str] = []
    settings: dict[str, Any] = {"lora": LORA, "train": {"steps": 20, "learning_rate": 2e-2}}
    if origin == "layers":
        job = of_layers(tmp_path / "out", teacher, **settings)
    else:
        teacher = save_teacher(tmp_path / "base", tokenizer, seed=6)
        job = job_of(tmp_path / "out", model=str(teacher), **settings)
    train_student(job, store, lambda report: said.append(report.note))
    found = losses(tmp_path / "out")
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
    assert said[-1] == (
        f"{learned:,} adapter weights trained and merged into {old.num_parameters():,} parameters"
    )
    checkpoint = load_file(tmp_path / "out" / "checkpoints" / "checkpoint-20" / "model.safetensors")
    assert all("lora_" in name for name in checkpoint)


def test_a_frozen_head_costs_no_gradient(
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
    train_student(job_of(tmp_path / "full", **one), store)
    train_student(job_of(tmp_path / "lora", lora=LORA, **one), store)
    assert made == [(True, True), (True, False)]
    full, lora = losses(tmp_path / "full"), losses(tmp_path / "lora")
    assert full[0]["loss"] == lora[0]["loss"]  # adapters begin as nothing


def test_adapters_on_no_such_layer_are_refused(
    store: StoreReader, teacher: Path, tmp_path: Path
) -> None:
    wrong = LoraConfig(targets=("query",))
    line = refused(of_layers(tmp_path / "out", teacher, lora=wrong), store)
    assert line.startswith("students.small.lora.targets: no linear layer below the head is called")


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
    line = refused(job_of(tmp_path / "out", architecture=SMALL), open_store(tmp_path / "empty"))
    assert line == f"{tmp_path / 'empty'}: no supervised position, nothing to learn"


@pytest.mark.parametrize(
    ("objective", "said"),
    [
        (ObjectiveConfig(kl=0.0), "objective: all weights are 0, so there is nothing to learn"),
        (ObjectiveConfig(temperature=3.0), "objective: kl: temperature 3.0 was not captured"),
    ],
)
def test_an_objective_with_nothing_in_it_is_refused(
    objective: ObjectiveConfig, said: str, store: StoreReader, teacher: Path, tmp_path: Path
) -> None:
    line = refused(of_layers(tmp_path / "out", teacher, objective=objective), store)
    assert line.startswith(f"students.small.{said}")
