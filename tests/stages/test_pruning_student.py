"""Students cut out of their teacher: made once, trained, cut again, and killed in between."""

from __future__ import annotations

import dataclasses
import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from coldstill.data.errors import ColdstillError
from coldstill.data.schema import Capture
from coldstill.stages.config import LoraConfig, ObjectiveConfig, TrainConfig
from coldstill.stages.models.loading import load_model
from coldstill.stages.models.output_head import connect_head
from coldstill.stages.prune_student import prune_student
from coldstill.stages.students.pruning.config import PruneConfig
from coldstill.stages.students.pruning.cutting import Cutting, make_cut
from coldstill.stages.students.pruning.importance import sample_loss
from coldstill.stages.students.pruning.layers import TeacherWeights, cut_to_layers
from coldstill.stages.train_student import StudentJob, train_student
from coldstill.stages.training.loop import read_metrics
from conftest import FAMILIES, VOCABULARY, make_model
from safetensors.torch import load_file
from small_pruning import pruning_model, whole_sample
from small_runs import CLOCKS, LENGTH, SmallCorpus, capture_store, prepare, save_teacher

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from coldstill.data.store.reader import StoreReader
    from coldstill.stages.report import Report, Reporter

WHERE = "students.small.prune"
HALF = PruneConfig(parameters="50%")
TWICE = (PruneConfig(parameters="70%"), PruneConfig(feed_forward=16, layers=2))


class KilledError(Exception):
    """Stands for whatever ends a process."""


