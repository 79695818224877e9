"""What a hostile or clumsy user gets: one line that helps, and everything left as it was."""

from __future__ import annotations

import errno
import gzip
import json
import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import coldstill.data.files
import pytest
from conftest import make_model, sentences
from safetensors import SafetensorError
from tokenizers import Tokenizer
from transformers import Trainer

if TYPE_CHECKING:
    from desk import Desk

pytest_plugins = ("desk",)

LOGITS = ("teacher-logits", "r.toml")
STUDENT = ("train-student", "r.toml")


@pytest.mark.parametrize("command", ["plan", "train-teacher", "teacher-logits", "train-student"])
@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("head = 4", "heads = 4", "error: r.toml: logits: unknown key 'heads'; did you mean 'head"),
        ("[corpus]", "[corpus", "error: r.toml: not valid TOML: "),
        (
            "[teacher]",
            "[teacher]\ntokenizer = {}",
            "error: r.toml: teacher: has both 'model' and a ",
        ),
        ("[teacher]", "[teacher]\nlora = {}", "error: r.toml: teacher: has 'lora' without 'train'"),
    ],
)
def test_a_wrong_recipe_stops_every_command_before_it_begins(
    finished: Desk, command: str, old: str, new: str, said: str
) -> None:
    finished.edit(old, new)
    assert finished.refused(command, "r.toml").startswith(said)


def test_a_missing_recipe_is_refused(desk: Desk) -> None:
    said = desk.refused("plan", "q.toml")
    assert said.startswith("error: q.toml: no recipe file, no run folder and no built-in recipe")
    assert "coldstill init NAME" in said
    assert "File name too long" in desk.refused("plan", "x" * 300)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (None, None, r"'gone\.txt': no such file or folder in .*; check corpus\.files"),
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
        (
            "chat.jsonl",
            b'{"messages": [{"role": "assistant", "content": "a"}]}\n',
            r"chat\.jsonl:1: a chat, but the tokenizer has no chat template",
        ),
    ],
)
def test_an_unreadable_corpus_is_refused(
    desk: Desk, name: str | None, content: bytes | None, said: str
) -> None:
    if name is not None and content is not None:
        desk.write(name, content)
    desk.edit("files = [", f'files = ["{name or "gone.txt"}"] # ')
    assert re.match(f"error: {said}", desk.refused(*LOGITS))


def test_a_file_name_that_is_not_utf8_breaks_nothing(desk: Desk) -> None:
    folder = desk.root / "texts"
    folder.mkdir()
    for i, text in enumerate(sentences(30)):
        name = os.fsencode(str(folder / f"{i}")) + b"-\xff.txt"
        Path(os.fsdecode(name)).write_text(text, encoding="utf-8")
    desk.edit("files = [", 'files = ["texts"] # ')
    said = desk.refused(*LOGITS)
    assert "texts/0-" in said
    assert "file name" in said


def test_a_split_without_documents_is_refused(desk: Desk) -> None:
    assert "held-out share of 1e-09; raise corpus.holdout" in desk.refused(
        *LOGITS, "--set", "corpus.holdout=1e-9"
    )
    assert "nothing to learn: of 60 documents 0 are not held out" in desk.refused(
        *LOGITS, "--set", "corpus.holdout=0.999999"
    )


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("./nowhere", "teacher.model: no folder ./nowhere"),
        ("no/where/at/all", "teacher.model: no folder no/where/at/all"),
        ("texts", "teacher.model: no tokenizer in "),
        ("bare", "holds no *.safetensors or *.bin weights"),
    ],
)
def test_a_missing_teacher_is_refused(
    finished: Desk, tokenizer_folder: Path, model: str, said: str
) -> None:
    (finished.root / "texts").mkdir()
    bare = finished.root / "bare"
    shutil.copytree(finished.root / "teacher", bare)
    (bare / "model.safetensors").unlink()
    assert said in finished.refused(*LOGITS, "--set", f"teacher.model={model}")


