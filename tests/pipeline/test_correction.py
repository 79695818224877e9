"""A teacher that exists and is corrected: whole runs through the command line."""

from __future__ import annotations

import shutil
import signal
import sys
from typing import TYPE_CHECKING

import pytest
from coldstill.stages.models.loading import teacher_identity
from conftest import VOCABULARY, make_model

if TYPE_CHECKING:
    from pathlib import Path

    from coldstill.data.store.manifest import TeacherIdentity
    from desk import Desk, Processes

pytest_plugins = ("desk",)

TRAIN = (
    "train = { steps = 12, batch_tokens = 256, learning_rate = 3e-3, log_every = 4, "
    "checkpoint_every = 4 }"
)
LORA = "lora = { rank = 8 }"


def identity(folder: Path) -> TeacherIdentity:
    return teacher_identity(str(folder), "test", dtype="auto", revision="main")


@pytest.fixture
def corrected(desk: Desk, teacher_folder: Path) -> Desk:
    """A desk with a recipe that corrects the folder `teacher`; nothing is done yet."""
    shutil.copytree(teacher_folder, desk.root / "teacher")
    text = (desk.root / "r.toml").read_text(encoding="utf-8")
    line = next(line for line in text.splitlines() if line.startswith("model = "))
    desk.edit(line, f'model = "teacher"\n{TRAIN}')
    return desk


@pytest.mark.parametrize("lora", ["", LORA], ids=["full", "lora"])
def test_a_corrected_teacher_is_what_is_captured_and_is_made_once(
    corrected: Desk, lora: str
) -> None:
    corrected.edit(TRAIN, f"{TRAIN}\n{lora}")
    result = corrected.done("run", "r.toml")
    found = corrected.json("teacher", "correction.json")
    assert found["after"] < found["before"] - 0.1
    assert found["sequences"] == 12
    said = f"held-out loss {found['before']:.3f} before, {found['after']:.3f} after"
    assert f"train-teacher: {said}" in result.stderr.splitlines()

    model = identity(corrected.run / "teacher" / "model")
    assert model.fingerprint != identity(corrected.root / "teacher").fingerprint
    for store in ("logits", "heldout"):
        stored = corrected.json(store, "manifest.json")["teacher"]
        assert stored["fingerprint"] == model.fingerprint
        assert stored["name"] == "teacher corrected on r"
    # what was measured without a store is what the store says
    assert corrected.json("teacher.evaluation.json")["loss"] == pytest.approx(
        found["after"], rel=1e-4
    )

    before = corrected.snapshot()
    again = corrected.done("train-teacher", "r.toml")
    assert "train-teacher: already trained: runs/r/teacher/model" in again.stderr.splitlines()
    again = corrected.done("teacher-logits", "r.toml")
    assert "teacher-logits: complete: runs/r/logits and runs/r/heldout" in again.stderr
    assert corrected.snapshot() == before


def test_capture_corrects_a_teacher_that_is_not_yet(corrected: Desk) -> None:
    result = corrected.done("teacher-logits", "r.toml", "--set", "teacher.train.steps=2")
    assert "train-teacher: held-out loss " in result.stderr
    stored = corrected.json("logits", "manifest.json")["teacher"]
    assert stored["fingerprint"] == identity(corrected.run / "teacher" / "model").fingerprint


def test_a_correction_with_other_settings_is_refused_naming_the_setting(corrected: Desk) -> None:
    few = ("--set", "teacher.train.steps=2")
    corrected.done("train-teacher", "r.toml", *few)
    for change, said in (
        ("teacher.train.steps=3", "teacher was trained with train.steps = 2, now 3; train another"),
        (
            "teacher.lora.rank=4",
            "teacher was trained with lora = None, now {'rank': 4, '...; train",
        ),
        ("seed=5", "teacher was trained with seed = 0, now 5; train another under a new name"),
    ):
        for command in ("train-teacher", "teacher-logits", "run"):
            assert said in corrected.refused(command, "r.toml", *few, "--set", change)
    make_model("llama", VOCABULARY + 16, seed=9).save_pretrained(corrected.root / "teacher")
    line = corrected.refused("train-teacher", "r.toml", *few)
    assert "teacher was trained with model.fingerprint = " in line


