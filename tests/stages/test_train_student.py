"""A student trained from a store learns what one trained beside the living teacher would."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dense
import numpy as np
import pytest
import torch
from coldstill.data.errors import ColdstillError
from coldstill.data.schema import Capture
from coldstill.stages.config import ArchitectureConfig, TrainConfig
from coldstill.stages.models.isolation import choose_isolation, student_isolation
from coldstill.stages.models.loading import load_model, load_tokenizer
from coldstill.stages.models.output_head import connect_head
from coldstill.stages.objective_config import ObjectiveConfig
from coldstill.stages.students.job import make_student
from coldstill.stages.train_student import train_student
from coldstill.stages.training.batch import collate
from coldstill.stages.training.feed import StoreDataset
from coldstill.stages.training.objective import attach_objective, terms_of
from conftest import VOCABULARY, make_model
from small_runs import LENGTH, SmallCorpus, capture_store
from small_students import refusal, student_job
from small_trainings import read_metrics

if TYPE_CHECKING:
    from coldstill.data.schema import Sequences
    from coldstill.data.store.reader import StoreReader
    from coldstill.stages.students.job import StudentJob

SMALL = ArchitectureConfig(layers=1, hidden=32, heads=2)
OBJECTIVES = {
    "kl": ObjectiveConfig(),
    "kl at 2": ObjectiveConfig(temperature=2.0),
    "mixed at 2": ObjectiveConfig(kl=0.7, cross_entropy=0.4, temperature=2.0),
}


@pytest.fixture(scope="module")
def store(
    corpus: SmallCorpus, saved_teacher: Path, tmp_path_factory: pytest.TempPathFactory
) -> StoreReader:
    """The teacher's whole distribution."""
    capture = Capture(head=VOCABULARY, tail=0, temperatures=(2.0,))
    return capture_store(corpus, saved_teacher, tmp_path_factory.mktemp("run") / "full", capture)


def job_of(folder: Path, **changes: Any) -> StudentJob:
    settings: dict[str, Any] = {"architecture": SMALL, "config": gradient_step()}
    return student_job(folder, **(settings | {"objective": ObjectiveConfig()} | changes))


def gradient_step(**changes: Any) -> TrainConfig:
    """One step whose change of the weights is the gradient itself."""
    settings: dict[str, Any] = {
        "steps": 1,
        "batch_tokens": 4 * LENGTH,
        "learning_rate": 1.0,
        "warmup": 0.0,
        "schedule": "constant",
        "weight_decay": 0.0,
        "gradient_clip": 0.0,
        "log_every": 1,
        "trainer": {"optim": "sgd"},
    }
    return TrainConfig(**(settings | changes))


def new_student(store: StoreReader, seed: int = 5) -> Any:
    """What the job above starts from."""
    tokenizer = load_tokenizer(str(store.tokenizer_folder()), "store")
    job = job_of(Path(str(store.place)), seed=seed)
    return make_student(job, store, tokenizer).model