def test_damaged_weights_are_refused(desk: Desk, teacher_folder: Path) -> None:
    folder = desk.root / "teacher"
    shutil.copytree(teacher_folder, folder)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "teacher.model: " in desk.refused(*LOGITS, "--set", "teacher.model=teacher")
    (folder / "model.safetensors").write_bytes(whole)
    (folder / "config.json").write_text("{", encoding="utf-8")
    assert "teacher.model: " in desk.refused(*LOGITS, "--set", "teacher.model=teacher")


def test_a_head_or_tail_larger_than_the_vocabulary_is_refused(desk: Desk) -> None:
    said = desk.refused(*LOGITS, "--set", "logits.head=5000")
    assert said == "error: logits.head: 5000 is more than the vocabulary's 320 tokens"
    assert "set tail = 0" in desk.refused(*LOGITS, "--set", "logits.head=320")


def test_a_sequence_longer_than_the_context_is_refused(desk: Desk) -> None:
    said = desk.refused(*LOGITS, "--set", "corpus.sequence_length=129")
    assert said == (
        "error: corpus.sequence_length: 129 is more than the teacher's context of 128; choose at "
        "most 128"
    )


def test_a_student_with_a_short_context_is_refused(finished: Desk) -> None:
    said = finished.refused(
        *STUDENT, "--student", "n", "--set", "students.small.architecture.context=16"
    )
    assert said == (
        "error: students.n: its context of 16 tokens is shorter than the store's sequences of 32"
    )


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("architecture.heads=3", "students.n.architecture: hidden = 32 is not a multiple of heads"),
        ("architecture.kv_heads=3", "heads = 2 is not a multiple of kv_heads = 3"),
        ("architecture.family=lama", "students.n.architecture: cannot make a 'lama' model: "),
        ("objective.temperature=2", "temperature 2.0 was not captured (captured: 1.0)"),
        ("objective.kl=0", "students.n.objective: all weights are 0"),
        ("train.trainer={stepps=3}", "train.trainer: "),
        ("train.trainer={optim='none'}", "train.trainer: "),
        (
            "train.trainer={eval_strategy='steps'}",
            "'eval_strategy' would change nothing: ",
        ),
        ("train.micro_batch_tokens=96", "cannot be shared out as 3 per forward pass"),
    ],
)
def test_an_untrainable_student_is_refused(finished: Desk, setting: str, said: str) -> None:
    line = finished.refused(*STUDENT, "--student", "n", "--set", f"students.small.{setting}")
    assert said in line


def test_a_student_that_was_refused_can_be_corrected(finished: Desk) -> None:
    variant = (*STUDENT, "--student", "n", "--set")
    line = finished.refused(*variant, "students.small.architecture.heads=3")
    assert "hidden = 32 is not a multiple of heads = 3" in line
    finished.done(*variant, "students.small.architecture.heads=4")
    assert (finished.run / "students" / "n" / "model").is_dir()


def test_a_student_with_another_tokenizer_is_refused(finished: Desk) -> None:
    folder = finished.root / "other"
    make_model("llama", 320).save_pretrained(folder)
    for path in (finished.root / "teacher").glob("tokenizer*"):
        shutil.copy(path, folder)
    table = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = table["model"]["vocab"]
    first, second = [token for token, i in vocabulary.items() if i in (70, 71)]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (folder / "tokenizer.json").write_text(json.dumps(table), encoding="utf-8")
    Tokenizer.from_file(str(folder / "tokenizer.json"))
    finished.edit(
        "[students.baseline]", '[students.n]\nlike = "small"\nmodel = "other"\n[students.b]'
    )
    line = finished.refused(*STUDENT, "--student", "n")
    assert "error: students.n: its tokenizer is not the teacher's: id 70 is " in line


def test_a_missing_model_of_a_student_is_refused(finished: Desk) -> None:
    finished.edit(
        "[students.baseline]", '[students.n]\nlike = "small"\nmodel = "./o"\n[students.b]'
    )
    line = finished.refused(*STUDENT, "--student", "n")
    assert line == "error: students.n.model: no folder ./o"


