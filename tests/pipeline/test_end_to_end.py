"""Whole runs through the command line."""

from __future__ import annotations

import gzip
import json
import shutil
import signal
from typing import TYPE_CHECKING, Any

import pytest
from compared import models_of
from conftest import sentences as texts_of
from printed import sentences

if TYPE_CHECKING:
    from pathlib import Path
    from signal import Signals

    from click.testing import Result
    from desk import Desk, Processes

pytest_plugins = ("desk",)

CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)

MADE_HERE = """\
architecture = { layers = 1, hidden = 32, heads = 2 }
tokenizer = { vocabulary = 300 }
train = { steps = 3, batch_tokens = 256 }"""


@pytest.mark.slow
def test_a_whole_run_reports_each_step_once_and_ends_with_a_table(
    first_run: Result, finished: Desk
) -> None:
    stages = [line.split(":")[0] for line in sentences(first_run.stderr)]
    assert list(dict.fromkeys(stages)) == [
        "train-teacher",
        "corpus",
        "teacher-logits",
        "teacher-logits heldout",
        "teacher-logits train",
        "train-student small",
        "train-student baseline",
        "evaluate baseline",
        "evaluate small",
        "compare",
    ]
    assert first_run.stdout.split()[:3] == ["model", "parameters", "stored"]
    assert "\nWhat it costs to run (" in first_run.stdout
    assert sorted(models_of(first_run.stdout)) == ["baseline", "small", "teacher"]
    shards, student = "logits/shards/00000", "students/small"
    expected = [
        "recipe.toml", "recipe.resolved.json", "env.json", "corpus/corpus.json",
        "logits/manifest.json", "logits/tokenizer/tokenizer.json", f"{shards}.arrow",
        f"{shards}.json", "heldout/manifest.json", f"{student}/model/model.safetensors",
        f"{student}/model/tokenizer.json", f"{student}/checkpoints/checkpoint-3/whole.json",
        f"{student}/metrics.jsonl", f"{student}/evaluation.json",
        "students/baseline/evaluation.json", "comparison.json", "comparison.md",
        "comparison.html",
    ]  # fmt: skip
    assert [name for name in expected if not (finished.run / name).is_file()] == []
    assert not list(finished.run.rglob(".unfinished-*"))
    assert not (finished.run / "teacher").exists()
    by_file = finished.done("plan", "r.toml").stdout
    assert finished.done("plan", "r").stdout == by_file
    (finished.root / "r.toml").unlink()
    assert "small" in finished.done("compare", "r").stdout  # now by the run of that name


@pytest.mark.slow
def test_a_repeated_command_changes_nothing_and_reports_that(
    finished: Desk, first_run: Result
) -> None:
    before = finished.snapshot()
    student, figures = "runs/r/students/{0}/model", "runs/r/students/{0}/evaluation.json"
    for command, expected in (
        ("train-teacher", ["train-teacher: nothing to train: the teacher is teacher"]),
        ("teacher-logits", ["teacher-logits: complete: runs/r/logits and runs/r/heldout"]),
        (
            "train-student",
            [
                f"train-student {name}: already trained: {student.format(name)}"
                for name in ("small", "baseline")
            ],
        ),
        (
            "evaluate",
            [
                f"evaluate {name}: already done: {figures.format(name)}"
                for name in ("baseline", "small")
            ],
        ),
    ):
        result = finished.done(command, "r.toml")
        lines = result.stderr.splitlines()
        assert [line for line in lines if not line.startswith(("corpus:", "next: "))] == expected
        assert result.stdout == ""
    assert finished.snapshot() == before
    assert finished.done("run", "r.toml").stdout == first_run.stdout
    after = finished.snapshot()
    assert {name: hash_ for name, (hash_, _) in after.items()} == {
        name: hash_ for name, (hash_, _) in before.items()
    }
    written = {name for name in after if after[name] != before[name]}
    assert written <= {f"runs/r/comparison.{kind}" for kind in ("json", "md", "html")}


