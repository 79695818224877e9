"""A student stops where its documents and its turns ended, in every export."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from chats import TEMPLATE
from coldstill.stages.models.loading import load_model, load_tokenizer
from conftest import VOCABULARY, make_model

if TYPE_CHECKING:
    from pathlib import Path

    from desk import Desk

pytestmark = pytest.mark.slow

pytest_plugins = ("desk",)

STOP = "<|stop|>"
"""A token that is not the tokenizer's end of text."""
RECIPE = """\
name = "r"
[corpus]
files = ["texts.jsonl"]
sequence_length = 24
holdout = 0.2
{corpus}
[teacher]
model = "teacher"
[logits]
head = 2
tail = 2
[evaluation]
sequences = 4
[students.small]
{origin}
objective = {{ kl = 0.0, cross_entropy = 1.0 }}
train = {{ steps = 40, batch_tokens = 240, learning_rate = 2e-2 }}
"""
NEW = "architecture = { layers = 1, hidden = 32, heads = 2 }"
TEXTS = [{"text": f"{word} student"} for word in "abcdefghijklmnopqrst"]
CHATS = [
    {"messages": [{"role": "user", "content": row["text"]}, {"role": "assistant", "content": "a"}]}
    for row in TEXTS
]


def laid_out(
    desk: Desk, tokenizer_folder: Path, rows: list[Any], *, origin: str = NEW, corpus: str = ""
) -> Any:
    """A teacher whose tokenizer has `STOP`, with turns that end with it, and a recipe."""
    tokenizer = load_tokenizer(str(tokenizer_folder), "test")
    tokenizer.add_special_tokens({"additional_special_tokens": [STOP]})
    tokenizer.chat_template = TEMPLATE.replace("<|endoftext|>", STOP)
    make_model("llama", VOCABULARY + 16).save_pretrained(desk.root / "teacher")
    tokenizer.save_pretrained(desk.root / "teacher")
    desk.write("texts.jsonl", "\n".join(json.dumps(row) for row in rows))
    desk.write("r.toml", RECIPE.format(origin=origin, corpus=corpus))
    return tokenizer