def test_students_without_a_store_are_refused(desk: Desk) -> None:
    line = desk.refused(*STUDENT)
    assert line == (
        "error: runs/r/logits: no store there; make it first with coldstill teacher-logits r"
    )
    assert "no store there" in desk.refused("evaluate", "r.toml")
    assert "no student is evaluated yet; run coldstill evaluate" in desk.refused(
        "compare", "r.toml"
    )


def test_students_of_an_incomplete_store_are_refused(finished: Desk) -> None:
    shutil.rmtree(finished.run / "students")
    (finished.run / "logits" / "shards" / "00001.json").unlink()
    line = finished.refused(*STUDENT)
    assert re.fullmatch(
        r"error: runs/r/logits: incomplete, \d+ of \d+ shards; finish it with coldstill "
        r"teacher-logits",
        line,
    )
    finished.done(*LOGITS)
    finished.done(*STUDENT)


def test_a_truncated_shard_is_refused(finished: Desk) -> None:
    shutil.rmtree(finished.run / "students")
    shard = finished.run / "logits" / "shards" / "00001.arrow"
    shard.write_bytes(shard.read_bytes()[:-100])
    line = finished.refused(*STUDENT)
    assert "00001.arrow: damaged: " in line
    assert "run coldstill store repair, then teacher-logits again" in line
    assert "00001.arrow: damaged: " in finished.refused(*LOGITS)
    shard.with_suffix(".json").unlink()
    finished.done(*LOGITS)


def test_a_recipe_without_students_is_refused(finished: Desk) -> None:
    text = (finished.root / "r.toml").read_text(encoding="utf-8")
    finished.write("r.toml", text.partition("[students.small]")[0])
    assert finished.refused(*STUDENT) == "error: r: the recipe has no students"


def test_unknown_students_are_refused(finished: Desk) -> None:
    line = finished.refused(*STUDENT, "--student", "smal")
    assert line.startswith("error: r: no student 'smal' (have: small, baseline); ")
    line = finished.refused("evaluate", "r.toml", "--student", "smal")
    assert "student 'smal' is not trained (trained: baseline, small)" in line


@pytest.mark.parametrize(
    ("setting", "said"),
    [
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
    ],
)
def test_a_store_with_other_settings_is_refused(finished: Desk, setting: str, said: str) -> None:
    line = finished.refused(*LOGITS, "--set", setting)
    assert said in line
    assert "another name" in line


def test_a_store_of_another_teacher_is_refused(finished: Desk) -> None:
    other = finished.root / "teacher"
    make_model("llama", 336, seed=1).save_pretrained(other)
    line = finished.refused(*LOGITS)
    assert "runs/r/logits: made differently: teacher.fingerprint: " in line
    make_model("gpt2", 336).save_pretrained(other)
    assert "teacher.family: llama in the store, gpt2 now" in finished.refused(*LOGITS)


def test_a_store_with_another_tokenizer_is_refused(finished: Desk) -> None:
    path = finished.root / "teacher" / "tokenizer.json"
    table = json.loads(path.read_text(encoding="utf-8"))
    table["added_tokens"].append({**table["added_tokens"][0], "id": 320, "content": "<new>"})
    path.write_text(json.dumps(table), encoding="utf-8")
    line = finished.refused(*LOGITS)
    assert "runs/r/corpus: prepared differently: the tokenizer has changed; logits was made" in line


def test_a_store_of_another_corpus_is_refused(desk: Desk) -> None:
    for i, text in enumerate(sentences(30)):
        desk.write(f"texts/{i:02d}.txt", text)
    desk.edit("files = [", 'files = ["texts"] # ')
    desk.done(*LOGITS)
    path = desk.root / "texts" / "07.txt"
    path.write_text("something else", encoding="utf-8")
    said = "runs/r/corpus: prepared differently: the file texts/07.txt has changed; logits was made"
    assert said in desk.refused(*LOGITS)
    path.unlink()
    assert "the file texts/07.txt is gone" in desk.refused(*LOGITS)
    path = desk.write("texts/99.txt", "more")
    assert "the file texts/07.txt is gone" in desk.refused(*LOGITS)


