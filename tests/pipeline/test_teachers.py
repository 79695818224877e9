"""Teachers that are corrected first, and teachers that answer prompts."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from coldstill.data.alignment import labels
from coldstill.data.prepared import CorpusLayout
from coldstill.data.store.reader import open_store
from coldstill.stages.models.loading import load_model, teacher_identity
from compared import models_of
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


@pytest.mark.slow
@pytest.mark.parametrize("lora", ["", LORA], ids=["full", "lora"])
def test_a_corrected_teacher_is_captured_and_trained_once(corrected: Desk, lora: str) -> None:
    corrected.edit(TRAIN, f"{TRAIN}\n{lora}")
    result = corrected.done("teacher-logits", "r.toml")  # which trains the correction first
    corrected.done("run", "r.toml")
    found = corrected.json("teacher", "correction.json")
    assert found["after"] < found["before"] - 0.1
    assert found["sequences"] == 12
    line = f"held-out loss {found['before']:.3f} before, {found['after']:.3f} after"
    assert f"train-teacher: {line}" in result.stderr.splitlines()

    model = identity(corrected.run / "teacher" / "model")
    assert model.fingerprint != identity(corrected.root / "teacher").fingerprint
    for store in ("logits", "heldout"):
        stored = corrected.json(store, "manifest.json")["teacher"]
        assert stored["fingerprint"] == model.fingerprint
        assert stored["name"] == "teacher corrected on r"
    # the loss measured without a store equals the loss from the store
    assert corrected.json("teacher.evaluation.json")["loss"] == pytest.approx(
        found["after"], rel=1e-4
    )

    before = corrected.snapshot()
    again = corrected.done("train-teacher", "r.toml")
    assert "train-teacher: already trained: runs/r/teacher/model" in again.stderr.splitlines()
    again = corrected.done("teacher-logits", "r.toml")
    assert "teacher-logits: complete: runs/r/logits and runs/r/heldout" in again.stderr
    assert corrected.snapshot() == before
    corrected.edit(f"{TRAIN}\n{lora}", "")  # the stores refuse a recipe without the correction
    assert "made differently: teacher." in corrected.refused("teacher-logits", "r.toml")


@pytest.mark.slow
def test_a_correction_with_other_settings_is_refused_naming_the_setting(corrected: Desk) -> None:
    few = ("--set", "teacher.train.steps=2")
    corrected.done("train-teacher", "r.toml", *few)
    for change, message in (
        ("teacher.train.steps=3", "teacher was trained with train.steps = 2, now 3; train another"),
        (
            "teacher.lora.rank=4",
            "teacher was trained with lora = None, now {'rank': 4, '...; train",
        ),
        ("seed=5", "teacher was trained with seed = 0, now 5; train another under a new name"),
    ):
        for command in ("train-teacher", "teacher-logits", "run"):
            assert message in corrected.refused(command, "r.toml", *few, "--set", change)
    # the same weights under another name are the same teacher
    (corrected.root / "teacher").rename(corrected.root / "elsewhere")
    moved = (*few, "--set", "teacher.model=elsewhere")
    assert "already trained" in corrected.done("train-teacher", "r.toml", *moved).stderr
    (corrected.root / "elsewhere").rename(corrected.root / "teacher")
    make_model("llama", VOCABULARY + 16, seed=9).save_pretrained(corrected.root / "teacher")
    line = corrected.refused("train-teacher", "r.toml", *few)
    assert "teacher was trained with model.fingerprint = " in line


@pytest.mark.slow
def test_a_run_with_stores_of_the_uncorrected_teacher_is_refused(
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


@pytest.mark.slow
def test_an_impossible_correction_is_refused(
    corrected: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = ("train-teacher", "r.toml", "--set")
    for change, message in (
        ("corpus.sequence_length=129", "corpus.sequence_length: 129 is more than the teacher's co"),
        ("logits.head=5000", "logits.head: 5000 is more than the vocabulary's 320 tokens"),
        ("teacher.model=./nowhere", "teacher.model: no folder ./nowhere"),
    ):
        assert message in corrected.refused(*train, change)
    corrected.done(*train, "name=other", "--set", "teacher.train.steps=1")
    # the layers are known only once the model is loaded, after the corpus is prepared
    shutil.copytree(corrected.root / "runs" / "other" / "corpus", corrected.run / "corpus")
    assert (
        "teacher.lora.targets: no linear layer below the output head is named 'q'"
    ) in corrected.refused(*train, "teacher.lora.targets=['q']")
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")  # several processes do not train a teacher on the way
        line = corrected.refused("teacher-logits", "r.toml")
    assert line.endswith("train it first with coldstill train-teacher r")
    shutil.rmtree(corrected.run)
    monkeypatch.setitem(sys.modules, "peft", None)
    for command in ("train-teacher", "teacher-logits", "run"):
        line = corrected.refused(command, "r.toml", "--set", "teacher.lora.rank=8")
        assert line.endswith("which is not installed; pip install 'coldstill[lora]'")


@pytest.mark.slow
@pytest.mark.parametrize("lora", ["", LORA], ids=["full", "lora"])
def test_a_killed_correction_resumes_with_the_same_result(
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
    assert "train-teacher: resuming from step " in result.stderr
    resumed = corrected.json("teacher", "correction.json")
    weights = (folder / "model" / "model.safetensors").read_bytes()
    assert resumed["before"] == before["before"]
    shutil.rmtree(folder)
    corrected.done("train-teacher", "r.toml", *longer)
    assert corrected.json("teacher", "correction.json") == resumed
    assert (folder / "model" / "model.safetensors").read_bytes() == weights


GENERATE = "generate = { max_new_tokens = 12, temperature = 0.8, top_p = 0.9 }\n"


@pytest.fixture
def asked(desk: Desk) -> Desk:
    """A desk whose corpus is prompts of many lengths, some with answers that are never read."""
    rows = []
    for i in range(60):
        row = {"prompt": f"{i}: " + "as the teacher likes to " * (1 + i % 3)}
        if i % 2:
            row["completion"] = "never read"
        rows.append(json.dumps(row))
    desk.write("prompts.jsonl", "\n".join(rows))
    text = (desk.root / "r.toml").read_text()
    start = text.index("files = ")
    end = text.index("\n", start)
    desk.write(
        "r.toml",
        (text[:start] + 'files = ["prompts.jsonl"]' + text[end:]).replace(
            "[logits]", f"{GENERATE}[logits]", 1
        ),
    )
    return desk


@pytest.mark.slow
def test_answers_are_cached_with_the_teachers_log_probabilities(
    asked: Desk, teacher_folder: Path
) -> None:
    asked.done("teacher-logits", "r.toml", "--set", "logits.codec=plain")
    store = open_store(asked.run / "logits")
    prompts = CorpusLayout(asked.run / "corpus").open("train")
    assert len(store) == len(prompts)
    assert store.manifest.generated is not None
    assert store.manifest.generated.top_p == 0.9
    block = store.read(np.arange(len(store)))
    read = prompts.read(np.arange(len(prompts)))
    model = load_model(str(teacher_folder), "teacher", precision="fp32")
    labels_M, place = labels(block.sequences), 0
    lengths = set()
    for row in range(len(store)):
        tokens, prompt = block.sequences.tokens[row], read.tokens[row]
        np.testing.assert_array_equal(tokens[: len(prompt)], prompt)
        answer = tokens[len(prompt) :]
        assert 1 <= len(answer) <= 12
        lengths.add(len(answer))
        # the answer is learned, all of it; of the prompt nothing, which costs no targets
        positions = np.arange(len(prompt) - 1, len(tokens) - 1)
        np.testing.assert_array_equal(block.sequences.positions[row], positions)
        np.testing.assert_array_equal(labels_M[place : place + len(answer)], answer)
        with torch.no_grad():
            logits = model(torch.from_numpy(tokens.astype(np.int64))[None], use_cache=False).logits
        logprobs = logits[0, positions, : store.manifest.tokenizer.size].log_softmax(1)
        expected = logprobs.gather(1, torch.from_numpy(answer.astype(np.int64))[:, None])[:, 0]
        ours = block.targets.label_logprob[place : place + len(answer)]
        np.testing.assert_allclose(ours, expected, atol=1e-3, rtol=1e-3)
        place += len(answer)
    assert place == len(block.targets)


@pytest.mark.slow
def test_a_killed_capture_gives_the_same_answers(asked: Desk, processes: Processes) -> None:
    small = ("--set", "logits.shard_tokens=96", "--set", "logits.batch_tokens=64")
    second = asked.run / "logits" / "shards" / "00001.json"
    code, _ = processes.stopped(asked, signal.SIGKILL, second, "teacher-logits", "r.toml", *small)
    assert code == -signal.SIGKILL
    asked.done("teacher-logits", "r.toml", *small)

    def shards() -> dict[str, str]:
        return {n: digest for n, (digest, _) in asked.snapshot().items() if "/shards/" in n}

    resumed = shards()
    shutil.rmtree(asked.run)
    asked.done("teacher-logits", "r.toml", *small)
    assert shards() == resumed


@pytest.mark.slow
def test_a_student_learns_from_the_answers_and_other_settings_are_refused(asked: Desk) -> None:
    printed = asked.done("run", "r.toml").stdout
    assert sorted(models_of(printed)) == ["baseline", "small", "teacher"]
    asked.edit("temperature = 0.8", "temperature = 0.0")
    line = asked.refused("teacher-logits", "r.toml")
    assert "made differently: generated.temperature: 0.8 in the store, 0.0 now" in line


def test_texts_are_refused_as_prompts(desk: Desk) -> None:
    desk.edit("[logits]", f"{GENERATE}[logits]")
    line = desk.refused("teacher-logits", "r.toml")
    assert "teacher.generate needs prompts or chats" in line
