"""Whole runs through the command line."""

from __future__ import annotations

import gzip
import json
import shutil
import signal
from typing import TYPE_CHECKING, Any

import pytest
from compared import models_of
from conftest import sentences
from said import sentences as told

if TYPE_CHECKING:
    from pathlib import Path
    from signal import Signals

    from click.testing import Result
    from desk import Desk, Processes

pytest_plugins = ("desk",)

MADE_HERE = """\
architecture = { layers = 1, hidden = 32, heads = 2 }
tokenizer = { vocabulary = 300 }
train = { steps = 3, batch_tokens = 256 }"""


def test_a_whole_run_reports_each_step_once_and_ends_with_a_table(first_run: Result) -> None:
    said = [line.split(":")[0] for line in told(first_run.stderr)]
    assert [line for i, line in enumerate(said) if line not in said[:i]] == [
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
    assert first_run.stdout.split()[:3] == ["model", "parameters", "cached"]
    assert "\nWhat it costs to run (" in first_run.stdout
    assert sorted(models_of(first_run.stdout)) == ["baseline", "small", "teacher"]


def test_a_run_has_all_its_files_at_the_documented_places(finished: Desk) -> None:
    expected = [
        "recipe.toml",
        "recipe.resolved.json",
        "env.json",
        "corpus/corpus.json",
        "logits/manifest.json",
        "logits/tokenizer/tokenizer.json",
        "logits/shards/00000.arrow",
        "logits/shards/00000.json",
        "heldout/manifest.json",
        "students/small/model/model.safetensors",
        "students/small/model/tokenizer.json",
        "students/small/checkpoints/checkpoint-3/whole.json",
        "students/small/metrics.jsonl",
        "students/small/evaluation.json",
        "students/baseline/evaluation.json",
        "comparison.json",
        "comparison.md",
        "comparison.html",
    ]
    assert [name for name in expected if not (finished.run / name).is_file()] == []
    assert not list(finished.run.rglob(".unfinished-*"))
    assert not (finished.run / "teacher").exists()


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("train-teacher", ["train-teacher: nothing to train: the teacher is teacher"]),
        ("teacher-logits", ["teacher-logits: complete: runs/r/logits and runs/r/heldout"]),
        (
            "train-student",
            [
                "train-student small: already trained: runs/r/students/small/model",
                "train-student baseline: already trained: runs/r/students/baseline/model",
            ],
        ),
        (
            "evaluate",
            [
                "evaluate baseline: already done: runs/r/students/baseline/evaluation.json",
                "evaluate small: already done: runs/r/students/small/evaluation.json",
            ],
        ),
    ],
)
def test_a_repeated_command_changes_nothing_and_reports_that(
    finished: Desk, command: str, says: list[str]
) -> None:
    before = finished.snapshot()
    result = finished.done(command, "r.toml")
    lines = result.stderr.splitlines()
    spoken = [line for line in lines if not line.startswith(("corpus:", "next: "))]
    assert spoken == says
    assert result.stdout == ""
    assert finished.snapshot() == before


def test_a_repeated_run_changes_nothing_and_prints_the_same_table(
    finished: Desk, first_run: Result
) -> None:
    before = finished.snapshot()
    result = finished.done("run", "r.toml")
    assert result.stdout == first_run.stdout
    after = finished.snapshot()
    assert {name: digest for name, (digest, _) in after.items()} == {
        name: digest for name, (digest, _) in before.items()
    }
    written = {name for name in after if after[name] != before[name]}
    assert written <= {f"runs/r/comparison.{kind}" for kind in ("json", "md", "html")}


def test_a_new_teacher_is_trained_once_and_captured(desk: Desk) -> None:
    recipe = (desk.root / "r.toml").read_text(encoding="utf-8")
    start, end = recipe.index("model = "), recipe.index("[logits]")
    desk.edit(recipe[start:end], MADE_HERE + "\n")
    result = desk.done("run", "r.toml")
    assert sorted(models_of(result.stdout)) == [
        "baseline",
        "small",
        "teacher",
    ]
    lines = result.stderr.splitlines()
    assert len(lines) == len(set(lines)), "something was said twice"
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


def test_stage_two_never_needs_the_teacher_or_the_corpus(finished: Desk) -> None:
    shutil.rmtree(finished.root / "teacher")
    shutil.rmtree(finished.run / "corpus")
    shutil.rmtree(finished.run / "students")
    finished.edit("files = [", 'files = ["gone.txt", ')
    finished.done("train-student", "r.toml")
    finished.done("evaluate", "r.toml")
    rows = json.loads(finished.done("compare", "r.toml", "--json").stdout)
    assert {row["name"] for row in rows} == {"teacher", "small", "baseline"}


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


CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def chat_teacher(teacher_folder: Path, tmp_path: Path) -> Path:
    """The teacher with a chat template."""
    folder = tmp_path / "chat-teacher"
    shutil.copytree(teacher_folder, folder)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    return folder