def test_a_new_teacher_in_a_run_of_another_is_refused(finished: Desk) -> None:
    text = (finished.root / "r.toml").read_text(encoding="utf-8")
    made = "architecture = { layers = 1, hidden = 32, heads = 2 }\n"
    made += "tokenizer = { vocabulary = 300 }\ntrain = { steps = 3, batch_tokens = 256 }"
    finished.write("r.toml", text.replace('model = "teacher"', made))
    for command in ("train-teacher", "teacher-logits", "run"):
        line = finished.refused(command, "r.toml")
        assert (
            "teacher.tokenizer asks for a new tokenizer, but logits was made with another" in line
        )


def test_an_impossible_new_teacher_is_refused(desk: Desk) -> None:
    text = (desk.root / "r.toml").read_text(encoding="utf-8")
    made = "architecture = { layers = 1, hidden = 32, heads = 2 }\n"
    made += "tokenizer = { vocabulary = 300 }\ntrain = { steps = 3, batch_tokens = 256 }"
    desk.write("r.toml", re.sub('model = ".*"', made, text))
    many = desk.refused("train-teacher", "r.toml", "--set", "teacher.tokenizer.vocabulary=9999")
    assert re.search(r"the corpus gives only \d+ tokens, expected 9999; set it to at most", many)
    desk.done("train-teacher", "r.toml")
    line = desk.refused("train-teacher", "r.toml", "--set", "teacher.train.steps=4")
    assert "teacher was trained with train.steps = 3, now 4; train another under a new name" in line
    line = desk.refused("train-teacher", "r.toml", "--set", "teacher.tokenizer.vocabulary=310")
    assert "has 300 tokens, the recipe now asks for 310; give this run another name" in line


def test_a_student_trained_with_other_settings_is_refused(finished: Desk) -> None:
    line = finished.refused(*STUDENT, "--set", "students.small.train.steps=4")
    assert line == (
        "error: runs/r/students/small: students.small was trained with student.train.steps = 3, "
        "now 4; train another under a new name (--student NEW), or delete this folder to train it "
        "again"
    )


def test_one_wrong_student_stops_all_before_any_is_trained(finished: Desk) -> None:
    shutil.rmtree(finished.run / "students" / "baseline")
    line = finished.refused(*STUDENT, "--set", "students.small.train.weight_decay=0.2")
    assert "student.train.weight_decay = 0.1, now 0.2" in line
    assert not (finished.run / "students" / "baseline").exists()


def test_a_step_before_its_earlier_step_is_refused(finished: Desk) -> None:
    for path in finished.run.glob("students/*/evaluation.json"):
        path.unlink()
    line = finished.refused("compare", "r.toml")
    assert line == "error: runs/r: no student is evaluated yet; run coldstill evaluate"
    shutil.rmtree(finished.run / "students")
    line = finished.refused("evaluate", "r.toml")
    assert line == "error: runs/r: no student is trained yet; run coldstill train-student"


def test_a_teacher_with_infinite_logits_is_refused(desk: Desk) -> None:
    folder = desk.root / "teacher"
    model = make_model("llama", 336)
    model.lm_head.weight.data[:] = 3e38  # numbers, whose products are none
    model.save_pretrained(folder)
    source = Path(re.findall('model = "(.*)"', (desk.root / "r.toml").read_text())[0])
    for path in source.glob("tokenizer*"):
        shutil.copy(path, folder)
    result = desk.coldstill(*LOGITS, "--set", "teacher.model=teacher")
    assert result.exit_code == 1
    assert re.match(
        r"error: teacher teacher: its logits are not finite at heldout sequence \d+, position \d+,",
        result.stderr.splitlines()[-1],
    )
    assert not list(desk.run.glob("*/shards/*"))