def online(
    student: Any, teacher: Any, sequences: Sequences, objective: ObjectiveConfig
) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients with the teacher alive: whole logits, one document at a time."""
    with torch.no_grad():
        teacher_MV, _ = dense.logits_alone(teacher, sequences, VOCABULARY)
    student_MV, labels_M = dense.logits_alone(student, sequences, VOCABULARY)
    t = objective.temperature
    assert isinstance(objective.kl, float)
    assert isinstance(objective.cross_entropy, float)
    loss = objective.kl * t**2 * dense.forward_kl(teacher_MV, student_MV, t).mean()
    loss = loss + objective.cross_entropy * dense.cross_entropy(student_MV, labels_M).mean()
    return float(loss.detach()), gradients(student, loss)


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def expect_close(
    ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], tolerance: float
) -> None:
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        error = float((ours[name] - expected).norm() / expected.norm())
        assert error < tolerance, name


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_a_batch_from_the_store_gives_the_loss_and_gradient_of_the_online_teacher(
    objective: ObjectiveConfig, store: StoreReader, saved_teacher: Path
) -> None:
    student, capture = new_student(store), store.manifest.capture
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(4.0)  # a confident student, so that a shift would be found
    rows = [3, 0, 7, 8, 5]
    read = StoreDataset(store).__getitems__(rows)
    teacher = load_model(str(saved_teacher), "teacher", precision="fp32")
    expected, expected_gradients = online(student, teacher, read[0].sequences, objective)
    isolation = student_isolation(student, store, "student")
    batch = collate(read, isolation)
    attach_objective(connect_head(student, VOCABULARY), terms_of(objective, capture, "s"))
    output = student(batch)
    loss = output["loss"] / len(batch.targets)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)
    expect_close(gradients(student, loss), expected_gradients, 1e-5)
    # the unshifted answer is another one
    moved = dataclasses.replace(batch, positions=batch.positions + 1)
    assert float(student(moved)["loss"].detach()) != pytest.approx(
        float(output["loss"].detach()), rel=1e-2
    )


@pytest.mark.slow
def test_a_training_step_follows_the_gradient_of_the_online_teacher(
    store: StoreReader, saved_teacher: Path, tmp_path: Path
) -> None:
    config = gradient_step(micro_batch_tokens=2 * LENGTH, learning_rate=100.0)
    before = new_student(store)
    train_student(job_of(tmp_path, config=config), store)
    after = load_model(str(tmp_path / "model"), "student", precision="fp32")
    rows = store.order(5, 0)[:4]
    expected, gradient = online(
        before,
        load_model(str(saved_teacher), "teacher", precision="fp32"),
        store.read(rows).sequences,
        ObjectiveConfig(),
    )
    assert read_metrics(tmp_path)[0]["loss"] == pytest.approx(expected, rel=1e-4)
    assert read_metrics(tmp_path)[0]["kl"] == pytest.approx(expected, rel=1e-5)
    names = load_tokenizer(str(tmp_path / "model"), "student").get_vocab()
    assert names == load_tokenizer(str(store.tokenizer_folder()), "store").get_vocab()
    old, new = dict(before.named_parameters()), dict(after.named_parameters())
    step = {name: (old[name] - new[name]).detach() / 100.0 for name in gradient}
    expect_close(step, gradient, 1e-4)  # rounded once more, where it was added to the weights


@pytest.mark.slow
@pytest.mark.parametrize("head", [VOCABULARY, 16])
def test_a_student_equal_to_the_teacher_learns_nothing(
    head: int, corpus: SmallCorpus, store: StoreReader, saved_teacher: Path, tmp_path: Path
) -> None:
    if head < VOCABULARY:
        capture = Capture(head=head, tail=0)
        store = capture_store(corpus, saved_teacher, tmp_path / "logits", capture)
    job = job_of(tmp_path, architecture=None, model=str(saved_teacher))
    train_student(job, store)
    metrics = read_metrics(tmp_path)[0]
    assert abs(metrics["kl"]) < 1e-6
    assert metrics["agreement"] == 1.0
    assert metrics["student_mass"] == pytest.approx(metrics["teacher_mass"], abs=1e-6)
    old = load_model(str(saved_teacher), "teacher", precision="fp32")
    new = load_model(str(tmp_path / "model"), "student", precision="fp32")
    for before, after in zip(old.parameters(), new.parameters(), strict=True):
        assert float((before - after).detach().abs().max()) < 2e-6


@pytest.mark.slow
def test_the_gradient_of_a_sampled_store_has_the_direction_of_the_online_teacher(
    corpus: SmallCorpus, store: StoreReader, saved_teacher: Path, tmp_path: Path
) -> None:
    """Over all positions the noise of the samples averages out, that of truncation does not."""
    rows = np.arange(len(store))

    def gradient(store: StoreReader) -> torch.Tensor:
        student = new_student(store)
        batch = collate((store.read(rows),))
        terms = terms_of(ObjectiveConfig(), store.manifest.capture, "s")
        attach_objective(connect_head(student, VOCABULARY), terms)
        found = gradients(student, student(batch)["loss"] / len(batch.targets))
        return torch.cat([g.flatten() for g in found.values()])

    sampled = Capture(head=8, tail=24)
    ours = gradient(capture_store(corpus, saved_teacher, tmp_path / "logits", sampled))
    angle, ratio = dense.angle_and_ratio(ours, gradient(store))
    assert angle < 10
    assert ratio == pytest.approx(1.0, abs=0.03)


def test_students_that_do_not_fit_the_store_are_refused(
    store: StoreReader, saved_teacher: Path, tokenizer: Any, tmp_path: Path
) -> None:
    def refused(**changes: Any) -> str:
        return refusal(lambda: train_student(job_of(tmp_path / "out", **changes), store), tmp_path)

    assert "temperature 3.0 was not captured" in refused(objective=ObjectiveConfig(temperature=3.0))
    line = refused(objective=ObjectiveConfig(kl=0.0))
    assert line.startswith("students.small.objective: all weights are 0, so there is nothing to ")
    short = ArchitectureConfig(layers=1, hidden=32, heads=2, context=LENGTH - 1)
    assert "its context of 47 tokens is shorter" in refused(architecture=short)
    make_model("llama", VOCABULARY - 10).save_pretrained(tmp_path / "narrow")
    tokenizer.save_pretrained(tmp_path / "narrow")
    narrow = refused(architecture=None, model=str(tmp_path / "narrow"))
    assert narrow.startswith("students.small.model: its tokenizer has the token ")
    assert " at id 310, its model has 310 rows (ids 0 to 309), " in narrow


def test_a_student_that_leaks_is_refused_packed_documents(
    store: StoreReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = new_student(store)
    assert choose_isolation(student, VOCABULARY, LENGTH) == "positions"
    forward = student.base_model.forward

    def leaking(**inputs: Any) -> Any:
        return forward(input_ids=inputs["input_ids"], use_cache=False)

    monkeypatch.setattr(student.base_model, "forward", leaking)
    with pytest.raises(ColdstillError, match=r"cannot keep packed documents apart.*pack = false"):
        student_isolation(student, store, "students.small")