def _chats(count: int) -> list[dict[str, Any]]:
    said = sentences(count, seed=3)
    return [
        {
            "messages": [
                {"role": "user", "content": text[: len(text) // 2]},
                {"role": "assistant", "content": text[len(text) // 2 :]},
            ]
        }
        for text in said
    ]


def test_in_chats_of_a_compressed_file_only_assistant_text_is_learned(
    desk: Desk, chat_teacher: Path
) -> None:
    lines = "\n".join(json.dumps(chat) for chat in _chats(40))
    desk.write("chats.jsonl.gz", gzip.compress(lines.encode()))
    desk.edit("files = [", 'files = ["chats.jsonl.gz"] # ')
    desk.edit("[teacher]\nmodel = ", '[teacher]\nmodel = "chat-teacher" # ')
    desk.done("run", "r.toml", "--set", "corpus.sequence_length=64")
    splits = desk.json("corpus", "corpus.json")["splits"]
    assert sum(split["documents"] for split in splits.values()) == 40
    for split in splits.values():
        assert 0.2 < split["positions"] / split["tokens"] < 0.8
    assert desk.json("comparison.json")[0]["positions"] > 0


def test_prompts_and_completions_under_other_names_are_learned_from_the_completion_on(
    desk: Desk,
) -> None:
    records = [
        {"task": text[: len(text) // 2], "solution": text[len(text) // 2 :], "id": i}
        for i, text in enumerate(whole[:90] for whole in sentences(40, seed=4))
    ]
    desk.write("tasks.jsonl", "\r\n".join(json.dumps(record) for record in records))
    desk.edit("files = [", 'files = ["tasks.jsonl"] # ')
    line = desk.refused("teacher-logits", "r.toml")
    assert "tasks.jsonl:1: missing column 'text' (have: task, solution, id)" in line
    desk.edit("[teacher]", '[corpus.columns]\nprompt = "task"\ncompletion = "solution"\n[teacher]')
    desk.done("run", "r.toml")
    for split in desk.json("corpus", "corpus.json")["splits"].values():
        assert 0.2 < split["positions"] / split["tokens"] < 0.8


def test_a_local_folder_replaces_a_dataset_of_the_hub(desk: Desk) -> None:
    records = [json.dumps({"text": text}) for text in sentences(40)]
    desk.write("data/train.jsonl", "\n".join(records))
    desk.edit("files = [", 'files = ["hub:./data"] # ')
    desk.done("teacher-logits", "r.toml")
    splits = desk.json("corpus", "corpus.json")["splits"]
    assert sum(split["documents"] for split in splits.values()) == 40


@pytest.mark.parametrize(
    "how", [signal.SIGINT, signal.SIGKILL, signal.SIGTERM], ids=lambda how: how.name
)
def test_a_stopped_capture_resumes_with_the_same_result(
    desk: Desk, processes: Processes, how: Signals
) -> None:
    small = ("--set", "logits.shard_tokens=32", "--set", "logits.batch_tokens=32")
    second = desk.run / "logits" / "shards" / "00001.json"
    code, said = processes.stopped(desk, how, second, "teacher-logits", "r.toml", *small)
    if how is signal.SIGINT:
        assert code == 130
        assert said[-1] == "interrupted; run the same command again to continue"
        assert [line for line in said if "Traceback" in line or not line] == []
        assert not list(desk.run.rglob(".unfinished-*"))
    elif how is signal.SIGTERM:
        assert code == 0
        command = " ".join(("coldstill teacher-logits r.toml", *small))
        assert said[-1] == f"stopped as asked; resume with {command}"
        assert not list(desk.run.rglob(".unfinished-*"))
        assert not (desk.run / "logits" / "claims").exists()
    else:
        assert code == -signal.SIGKILL
    done = len(list(second.parent.glob("*.json")))
    shards = desk.json("logits", "manifest.json")["sequences"]
    assert 2 <= done < shards, "it was not stopped in the middle"

    result = desk.done("teacher-logits", "r.toml", *small)
    assert f"teacher-logits train: continuing: {done} of {shards} shards done" in result.stderr
    went_on = {name: digest for name, (digest, _) in desk.snapshot().items() if "/shards/" in name}
    shutil.rmtree(desk.run)
    desk.done("teacher-logits", "r.toml", *small)
    at_once = {name: digest for name, (digest, _) in desk.snapshot().items() if "/shards/" in name}
    assert went_on == at_once


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
    code, said = processes.stopped(finished, how, whole, "train-student", "r.toml", *new)
    if how is signal.SIGINT:
        assert code == 130
        assert said[-1] == "interrupted; run the same command again to continue"
    elif how is signal.SIGTERM:
        assert code == 0
        command = " ".join(("coldstill train-student r.toml", *new))
        assert said[-1] == f"stopped as asked; resume with {command}"
    else:
        assert code == -signal.SIGKILL
    assert [line for line in said if "Traceback" in line or not line] == []
    assert not (folder / "model").exists()
    assert not (folder / ".training").exists() or how is signal.SIGKILL

    result = finished.done("train-student", "r.toml", *new)
    assert "train-student n: going on from step " in result.stderr
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 61))
    assert (folder / "model" / "model.safetensors").exists()


def test_another_held_out_store_needs_new_figures(finished: Desk) -> None:
    before = finished.json("students", "small", "evaluation.json")["positions"]
    shutil.rmtree(finished.run / "heldout")
    finished.edit("sequences = 12", "sequences = 5")
    finished.done("teacher-logits", "r.toml")
    finished.done("evaluate", "r.toml")
    rows = json.loads(finished.done("compare", "r.toml", "--json").stdout)
    assert len(rows) == 3
    assert all(0 < row["positions"] < before for row in rows)


def test_a_student_that_is_trained_again_loses_its_old_figures(finished: Desk) -> None:
    folder = finished.run / "students" / "small"
    for part in ("model", "checkpoints"):
        shutil.rmtree(folder / part)
    finished.done("train-student", "r.toml", "--student", "small")
    assert (folder / "model").exists()
    assert not (folder / "evaluation.json").exists()


def test_a_recipe_is_found_by_its_name_alone(finished: Desk) -> None:
    by_file = finished.done("plan", "r.toml").stdout
    assert finished.done("plan", "r").stdout == by_file
    (finished.root / "r.toml").unlink()
    assert "small" in finished.done("compare", "r").stdout  # now by the run of that name