@pytest.mark.parametrize("path", ["nowhere", ".", "runs/r/corpus"])
def test_inspect_refuses_what_is_not_a_store(finished: Desk, path: str) -> None:
    line = finished.refused("inspect", path)
    assert line == (
        f"error: {path}: no manifest.json there, so not a store; a run's stores are its folders "
        "logits and heldout"
    )


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": "coldstill", "version": 99}'])
def test_inspect_refuses_a_damaged_manifest(finished: Desk, content: str) -> None:
    finished.write("runs/r/logits/manifest.json", content)
    line = finished.refused("inspect", "runs/r/logits")
    assert line.startswith("error: runs/r/logits/manifest.json: ")


@pytest.mark.parametrize("room", ["data", "stages", "pipeline", "tests", "data/stores/deep"])
def test_a_run_inside_our_source_is_refused(desk: Desk, room: str) -> None:
    source = Path(coldstill.data.files.__file__).resolve().parent.parent
    before = set((source / room).glob("*"))
    for command in ("plan", "teacher-logits", "train-student"):
        line = desk.refused(command, "r.toml", "--runs", str(source / room))
        assert "inside coldstill's own source" in line
        assert "choose another folder with --runs" in line
    assert set((source / room).glob("*")) == before


def test_names_that_leave_the_folder_are_refused(desk: Desk) -> None:
    for name in ("../up", "a/b", "", ".", "a b"):
        assert "name: string should match pattern" in desk.refused(*LOGITS, "--set", f"name={name}")
    line = desk.refused(*STUDENT, "--student", "../x", "--set", "students.small.train.steps=4")
    assert "'../x'" in line


def test_a_file_as_runs_folder_is_refused(desk: Desk) -> None:
    desk.write("runs", "a file")
    assert "runs" in desk.refused(*LOGITS)


def test_a_store_that_another_process_writes_is_refused(finished: Desk) -> None:
    import fcntl

    (finished.run / "logits" / "shards" / "00001.json").unlink()
    with (finished.run / "logits" / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        line = finished.refused(*LOGITS)
    assert line == "error: runs/r/logits: another process is writing this store; wait for it"


def _fill_disk(monkeypatch: pytest.MonkeyPatch, after: int) -> list[int]:
    """Let the disk take `after` files more."""
    left = [after]
    real = os.fsync

    def fsync(descriptor: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    return left


@pytest.mark.parametrize("after", [0, 1, 5, 20, 40])
def test_a_full_disk_keeps_finished_results_and_the_command_resumes(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    with monkeypatch.context() as patch:
        _fill_disk(patch, after)
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


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"),
        SafetensorError("Error while serializing: No space left on device (os error 28)"),
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "optimizer.pt"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_full_disk_during_a_checkpoint_is_reported(
    finished: Desk, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    shutil.rmtree(finished.run / "students")
    saved: list[Any] = []

    def save(self: Any, *arguments: Any) -> None:
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


def test_a_read_only_folder_is_refused(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "runs")

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert "Permission denied" in desk.refused(*LOGITS)


def test_damaged_figures_are_named(finished: Desk) -> None:
    path = finished.run / "students" / "small" / "evaluation.json"
    path.write_text("{}", encoding="utf-8")
    line = finished.refused("compare", "r.toml")
    assert line.endswith("small/evaluation.json: damaged; delete it and run coldstill evaluate")


def test_a_trainer_argument_that_a_key_sets_is_refused(finished: Desk) -> None:
    line = finished.refused(
        "train-student",
        "r.toml",
        "--student",
        "new",
        "--set",
        "students.small.train.trainer={max_steps=2}",
    )
    assert "train.trainer: 'max_steps' follows from the keys of train itself" in line


def test_a_misspelled_folder_is_not_looked_up_on_a_hub(finished: Desk) -> None:
    (finished.root / "models").mkdir()
    line = finished.refused("teacher-logits", "r.toml", "--set", "teacher.model=models/typo")
    assert line.startswith("error: models/typo: no such folder in ")