@pytest.fixture(scope="module")
def stopping(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> tuple[Desk, str]:
    """A desk with a student of documents that end with `STOP`, exported; and the output."""
    from desk import Desk

    desk = Desk(tmp_path_factory.mktemp("stopping"))
    laid_out(desk, tokenizer_folder, TEXTS, corpus=f'separator = "{STOP}"')
    output = desk.done("teacher-logits", "r.toml").stderr
    output += desk.done("train-student", "r.toml").stderr
    formats = [f"--to={name}" for name in ("hf", "onnx", "gguf-f16")]
    output += desk.done("export", "r.toml", "small", *formats).stderr
    return desk, output


def endings(folder: Path, prompts: list[str] | None = None) -> list[list[int]]:
    """The tokens that transformers generates after each prompt with the folder's settings."""
    model, tokenizer = load_model(str(folder), "test", precision="fp32"), None
    tokenizer = load_tokenizer(str(folder), "test")
    torch.manual_seed(0)
    found = []
    for prompt in prompts or [row["text"][:5] for row in TEXTS[:6]]:
        ids = torch.tensor([tokenizer(prompt).input_ids])
        written = model.generate(ids, max_new_tokens=48, do_sample=True)
        found.append(written[0, ids.shape[1] :].tolist())
    return found


def test_a_new_student_stops_where_its_documents_ended(stopping: tuple[Desk, str]) -> None:
    desk, output = stopping
    stop = VOCABULARY
    folder = desk.run / "students/small"
    for model in (folder / "model", folder / "exports/hf"):
        for name in ("generation_config.json", "config.json"):
            settings = json.loads((model / name).read_text(encoding="utf-8"))
            assert settings["eos_token_id"] == [stop, 0], (model, name)
        written = endings(model)
        assert all(stop not in ids[:-1] for ids in written)
        assert sum(ids[-1] == stop for ids in written) >= 5
    note = f"train-student small: texts end with '{STOP}' ({stop}): the model stops there"
    assert output.splitlines().count(note) == 1


def test_every_export_stops_at_the_end_token(
    stopping: tuple[Desk, str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    desk = stopping[0]
    folder = desk.run / "students/small/exports/onnx"
    page = (folder / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    with contextlib.chdir(folder):
        exec(compile(code.replace('"Once"', '"a stu"'), "README.md", "exec"), {})
    written = capsys.readouterr().out.strip()
    assert written.endswith(STOP)
    assert written.count(STOP) == 1
    settings = json.loads((folder / "generation_config.json").read_bytes())
    assert settings["eos_token_id"] == [VOCABULARY, 0]
    # an older student is exported with the ends of its held-out texts
    path = desk.run / "students/small/model/generation_config.json"
    whole = path.read_text(encoding="utf-8")
    path.write_text(json.dumps({**json.loads(whole), "eos_token_id": 0}), encoding="utf-8")
    desk.done("export", "r.toml", "small", "--to", "hf", "--output", str(tmp_path / "out"))
    path.write_text(whole, encoding="utf-8")
    settings = json.loads((tmp_path / "out/hf/generation_config.json").read_bytes())
    assert settings["eos_token_id"] == [VOCABULARY, 0]
    gguf = pytest.importorskip("gguf")
    (path,) = (desk.run / "students/small/exports/gguf-f16").glob("*.gguf")
    fields = gguf.GGUFReader(path).fields
    # its template does not use the end of text, so that is no longer the first of them
    found = {name: fields[f"tokenizer.ggml.{name}_token_id"].contents() for name in ("eos", "eot")}
    assert found == {"eos": VOCABULARY, "eot": 0}


@pytest.mark.llama_cpp
def test_llama_cpp_stops_at_the_end_token(stopping: tuple[Desk, str]) -> None:
    folder = stopping[0].run / "students/small/exports/gguf-f16"
    page = (folder / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    for ours, wanted in (
        ('"Once"', '"a stu"'),
        ("max_tokens=50", "max_tokens=50, temperature=0"),
        ('["text"]', '["finish_reason"]'),
    ):
        assert ours in code
        code = code.replace(ours, wanted)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True
    )
    assert done.stdout == "a stustop\n"


ORIGINS = {
    "small": NEW,
    "other": 'model = "own"',
    "pruned": "prune = { layers = 1, sequences = 2 }",
    "layered": "layers = [0]",
    "adapted": 'model = "own"\nlora = { rank = 2 }',
}
"""Origins of students by name."""


def test_students_of_chats_stop_after_their_turns_and_keep_their_own_ends(
    make_desk: type[Desk], tmp_path: Path, tokenizer_folder: Path
) -> None:
    desk = make_desk(tmp_path)
    tokenizer = laid_out(desk, tokenizer_folder, [*CHATS, *TEXTS[:3]])
    students = [
        f'[students.{name}]\nlike = "small"\n{origin}\n'
        for name, origin in ORIGINS.items()
        if name != "small"
    ]
    desk.write("r.toml", (desk.root / "r.toml").read_text() + "".join(students))
    for folder in ("teacher", "own"):
        model = make_model("llama", VOCABULARY + 16)
        model.generation_config.eos_token_id = model.config.eos_token_id = [5, 6]
        model.save_pretrained(desk.root / folder)
        tokenizer.save_pretrained(desk.root / folder)
    desk.done("teacher-logits", "r.toml")
    steps = [f"--set=students.{name}.train.steps=1" for name in ORIGINS]
    desk.done("train-student", "r.toml", *steps)
    for name in ORIGINS:
        saved = desk.json(f"students/{name}/model/generation_config.json")["eos_token_id"]
        assert saved[0] == VOCABULARY  # of most texts
        assert set(saved) == {VOCABULARY, 0, *([] if name == "small" else [5, 6])}, name


def test_a_student_of_documents_without_end_tokens_is_reported(
    make_desk: type[Desk], tmp_path: Path, tokenizer_folder: Path
) -> None:
    desk = make_desk(tmp_path)
    rows = [{"text": row["text"] + " learns"} for row in TEXTS]
    laid_out(desk, tokenizer_folder, rows, corpus='separator = " student"')
    desk.done("teacher-logits", "r.toml")
    output = desk.done("train-student", "r.toml", "--set", "students.small.train.steps=1").stderr
    assert "warning: its documents end with ' student', which " in output
    assert desk.json("students/small/model/generation_config.json")["eos_token_id"] == 0
    desk.done("export", "r.toml", "small", "--to", "hf")
    page = (desk.run / "students/small/exports/hf/README.md").read_text(encoding="utf-8")
    assert "its documents end with ' student'" in page


def test_a_teacher_that_is_trained_here_stops_where_its_documents_ended(desk: Desk) -> None:
    recipe = (desk.root / "r.toml").read_text(encoding="utf-8")
    model = re.search(r'model = ".*"', recipe)
    assert model is not None
    desk.edit(model[0], model[0] + "\ntrain = { steps = 1, batch_tokens = 64 }")
    desk.edit("[teacher]", 'separator = "~"\n[teacher]')
    output = desk.done("train-teacher", "r.toml").stderr
    assert re.search(r"train-teacher: texts end with '~' \(\d+\): the model stops there", output)
    saved = desk.json("teacher/model/generation_config.json")["eos_token_id"]
    assert load_tokenizer(str(desk.run / "teacher/model"), "test").decode(saved[0]) == "~"
