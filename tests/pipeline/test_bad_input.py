"""Wrong recipes, corpora, teachers, stores and disks: one clear line, and no file changes."""

from __future__ import annotations

import errno
import fcntl
import gzip
import json
import os
import re
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from conftest import make_model, sentences
from safetensors import SafetensorError
from transformers import Trainer

if TYPE_CHECKING:
    from desk import Desk

pytest_plugins = ("desk",)

LOGITS = ("teacher-logits", "r.toml")
STUDENT = ("train-student", "r.toml")
NEW_TEACHER = """architecture = { layers = 1, hidden = 32, heads = 2 }
tokenizer = { vocabulary = 300 }
train = { steps = 3, batch_tokens = 256 }"""


@pytest.mark.slow
def test_a_wrong_recipe_stops_every_command_before_it_begins(finished: Desk) -> None:
    recipe = (finished.root / "r.toml").read_text(encoding="utf-8")
    for old, new, message in (
        ("head = 4", "heads = 4", "logits: unknown key 'heads'; did you mean 'head"),
        ("[corpus]", "[corpus", "not valid TOML: "),
        ("[teacher]", "[teacher]\ntokenizer = {}", "teacher: has both 'model' and a "),
        ("[teacher]", "[teacher]\nlora = {}", "teacher: has 'lora' without 'train'"),
    ):
        finished.write("r.toml", recipe.replace(old, new))
        for command in ("plan", "train-teacher", "teacher-logits", "train-student"):
            assert finished.refused(command, "r.toml").startswith(f"error: r.toml: {message}")
    finished.write("r.toml", recipe.partition("[students.small]")[0])
    assert finished.refused(*STUDENT) == "error: r: the recipe has no students"


def test_a_missing_recipe_or_a_name_that_leaves_the_folder_is_refused(desk: Desk) -> None:
    line = desk.refused("plan", "q.toml")
    assert line.startswith("error: q.toml: no recipe file, no run folder and no built-in recipe")
    assert "coldstill init NAME" in line
    assert "File name too long" in desk.refused("plan", "x" * 300)
    for name in ("../up", "a/b", "", ".", "a b"):
        assert "name: string should match pattern" in desk.refused(*LOGITS, "--set", f"name={name}")
    line = desk.refused(*STUDENT, "--student", "../x", "--set", "students.small.train.steps=4")
    assert "'../x'" in line


@pytest.mark.slow
def test_an_unreadable_corpus_is_refused(desk: Desk) -> None:
    answer_only = b'{"messages": [{"role": "assistant", "content": "a"}]}\n'
    cases: list[tuple[str, bytes | None, str]] = [
        ("gone.txt", None, r"'gone\.txt': no such file or folder in .*; check corpus\.files"),
        ("empty.txt", b"", r"empty\.txt: the file is empty"),
        ("empty.jsonl", b"", r"empty\.jsonl: the file is empty"),
        ("blank.jsonl", b"\n \n", r"blank\.jsonl: holds no records"),
        ("bad.jsonl", b'{"text": "a"}\n{"text": "b"\n', r"bad\.jsonl:2: not valid JSON: "),
        ("bad.jsonl", b'{"text": "a"}\n{"text": 3}\n', r"bad\.jsonl:2: column 'text' holds int 3"),
        ("bad.jsonl", b'{"a": "a"}\n', r"bad\.jsonl:1: missing column 'text' \(have: a\)"),
        ("bad.json", b'{"text": "a"}', r"bad\.json: one dict, expected a list of records"),
        ("bad.txt", b"good\nbad \xff", r"bad\.txt:2: byte 9 \(0xff\) is not valid UTF-8"),
        ("bad.txt.gz", gzip.compress(os.urandom(999))[:500], r"bad\.txt\.gz: cannot be read: "),
        ("bad.parquet", b"PAR1nonsense", r"bad\.parquet: cannot be read: "),
        ("word.doc", b"text", r"word\.doc: unknown suffix '\.doc'; known are \.txt"),
        ("one.txt", b"just one text", r"one\.txt: holds one document, expected several"),
        ("no.jsonl", b'{"text": ""}\n' * 9, r"no\.jsonl: nothing to learn: of 0 documents"),
        ("c.jsonl", answer_only, r"c\.jsonl:1: a chat, but the tokenizer has no chat template"),
    ]
    for name, content, message in cases:
        if content is not None:
            desk.write(name, content)
        line = desk.refused(*LOGITS, "--set", f'corpus.files=["{name}"]')
        assert re.match(f"error: {message}", line), line