@pytest.mark.slow
def test_a_new_teacher_is_trained_once_and_captured(desk: Desk) -> None:
    recipe = (desk.root / "r.toml").read_text(encoding="utf-8")
    start, end = recipe.index("model = "), recipe.index("[logits]")
    desk.edit(recipe[start:end], MADE_HERE + "\n")
    result = desk.done("run", "r.toml")
    assert sorted(models_of(result.stdout)) == ["baseline", "small", "teacher"]
    lines = result.stderr.splitlines()
    assert len(lines) == len(set(lines)), "a line was printed twice"
    assert "tokenizer: 300 tokens learned" in lines
    assert any(line.startswith("train-teacher: ") and "trained" in line for line in lines)
    assert not any("already" in line for line in lines)
    identity = desk.json("logits", "manifest.json")["teacher"]
    assert identity["name"] == "teacher of r"
    assert desk.json("logits", "manifest.json")["tokenizer"]["size"] == 300

    before = desk.snapshot()
    again = desk.done("train-teacher", "r.toml")
    assert "train-teacher: already trained: runs/r/teacher/model" in again.stderr.splitlines()
    assert desk.snapshot() == before


@pytest.mark.slow
def test_stage_two_never_needs_the_teacher_or_the_corpus(finished: Desk) -> None:
    before = finished.json("students", "small", "evaluation.json")["positions"]
    shutil.rmtree(finished.run / "heldout")
    finished.edit("sequences = 12", "sequences = 5")
    finished.done("teacher-logits", "r.toml")
    shutil.rmtree(finished.root / "teacher")
    shutil.rmtree(finished.run / "corpus")
    for part in ("model", "checkpoints"):
        shutil.rmtree(finished.run / "students" / "small" / part)
    finished.edit("files = [", 'files = ["gone.txt", ')
    finished.done("train-student", "r.toml")
    # a student that is trained again loses its old figures
    assert not (finished.run / "students" / "small" / "evaluation.json").exists()
    finished.done("evaluate", "r.toml")
    rows = json.loads(finished.done("compare", "r.toml", "--json").stdout)
    assert {row["name"] for row in rows} == {"teacher", "small", "baseline"}
    assert all(0 < row["positions"] < before for row in rows)  # of the new held-out store


@pytest.mark.slow
def test_a_variant_is_another_student_of_the_same_store(finished: Desk) -> None:
    before = finished.snapshot()
    change = ("--student", "small2", "--set", "students.small.train.learning_rate=2e-3")
    result = finished.done("train-student", "r.toml", *change)
    assert "train-student small2" in result.stderr
    assert "train-student small:" not in result.stderr
    after = finished.snapshot()
    kept = [n for n in before if "/students/" in n or "/logits/" in n or "/heldout/" in n]
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
    old = finished.json("students", "small", "student.json")
    new = finished.json("students", "small2", "student.json")
    assert new["student"]["train"].pop("learning_rate") == 2e-3
    assert old["student"]["train"].pop("learning_rate") == 1e-3
    assert new == old

    again = finished.done("train-student", "r.toml", *change)
    assert "already trained: runs/r/students/small2/model" in again.stderr
    finished.done("evaluate", "r.toml", "--student", "small2")
    rows = json.loads(finished.done("compare", "r.toml", "--json").stdout)
    assert {row["name"] for row in rows} == {"teacher", "small", "baseline", "small2"}


@pytest.mark.slow
def test_a_runs_folder_is_a_recipe_from_any_working_directory(
    finished: Desk, tmp_path_factory: pytest.TempPathFactory
) -> None:
    before = finished.snapshot()
    result = finished.done("train-student", "runs/r")
    assert "already trained: runs/r/students/small/model" in result.stderr
    assert finished.snapshot() == before
    (finished.root / "r.toml").unlink()
    elsewhere = type(finished)(tmp_path_factory.mktemp("elsewhere"))
    result = elsewhere.done("teacher-logits", str(finished.run))
    assert "complete" in result.stderr
    assert list(elsewhere.root.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["chats", "completions"])