@pytest.fixture(scope="module")
def teacher(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers in half precision."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, "llama", {**FAMILIES["llama"], "num_hidden_layers": 3})
        folder = save_teacher(tmp_path_factory.mktemp("teacher") / "model", tokenizer)
    load_model(str(folder), "test", precision="bf16").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def store(tokenizer: Any, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> StoreReader:
    corpus: SmallCorpus = prepare(tmp_path_factory.mktemp("corpus"), tokenizer)
    capture = Capture(head=8, tail=8)
    return capture_store(corpus, teacher, tmp_path_factory.mktemp("run") / "logits", capture)


def job_of(folder: Path, teacher: Path | None, *cuts: PruneConfig, **changes: Any) -> StudentJob:
    train: dict[str, Any] = {
        "steps": 6,
        "batch_tokens": 4 * LENGTH,
        "learning_rate": 3e-3,
        "log_every": 1,
    }
    train |= {"checkpoint_every": 2} | changes.pop("train", {})
    settings: dict[str, Any] = {
        "name": "small",
        "architecture": None,
        "model": None,
        "prune": cuts or (HALF,),
        "teacher": None if teacher is None else TeacherWeights(name=str(teacher)),
        "objective": ObjectiveConfig(),
        "config": TrainConfig(**train),
        "seed": 5,
        "folder": folder,
    }
    return StudentJob(**(settings | changes))


def losses(folder: Path) -> list[dict[str, float]]:
    return [{k: v for k, v in line.items() if k not in CLOCKS} for line in read_metrics(folder)]


def saved(folder: Path) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = load_file(folder / "model" / "model.safetensors")
    return weights


def record(folder: Path) -> Any:
    return json.loads((folder / "pruning.json").read_text(encoding="utf-8"))


def refused(call: Callable[[], Any], folder: Path) -> str:
    """The one line of a refusal that writes nothing."""
    before = sorted(folder.rglob("*"))
    with pytest.raises(ColdstillError) as error:
        call()
    assert "\n" not in str(error.value)
    assert sorted(folder.rglob("*")) == before
    return str(error.value)


def killed_at(step: int, stage: str) -> Reporter:
    def report(said: Report) -> None:
        if said.stage == stage and said.total and said.done >= step * 4 * LENGTH:
            raise KilledError

    return report


def expect_same_training(ours: Path, theirs: Path) -> None:
    assert losses(ours) == losses(theirs)
    weights, others = saved(ours), saved(theirs)
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, others[name]), name


def test_a_pruned_student_begins_as_what_was_left_and_learns(
    store: StoreReader, teacher: Path, tmp_path: Path
) -> None:
    notes: list[str] = []
    job = job_of(tmp_path, teacher, train={"steps": 30})
    train_student(job, store, lambda report: notes.append(report.note))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoints", "metrics.jsonl", "model", "pruning.json",
    ]  # fmt: skip
    told, lines = record(tmp_path), losses(tmp_path)
    assert told["loss"]["after"] != told["loss"]["before"]
    assert lines[-1]["kl"] < 0.8 * lines[0]["kl"]
    whole = load_model(str(teacher), "test", precision="fp32")
    assert told["parameters"]["teacher"] == whole.num_parameters() == told["parameters"]["before"]
    small = load_model(str(tmp_path / "model"), "test", precision="auto")
    assert small.dtype == torch.float32
    assert type(small) is type(whole)
    assert told["parameters"]["after"] == small.num_parameters() <= whole.num_parameters() // 2
    assert f"{small.num_parameters():,} parameters trained" in notes
    sizes = told["sizes"]["after"]
    config = small.config
    assert (sizes["hidden"], sizes["feed_forward"]) == (
        config.hidden_size,
        config.intermediate_size,
    )
    # what it is told to have begun with
    pruned = make_cut(
        Cutting(
            model=load_model(str(teacher), "test", precision="auto"),
            cuts=(HALF,),
            teacher=None,
            store=store,
            seed=5,
            stage="test",
            where=WHERE,
        )
    )
    begun = sample_loss(connect_head(pruned.model, VOCABULARY), whole_sample(store), "test")
    assert begun == pytest.approx(told["loss"]["after"], rel=1e-6)


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2)], ids=["full", "lora"])
def test_pruned_first_or_at_once_it_is_the_same_and_needs_no_teacher_twice(
    lora: LoraConfig | None, store: StoreReader, teacher: Path, tmp_path: Path
) -> None:
    train_student(job_of(tmp_path / "at-once", teacher, lora=lora), store)
    first = job_of(tmp_path / "first", teacher, lora=lora)
    notes: list[str] = []
    told = prune_student(first, store, lambda report: notes.append(report.note))
    assert told == [record(tmp_path / "first")]
    assert sorted(path.name for path in (tmp_path / "first").iterdir()) == ["pruning.json", "start"]
    start = {p: p.stat().st_mtime_ns for p in (tmp_path / "first").rglob("*")}
    without = dataclasses.replace(first, teacher=None)
    assert prune_student(without, store, lambda report: notes.append(report.note)) == told
    assert start == {p: p.stat().st_mtime_ns for p in (tmp_path / "first").rglob("*")}
    assert [note for note in notes if "start" in note] == [
        f"{told[0]['parameters']['after']:,} parameters left: {first.start}",
        f"already pruned: {first.start}",
    ]
    train_student(without, store)
    expect_same_training(tmp_path / "first", tmp_path / "at-once")
    assert not first.start.exists()
    assert prune_student(without, store, lambda report: notes.append(report.note)) == told
    assert notes[-1] == f"already trained: {first.model_folder}"


def test_killed_it_goes_on_bit_for_bit(store: StoreReader, teacher: Path, tmp_path: Path) -> None:
    train_student(job_of(tmp_path / "straight", teacher), store)
    job = job_of(tmp_path / "killed", teacher)
    with pytest.raises(KilledError):
        train_student(job, store, killed_at(1, "train-student small"))
    job = dataclasses.replace(job, teacher=None)
    with pytest.raises(KilledError):
        train_student(job, store, killed_at(4, "train-student small"))
    train_student(job, store)
    expect_same_training(tmp_path / "killed", tmp_path / "straight")