def test_a_base_of_another_name_with_the_same_weights_is_the_same(corrected: Desk) -> None:
    few = ("--set", "teacher.train.steps=2")
    corrected.done("train-teacher", "r.toml", *few)
    (corrected.root / "teacher").rename(corrected.root / "elsewhere")
    result = corrected.done("train-teacher", "r.toml", *few, "--set", "teacher.model=elsewhere")
    assert "already trained" in result.stderr


def test_a_run_whose_stores_the_uncorrected_teacher_filled_is_refused_at_once(
    finished: Desk,
) -> None:
    finished.edit("[teacher]", f"[teacher]\n{TRAIN}")
    for command in ("train-teacher", "teacher-logits", "run"):
        line = finished.refused(command, "r.toml")
        assert "runs/r/heldout: has the logits of teacher before its correction; give" in line
    shutil.rmtree(finished.run / "heldout")
    assert "runs/r/logits: has the logits of teacher before its correction" in finished.refused(
        "run", "r.toml"
    )


def test_a_correction_that_is_dropped_is_refused_by_its_stores(corrected: Desk) -> None:
    corrected.done("teacher-logits", "r.toml", "--set", "teacher.train.steps=2")
    corrected.edit(TRAIN, "")
    line = corrected.refused("teacher-logits", "r.toml")
    assert "made differently: teacher." in line


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("corpus.sequence_length=129", "corpus.sequence_length: 129 is more than the teacher's co"),
        ("logits.head=5000", "logits.head: 5000 is more than the vocabulary's 320 tokens"),
        ("teacher.model=./nowhere", "teacher.model: no folder ./nowhere"),
        (
            "teacher.lora.targets=['q']",
            "teacher.lora.targets: no linear layer below the output head is named 'q'",
        ),
    ],
)
def test_what_cannot_be_corrected_is_refused(corrected: Desk, change: str, said: str) -> None:
    corrected.done(
        "train-teacher", "r.toml", "--set", "name=other", "--set", "teacher.train.steps=1"
    )
    if "lora" in change:  # known only once the model is loaded, so once the corpus is there
        corpus = corrected.root / "runs" / "other" / "corpus"
        shutil.copytree(corpus, corrected.run / "corpus")
    assert said in corrected.refused("train-teacher", "r.toml", "--set", change)


def test_adapters_without_peft_are_refused_before_the_corpus_is_read(
    corrected: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    corrected.edit(TRAIN, f"{TRAIN}\n{LORA}")
    for command in ("train-teacher", "teacher-logits", "run"):
        line = corrected.refused(command, "r.toml")
        assert line.endswith("which is not installed; pip install 'coldstill[lora]'")


def test_several_processes_train_no_teacher_on_the_way(
    corrected: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    line = corrected.refused("teacher-logits", "r.toml")
    assert line.endswith("train it first with coldstill train-teacher r")


@pytest.mark.parametrize("lora", ["", LORA], ids=["full", "lora"])
def test_a_killed_correction_goes_on_and_ends_as_if_it_had_not_been(
    corrected: Desk, processes: Processes, lora: str
) -> None:
    corrected.edit(TRAIN, f"{TRAIN}\n{lora}")
    # all checkpoints are kept, so that the one that is waited for cannot be missed
    settings = "--set teacher.train.steps=32 --set teacher.train.trainer={save_total_limit=99}"
    longer = settings.split()
    folder = corrected.run / "teacher"
    whole = folder / "checkpoints" / "checkpoint-8" / "whole.json"
    code, _ = processes.stopped(
        corrected, signal.SIGKILL, whole, "train-teacher", "r.toml", *longer
    )
    assert code == -signal.SIGKILL
    assert not (folder / "model").exists()
    before = corrected.json("teacher", "correction.json")
    assert "after" not in before
    result = corrected.done("train-teacher", "r.toml", *longer)
    assert "train-teacher: going on from step " in result.stderr
    went_on = corrected.json("teacher", "correction.json")
    weights = (folder / "model" / "model.safetensors").read_bytes()
    assert went_on["before"] == before["before"]
    shutil.rmtree(folder)
    corrected.done("train-teacher", "r.toml", *longer)
    assert corrected.json("teacher", "correction.json") == went_on
    assert (folder / "model" / "model.safetensors").read_bytes() == weights