def test_only_answers_of_chats_and_completions_are_learned(
    desk: Desk, teacher_folder: Path, kind: str
) -> None:
    halves = [(text[: len(text) // 2], text[len(text) // 2 :]) for text in texts_of(40, seed=3)]
    if kind == "chats":  # in a compressed file
        roles = ("user", "assistant")
        rows: list[Any] = [
            {"messages": [{"role": r, "content": c} for r, c in zip(roles, half, strict=True)]}
            for half in halves
        ]
        content = gzip.compress("\n".join(map(json.dumps, rows)).encode())
        desk.write("chats.jsonl.gz", content)
        shutil.copytree(teacher_folder, desk.root / "chat-teacher")
        desk.write("chat-teacher/chat_template.jinja", CHAT_TEMPLATE)
        desk.edit("[teacher]\nmodel = ", '[teacher]\nmodel = "chat-teacher" # ')
    else:  # in columns with other names, on the way of a data set from the hub
        rows = [{"task": a[:45], "solution": b[:45], "id": 1} for a, b in halves]
        desk.write("data/train.jsonl", "\r\n".join(map(json.dumps, rows)))
        hub = ("--set", 'corpus.files=["hub:./data"]')
        line = desk.refused("teacher-logits", "r.toml", *hub)
        assert "hub:./data: missing column 'text' (have: task, solution, id)" in line
        columns = '[corpus.columns]\nprompt = "task"\ncompletion = "solution"\n[teacher]'
        desk.edit("[teacher]", columns)
    name = "chats.jsonl.gz" if kind == "chats" else "hub:./data"
    desk.edit("files = [", f'files = ["{name}"] # ')
    desk.done("run", "r.toml", "--set", "corpus.sequence_length=64")
    splits = desk.json("corpus", "corpus.json")["splits"]
    assert sum(split["documents"] for split in splits.values()) == 40
    for split in splits.values():
        assert 0.2 < split["positions"] / split["tokens"] < 0.8
    assert desk.json("comparison.json")[0]["positions"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "how", [signal.SIGINT, signal.SIGKILL, signal.SIGTERM], ids=lambda how: how.name
)
def test_a_stopped_capture_resumes_with_the_same_result(
    desk: Desk, processes: Processes, how: Signals
) -> None:
    small = ("--set", "logits.shard_tokens=32", "--set", "logits.batch_tokens=32")
    second = desk.run / "logits" / "shards" / "00001.json"
    code, output = processes.stopped(desk, how, second, "teacher-logits", "r.toml", *small)
    if how is signal.SIGINT:
        assert code == 130
        assert output[-1] == "interrupted; run the same command again to continue"
        assert [line for line in output if "Traceback" in line or not line] == []
        assert not list(desk.run.rglob(".unfinished-*"))
    elif how is signal.SIGTERM:
        assert code == 143
        command = " ".join(("coldstill teacher-logits r.toml", *small))
        assert output[-1] == f"stopped as asked; resume with {command}"
        assert not list(desk.run.rglob(".unfinished-*"))
        assert not (desk.run / "logits" / "claims").exists()
    else:
        assert code == -signal.SIGKILL
    done = len(list(second.parent.glob("*.json")))
    shards = desk.json("logits", "manifest.json")["sequences"]
    assert 2 <= done < shards, "it was not stopped in the middle"

    result = desk.done("teacher-logits", "r.toml", *small)
    assert f"teacher-logits train: continuing: {done} of {shards} shards done" in result.stderr
    resumed = {name: digest for name, (digest, _) in desk.snapshot().items() if "/shards/" in name}
    shutil.rmtree(desk.run)
    desk.done("teacher-logits", "r.toml", *small)
    at_once = {name: digest for name, (digest, _) in desk.snapshot().items() if "/shards/" in name}
    assert resumed == at_once


@pytest.mark.slow
@pytest.mark.parametrize(
    "how", [signal.SIGINT, signal.SIGKILL, signal.SIGTERM], ids=lambda how: how.name
)
def test_a_stopped_training_resumes_from_its_last_checkpoint(
    finished: Desk, processes: Processes, how: Signals
) -> None:
    settings = "--set students.small.train.steps=60 --set students.small.train.checkpoint_every=10"
    new = ("--student", "n", *settings.split())
    folder = finished.run / "students" / "n"
    whole = folder / "checkpoints" / "checkpoint-10" / "whole.json"
    code, output = processes.stopped(finished, how, whole, "train-student", "r.toml", *new)
    if how is signal.SIGINT:
        assert code == 130
        assert output[-1] == "interrupted; run the same command again to continue"
    elif how is signal.SIGTERM:
        assert code == 143
        command = " ".join(("coldstill train-student r.toml", *new))
        assert output[-1] == f"stopped as asked; resume with {command}"
    else:
        assert code == -signal.SIGKILL
    assert [line for line in output if "Traceback" in line or not line] == []
    assert not (folder / "model").exists()
    assert not (folder / ".training").exists() or how is signal.SIGKILL

    result = finished.done("train-student", "r.toml", *new)
    assert "train-student n: resuming from step " in result.stderr
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 61))
    assert (folder / "model" / "model.safetensors").exists()