def test_a_file_name_that_is_not_utf8_is_refused(desk: Desk) -> None:
    folder = desk.root / "texts"
    folder.mkdir()
    for i, text in enumerate(sentences(30)):
        name = os.fsencode(str(folder / f"{i}")) + b"-\xff.txt"
        Path(os.fsdecode(name)).write_text(text, encoding="utf-8")
    line = desk.refused(*LOGITS, "--set", 'corpus.files=["texts"]')
    assert "texts/0-" in line
    assert "file name" in line


def test_a_corpus_or_capture_that_does_not_fit_is_refused(desk: Desk) -> None:
    for setting, message in (
        ("corpus.holdout=1e-9", "holdout = 1e-09 selected 0 of"),
        ("corpus.holdout=0.999999", "nothing to learn: of 60 documents 0 are not held out"),
        ("logits.head=5000", "error: logits.head: 5000 is more than the vocabulary's 320 tokens"),
        ("logits.head=320", "set tail = 0"),
        (
            "corpus.sequence_length=129",
            "error: corpus.sequence_length: 129 is more than the teacher's context of 128; choose "
            "at most 128",
        ),
    ):
        assert message in desk.refused(*LOGITS, "--set", setting)


@pytest.mark.slow
def test_a_missing_or_damaged_teacher_is_refused(finished: Desk) -> None:
    for folder in ("texts", "models"):
        (finished.root / folder).mkdir()
    weights = (finished.root / "teacher" / "model.safetensors").read_bytes()
    for name in ("bare", "half", "settings"):
        shutil.copytree(finished.root / "teacher", finished.root / name)
    (finished.root / "bare" / "model.safetensors").unlink()
    finished.write("half/model.safetensors", weights[: len(weights) // 2])
    finished.write("settings/config.json", "{")
    for model, message in (
        ("./nowhere", "teacher.model: no folder ./nowhere"),
        ("no/where/at/all", "teacher.model: no folder no/where/at/all"),
        ("models/typo", "error: models/typo: no such folder in "),  # never looked up on a hub
        ("texts", "teacher.model: no tokenizer in "),
        ("bare", "holds no *.safetensors or *.bin weights"),
        ("half", "teacher.model: "),
        ("settings", "teacher.model: "),
    ):
        assert message in finished.refused(*LOGITS, "--set", f"teacher.model={model}")


def test_a_teacher_with_infinite_logits_is_refused(desk: Desk, tokenizer_folder: Path) -> None:
    model = make_model("llama", 336)
    model.lm_head.weight.data[:] = 3e38  # the weights are finite, their products are not
    model.save_pretrained(desk.root / "teacher")
    for path in tokenizer_folder.glob("tokenizer*"):
        shutil.copy(path, desk.root / "teacher")
    result = desk.coldstill(*LOGITS, "--set", "teacher.model=teacher")
    assert result.exit_code == 1
    assert re.match(
        r"error: teacher teacher: its logits are not finite at heldout sequence \d+, position \d+,",
        result.stderr.splitlines()[-1],
    )
    assert not list(desk.run.glob("*/shards/*"))


def test_an_impossible_new_teacher_is_refused(desk: Desk) -> None:
    text = (desk.root / "r.toml").read_text(encoding="utf-8")
    desk.write("r.toml", re.sub('model = ".*"', NEW_TEACHER, text))
    train = ("train-teacher", "r.toml")
    many = desk.refused(*train, "--set", "teacher.tokenizer.vocabulary=9999")
    assert re.search(r"the corpus gives only \d+ tokens, expected 9999; set it to at most", many)
    desk.done(*train)
    line = desk.refused(*train, "--set", "teacher.train.steps=4")
    assert "teacher was trained with train.steps = 3, now 4; train another under a new name" in line
    line = desk.refused(*train, "--set", "teacher.tokenizer.vocabulary=310")
    assert "has 300 tokens, the recipe now asks for 310; give this run another name" in line


@pytest.mark.slow
def test_a_new_teacher_in_a_run_of_another_is_refused(finished: Desk) -> None:
    finished.edit('model = "teacher"', NEW_TEACHER)
    message = "teacher.tokenizer asks for a new tokenizer, but logits was made with another"
    for command in ("train-teacher", "teacher-logits", "run"):
        assert message in finished.refused(command, "r.toml")


def test_a_step_before_its_earlier_step_is_refused(desk: Desk) -> None:
    no_store = "error: runs/r/logits: no store there; make it first with coldstill teacher-logits r"
    assert desk.refused(*STUDENT) == no_store
    assert "no store there" in desk.refused("evaluate", "r.toml")
    line = desk.refused("compare", "r.toml")
    assert line == "error: runs/r: no student is evaluated yet; run coldstill evaluate"


@pytest.mark.slow
def test_an_incomplete_or_damaged_store_is_refused_and_can_be_completed(finished: Desk) -> None:
    shutil.rmtree(finished.run / "students")
    line = finished.refused("evaluate", "r.toml")
    assert line == "error: runs/r: no student is trained yet; run coldstill train-student"
    shard = finished.run / "logits" / "shards" / "00001.arrow"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    line = finished.refused(*STUDENT)
    assert "00001.arrow: damaged: " in line
    assert "run coldstill store repair, then teacher-logits again" in line
    assert "00001.arrow: damaged: " in finished.refused(*LOGITS)
    shard.with_suffix(".json").unlink()
    with (finished.run / "logits" / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        line = finished.refused(*LOGITS)
    assert line == "error: runs/r/logits: another process is writing this store; wait for it"
    assert re.fullmatch(
        r"error: runs/r/logits: incomplete, \d+ of \d+ shards; finish it with coldstill "
        r"teacher-logits",
        finished.refused(*STUDENT),
    )
    finished.done(*LOGITS)
    assert shard.read_bytes() == whole
    finished.done(*STUDENT)


@pytest.mark.slow
def test_a_store_with_other_settings_is_refused(finished: Desk) -> None:
    for setting, message in (
        ("logits.head=5", "runs/r/logits: made differently: capture.head: 4 in the store, 5 now"),
        ("logits.tail=5", "runs/r/logits: made differently: capture.tail: 4 in the store, 5 now"),
        ("logits.temperatures=[2]", "logits: made differently: capture.temperatures: "),
        ("logits.sequences=3", "runs/r/logits: made differently: sequences: "),
        ("logits.shard_tokens=64", "made differently: shard_sequences: "),
        ("seed=1", "made differently: capture.seed: 0 in the store, 1 now"),
        ("teacher.dtype=bf16", "made differently: teacher.dtype: float32 in the store, bfloat16 n"),
        ("evaluation.head=5", "runs/r/heldout: made differently: capture.head: 16 in the store, 5"),
        (
            "corpus.sequence_length=16",
            "corpus.sequence_length was 32, is 16; logits was made from it",
        ),
        ("corpus.holdout=0.3", "runs/r/corpus: prepared differently: corpus.holdout was 0.2, is 0"),
        ("corpus.pack=false", "runs/r/corpus: prepared differently: corpus.pack was True, is Fal"),
    ):
        line = finished.refused(*LOGITS, "--set", setting)
        assert message in line
        assert "another name" in line


@pytest.mark.slow
def test_a_store_of_another_teacher_or_tokenizer_is_refused(finished: Desk) -> None:
    teacher = finished.root / "teacher"
    make_model("llama", 336, seed=1).save_pretrained(teacher)
    line = finished.refused(*LOGITS)
    assert "runs/r/logits: made differently: teacher.fingerprint: " in line
    make_model("gpt2", 336).save_pretrained(teacher)
    assert "teacher.family: llama in the store, gpt2 now" in finished.refused(*LOGITS)
    table = json.loads((teacher / "tokenizer.json").read_text(encoding="utf-8"))
    table["added_tokens"].append({**table["added_tokens"][0], "id": 320, "content": "<new>"})
    finished.write("teacher/tokenizer.json", json.dumps(table))
    line = finished.refused(*LOGITS)
    assert "runs/r/corpus: prepared differently: the tokenizer has changed; logits was made" in line


@pytest.mark.slow
def test_inspect_refuses_other_folders_and_damaged_manifests(finished: Desk) -> None:
    for path in ("nowhere", ".", "runs/r/corpus"):
        assert finished.refused("inspect", path) == (
            f"error: {path}: no manifest.json there, so not a store; a run's stores are its "
            "folders logits and heldout"
        )
    for content in ("", "[]", "{}", '{"format": "coldstill", "version": 99}'):
        finished.write("runs/r/logits/manifest.json", content)
        line = finished.refused("inspect", "runs/r/logits")
        assert line.startswith("error: runs/r/logits/manifest.json: ")


def test_a_folder_that_cannot_be_written_is_refused(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "runs")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", refuse)
        assert "Permission denied" in desk.refused(*LOGITS)
    source = Path(__file__).resolve().parents[2]
    for command in ("plan", "teacher-logits", "train-student"):
        line = desk.refused(command, "r.toml", "--runs", str(source / "data"))
        assert "inside coldstill's own source" in line
        assert "choose another folder with --runs" in line
    desk.write("runs", "a file")
    assert "runs" in desk.refused(*LOGITS)


@pytest.mark.slow
@pytest.mark.parametrize("after", [0, 5, 40])
def test_a_full_disk_keeps_finished_results_and_the_command_resumes(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    files_left = [after]
    real = os.fsync

    def fsync(descriptor: int) -> None:
        files_left[0] -= 1
        if files_left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        result = desk.coldstill(*LOGITS)
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    line = result.stderr.splitlines()[-1]
    assert re.fullmatch(
        r"error: runs/r/\S+: the disk is full; finished results are kept, free some space and run "
        r"the same command again",
        line,
    )
    assert not list(desk.root.rglob(".unfinished-*"))
    desk.done(*LOGITS)


@pytest.mark.slow
def test_a_full_disk_during_a_checkpoint_is_reported(
    finished: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(finished.run / "students")
    for error in (
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"),
        SafetensorError("Error while serializing: No space left on device (os error 28)"),
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "optimizer.pt"),
    ):
        saved: list[Any] = []

        def save(self: Any, *_: Any, saved: list[Any] = saved, error: Exception = error) -> None:
            saved.append(self)
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "_save_checkpoint", save)
            result = finished.coldstill(*STUDENT)
        assert len(saved) == 1
        assert isinstance(result.exception, SystemExit)
        line = result.stderr.splitlines()[-1]
        assert line.startswith("error: ")
        assert "the disk is full" in line
        assert "run the same command again" in line
    finished.done(*STUDENT)


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")
def test_an_engine_that_is_not_installed_is_refused_before_the_corpus_is_read(
    desk: Desk,
) -> None:
    line = desk.refused(*LOGITS, "--set", 'teacher.engine="vllm"')
    assert line.startswith("error: teacher.engine: vllm is not installed; install it with ")
    assert not desk.run.exists()
    line = desk.refused(*LOGITS, "--set", "teacher.engine_options={ block_size = 16 }")
    assert "has 'engine_options' without 'engine'" in line
