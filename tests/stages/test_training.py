"""The loop around the loss: normalisation, order, checkpoints, and what is written down."""

from __future__ import annotations

import re
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from coldstill.data.errors import ColdstillError
from coldstill.data.schema import Capture
from coldstill.stages.config import ArchitectureConfig, ObjectiveConfig, TrainConfig
from coldstill.stages.feed import StoreDataset
from coldstill.stages.models import build_model, load_tokenizer
from coldstill.stages.objective import terms_of
from coldstill.stages.output_head import connect_head
from coldstill.stages.report import Report, Reporter, silent
from coldstill.stages.training import TrainingJob, last_whole_checkpoint, read_metrics, train
from conftest import VOCABULARY
from small_runs import LENGTH, SmallCorpus, capture_store, prepare, save_teacher

if TYPE_CHECKING:
    from pathlib import Path

    from coldstill.data.reader import StoreReader

Weights = dict[str, torch.Tensor]


class KilledError(Exception):
    """Stands for whatever ends a process."""


@pytest.fixture(scope="module")
def corpus(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> SmallCorpus:
    return prepare(tmp_path_factory.mktemp("corpus"), tokenizer)


@pytest.fixture(scope="module")
def store(
    corpus: SmallCorpus, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory
) -> StoreReader:
    folder = tmp_path_factory.mktemp("run")
    teacher = save_teacher(folder / "teacher", tokenizer)
    return capture_store(corpus, teacher, folder / "logits", Capture(head=8, tail=8))


def run(
    store: StoreReader,
    folder: Path,
    report: Reporter = silent,
    family: str = "llama",
    objective: ObjectiveConfig | None = None,
    **settings: Any,
) -> Weights:
    """Train a new small model; its weights afterwards."""
    tokenizer = load_tokenizer(str(store.tokenizer_folder()), "store")
    architecture = ArchitectureConfig(family=family, layers=1, hidden=32, heads=2)
    model = build_model(architecture, tokenizer, LENGTH, 3, "test")
    capture = store.manifest.capture
    defaults: dict[str, Any] = {"batch_tokens": 4 * LENGTH, "log_every": 1}
    job = TrainingJob(
        stage="train-student test",
        head=connect_head(model, VOCABULARY),
        dataset=StoreDataset(store),
        isolation="positions",
        capture=capture,
        terms=terms_of(objective or ObjectiveConfig(cross_entropy=0.5), capture, "test"),
        config=TrainConfig(**(defaults | settings)),
        sequence_length=LENGTH,
        seed=11,
        folder=folder,
    )
    train(job, report)
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def losses(folder: Path) -> list[dict[str, float]]:
    """The metrics, without those that a clock decides."""
    return [
        {k: v for k, v in line.items() if k != "tokens_per_second"} for line in read_metrics(folder)
    ]


def kill_after(step: int) -> Reporter:
    def killed(report: Report) -> None:
        if report.total and report.done == step * 4 * LENGTH:
            raise KilledError

    return killed


@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_micro_batches_change_memory_and_not_results(
    clip: float, store: StoreReader, tmp_path: Path
) -> None:
    """Sequences differ in supervised positions, so a mean of means would give something else."""
    assert len(set(store.read(torch.arange(len(store)).numpy()).sequences.positions.lengths)) > 5
    results = {}
    for micro in (8, 4, 2, 1):
        results[micro] = run(
            store,
            tmp_path / str(micro),
            steps=4,  # the third ends an epoch with fewer sequences than a batch has
            batch_tokens=8 * LENGTH,
            micro_batch_tokens=micro * LENGTH,
            learning_rate=1.0,
            gradient_clip=clip,
            schedule="constant",
            trainer={"optim": "sgd"},
        )
    assert len(store) % 8
    assert len(store) < 4 * 8
    for micro in (4, 2, 1):
        for name, weight in results[8].items():
            error = float((results[micro][name] - weight).norm() / weight.norm())
            assert error < 1e-5, (micro, name)
        for ours, theirs in zip(losses(tmp_path / str(micro)), losses(tmp_path / "8"), strict=True):
            same = ours | {"epoch": theirs["epoch"]}  # the trainer counts batches there
            assert same == pytest.approx(theirs, rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_run_that_was_killed_goes_on_as_if_nothing_had_happened(
    family: str, store: StoreReader, tmp_path: Path
) -> None:
    """KilledError in the first epoch and again in the second; gpt2 has dropout on top."""
    settings: dict[str, Any] = {"steps": 14, "checkpoint_every": 5, "family": family}
    assert 5 < len(store) / 4 < 7
    straight = run(store, tmp_path / "straight", **settings)
    with pytest.raises(KilledError):
        run(store, tmp_path / "killed", kill_after(7), **settings)
    assert [line["step"] for line in read_metrics(tmp_path / "killed")] == [1, 2, 3, 4, 5, 6]
    notes: list[str] = []
    with pytest.raises(KilledError):
        run(store, tmp_path / "killed", kill_after(13), **settings)
    again = run(store, tmp_path / "killed", lambda report: notes.append(report.note), **settings)
    assert notes[0] == "going on from step 10"
    assert losses(tmp_path / "killed") == losses(tmp_path / "straight")
    assert len(losses(tmp_path / "killed")) == 14
    for name, weight in straight.items():
        assert torch.equal(weight, again[name]), name


def test_a_checkpoint_that_was_cut_short_is_ignored(store: StoreReader, tmp_path: Path) -> None:
    run(store, tmp_path, steps=4, checkpoint_every=2)
    checkpoints = tmp_path / "checkpoints"
    assert last_whole_checkpoint(checkpoints) == checkpoints / "checkpoint-4"
    shutil.copytree(checkpoints / "checkpoint-4", checkpoints / "checkpoint-10")
    (checkpoints / "checkpoint-10" / "whole.json").unlink()
    (checkpoints / "checkpoint-10" / "model.safetensors").write_bytes(b"")
    assert last_whole_checkpoint(checkpoints) == checkpoints / "checkpoint-4"
    (checkpoints / "checkpoint-4" / "whole.json").unlink()
    assert last_whole_checkpoint(checkpoints) == checkpoints / "checkpoint-2"
    notes: list[str] = []
    run(store, tmp_path, lambda report: notes.append(report.note), steps=4, checkpoint_every=2)
    assert notes[0] == "going on from step 2"


def test_metrics_begin_with_the_first_step(store: StoreReader, tmp_path: Path) -> None:
    reports: list[Report] = []
    run(store, tmp_path, reports.append, steps=5, log_every=3, learning_rate=1e-3)
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == [1, 3]
    for line in lines:
        assert {
            "loss", "kl", "cross_entropy", "teacher_mass", "student_mass", "agreement", "accuracy",
            "tokens_per_second", "learning_rate", "grad_norm", "epoch",
        } <= line.keys()  # fmt: skip
        # over several steps the trainer's loss weighs steps alike, the others weigh positions
        tolerance = 1e-5 if line["step"] == 1 else 1e-2
        expected = line["kl"] + 0.5 * line["cross_entropy"]
        assert line["loss"] == pytest.approx(expected, rel=tolerance)
        assert 0 < line["student_mass"] < line["teacher_mass"] < 1
        assert 0 <= line["accuracy"] <= 1
        assert line["tokens_per_second"] > 0
    steps = [report for report in reports if report.total]
    assert [report.done for report in steps] == [4 * LENGTH * i for i in range(1, 6)]
    assert {report.total for report in steps} == {5 * 4 * LENGTH}


def test_a_record_without_a_head_reports_nothing_of_heads(
    corpus: SmallCorpus, tokenizer: Any, tmp_path: Path
) -> None:
    teacher = save_teacher(tmp_path / "teacher", tokenizer)
    store = capture_store(corpus, teacher, tmp_path / "logits", Capture(head=0, tail=12))
    run(store, tmp_path, steps=1)
    line = read_metrics(tmp_path)[0]
    assert not {"agreement", "teacher_mass", "student_mass"} & line.keys()
    assert {"kl", "accuracy"} <= line.keys()


def test_training_lowers_the_loss(store: StoreReader, tmp_path: Path) -> None:
    run(store, tmp_path, steps=40, learning_rate=1e-2, log_every=10)
    first, last = losses(tmp_path)[0], losses(tmp_path)[-1]
    assert last["kl"] < 0.8 * first["kl"]
    assert last["agreement"] > first["agreement"]


def test_a_loss_that_is_no_number_ends_the_run_in_one_line(
    store: StoreReader, tmp_path: Path
) -> None:
    with pytest.raises(ColdstillError) as error:
        run(
            store,
            tmp_path,
            steps=5,
            learning_rate=1e30,
            gradient_clip=0.0,
            warmup=0.0,
            trainer={"optim": "sgd"},
        )
    told = (
        r"train-student test: the loss is (nan|inf) after step \d; the last checkpoint is kept, .*"
    )
    assert re.fullmatch(told, str(error.value))


def test_every_sequence_is_seen_once_an_epoch_and_never_in_order(
    store: StoreReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    read = StoreDataset.__getitems__

    def watched(dataset: StoreDataset, indices: list[int]) -> Any:
        seen.extend(indices)
        return read(dataset, indices)

    monkeypatch.setattr(StoreDataset, "__getitems__", watched)
    run(store, tmp_path / "a", steps=12, micro_batch_tokens=2 * LENGTH)
    epochs = [seen[: len(store)], seen[len(store) : 2 * len(store)]]
    for epoch in epochs:
        assert sorted(epoch) == list(range(len(store)))
        assert epoch != sorted(epoch)
    assert epochs[0] != epochs[1]
    order, seen[:] = seen.copy(), []
    run(store, tmp_path / "b", steps=12)
    assert seen[: len(order)] == order[: len(seen)]


def test_bf16_changes_the_first_loss_only_by_its_rounding(
    store: StoreReader, tmp_path: Path
) -> None:
    run(store, tmp_path / "fp32", steps=2, learning_rate=1e-2)
    run(store, tmp_path / "bf16", steps=2, learning_rate=1e-2, precision="bf16")
    for exact, rough in zip(losses(tmp_path / "fp32"), losses(tmp_path / "bf16"), strict=True):
        assert rough["loss"] != exact["loss"]
        assert rough["loss"] == pytest.approx(exact["loss"], rel=2e-2)
        assert rough["grad_norm"] == pytest.approx(exact["grad_norm"], rel=5e-2)


def test_settings_the_trainer_does_not_know_are_refused_in_one_line(
    store: StoreReader, tmp_path: Path
) -> None:
    with pytest.raises(ColdstillError, match=r"train\.trainer: .*learning_speed") as error:
        run(store, tmp_path, steps=1, trainer={"learning_speed": 1})
    assert "\n" not in str(error.value)


def test_micro_batches_that_do_not_divide_a_step_are_refused(
    store: StoreReader, tmp_path: Path
) -> None:
    with pytest.raises(ColdstillError, match=r"a step of 4 sequences cannot be shared out as 3"):
        run(store, tmp_path, steps=1, micro_batch_tokens=3 * LENGTH)


def test_the_model_leaves_training_as_it_came(store: StoreReader, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(store.tokenizer_folder()), "store")
    architecture = ArchitectureConfig(family="gpt2", layers=1, hidden=32, heads=2)
    model = build_model(architecture, tokenizer, LENGTH, 3, "test")
    capture = store.manifest.capture
    train(
        TrainingJob(
            stage="train",
            head=connect_head(model, VOCABULARY),
            dataset=StoreDataset(store),
            isolation="positions",
            capture=capture,
            terms=terms_of(ObjectiveConfig(), capture, "test"),
            config=TrainConfig(steps=1, batch_tokens=LENGTH),
            sequence_length=LENGTH,
            seed=0,
            folder=tmp_path,
        )
    )
    assert "forward" not in vars(model)
    assert not model.training