def test_cut_recover_cut_recover_and_killed_anywhere(
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
    # importance is that of the recovered model
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
    assert losses(tmp_path / "killed" / "rounds" / "1") == losses(straight / "rounds" / "1")
    assert record(tmp_path / "killed") == second


def test_each_due_cut_can_be_made_by_itself(
    store: StoreReader, teacher: Path, tmp_path: Path
) -> None:
    job = job_of(tmp_path, teacher, *TWICE)
    told = prune_student(job, store)
    assert len(told) == 1
    assert (tmp_path / "rounds" / "1" / "start").is_dir()
    with pytest.raises(KilledError):  # when the first round is trained
        train_student(job, store, killed_at(1, "train-student small round 2"))
    shutil.rmtree(tmp_path / "start")
    told = prune_student(dataclasses.replace(job, teacher=None), store)
    assert len(told) == 2
    assert (tmp_path / "start").is_dir()


def test_a_later_cut_that_cannot_be_is_refused_before_the_first(
    store: StoreReader, teacher: Path, tmp_path: Path
) -> None:
    job = job_of(tmp_path, teacher, PruneConfig(layers=2), PruneConfig(layers=3))
    line = refused(lambda: train_student(job, store), tmp_path)
    assert line == (
        f"{WHERE} (2 of 2): layers = 3, the model that is cut has 2 layers; choose at most that"
    )


def test_layers_are_judged_by_the_loss_without_them_where_asked(
    store: StoreReader, teacher: Path
) -> None:
    def kept(how: Any) -> Any:
        model = load_model(str(teacher), "test", precision="fp32")
        cutting = Cutting(
            model=model, cuts=(PruneConfig(layers=2, layers_by=how),), teacher=None, store=store,
            seed=0, stage="test", where=WHERE,
        )  # fmt: skip
        return make_cut(cutting).record

    by_loss = kept("loss")
    losses = []
    for gone in range(3):
        model = load_model(str(teacher), "test", precision="fp32")
        rest = cut_to_layers(model, [i for i in range(3) if i != gone], "test")
        losses.append(sample_loss(connect_head(rest, VOCABULARY), whole_sample(store), "test"))
    assert by_loss["loss"]["after"] == pytest.approx(min(losses), rel=1e-5)
    rises = [loss - by_loss["loss"]["before"] for loss in losses]
    assert by_loss["layer_scores"] == pytest.approx(rises, abs=1e-4)
    assert kept("influence")["layer_scores"] != by_loss["layer_scores"]


def test_what_cannot_be_pruned_or_gone_on_with_is_refused(
    store: StoreReader, teacher: Path, tokenizer: Any, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    out = tmp_path / "out"
    prune_student(job_of(out, teacher), store)
    other = job_of(out, None, PruneConfig(hidden=16))
    for call in (train_student, prune_student):
        line = refused(lambda call=call: call(other, store), tmp_path)  # type: ignore[misc]
        assert line == (
            f"{out}: {WHERE} was pruned without hidden, now with hidden = 16; make another under "
            "a new name (--student NEW), or delete this folder"
        )
    line = refused(lambda: train_student(job_of(out, None, seed=6), store), tmp_path)
    assert f"{WHERE} was pruned with seed = 5, now with seed = 6" in line
    stranger = save_teacher(tmp_path / "stranger", tokenizer, seed=8)
    line = refused(lambda: prune_student(job_of(tmp_path / "new", stranger), store), tmp_path)
    assert line.startswith(f"{WHERE}: {stranger} is not the teacher of the store (model): its fin")
    monkeypatch.setenv("WORLD_SIZE", "2")
    line = refused(lambda: train_student(job_of(tmp_path / "new", teacher), store), tmp_path)
    assert line == (
        f"{WHERE}: one process cuts, this is one of 2; run coldstill prune-student --student small "
        "first, then this again"
    )


def test_a_family_without_a_table_and_a_broken_model_are_refused(
    store: StoreReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cutting(model: Any) -> Cutting:
        return Cutting(
            model=model, cuts=(HALF,), teacher=None, store=store, seed=0, stage="x", where=WHERE
        )

    monkeypatch.setitem(FAMILIES, "olmo2-small", {})
    with pytest.raises(
        ColdstillError, match=r"prune: cannot prune a 'olmo2' model \(have: llama, "
    ):
        make_cut(cutting(make_model("olmo2-small", VOCABULARY)))
    broken = pruning_model("llama")
    with torch.no_grad():
        broken.lm_head.weight.fill_(float("nan"))
    with pytest.raises(
        ColdstillError, match=r"loss on the store's sequences is nan before the cut"
    ):
        make_cut(cutting(broken))
