"""Students with other tokens that learn from chats, on the command line."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from coldstill.data.store.reader import open_store
from coldstill.stages.models.loading import load_tokenizer
from conftest import VOCABULARY, make_model
from other_tokens import PAIRS, model_of
from spellings import byte_pairs, saved

if TYPE_CHECKING:
    from pathlib import Path

    from desk import Desk

pytest_plugins = ("desk",)

TURN, STOP = "<|turn|>", "<|stop|>"
TEMPLATE = (
    f"{{% for m in messages %}}{TURN}{{{{ m.role }}}}: {{{{ m.content }}}}{STOP}{{% endfor %}}"
    f"{{% if add_generation_prompt %}}{TURN}assistant:{{% endif %}}"
)
CHATS = [
    [
        {"role": "user", "content": f"{word} teacher"},
        {"role": "assistant", "content": f"the {word} student"},
    ]
    for word in "abcdefghijklmnopqrst"
]
RECIPE = """\
name = "r"
[corpus]
files = ["chats.jsonl"]
sequence_length = 64
holdout = 0.2
[teacher]
model = "teacher"
[logits]
head = 2
tail = 2
[evaluation]
head = 8
tail = 2
[students.a]
model = "other"
objective = { kl = 0.5, cross_entropy = 0.5 }
train = { steps = 2, batch_tokens = 256 }
[students.b]
like = "a"
model = "same"
"""
SPECIAL = f'retokenize = {{ special = {{ "{TURN}" = "[T]" }} }}'


@pytest.fixture
def chatting(make_desk: type[Desk], tmp_path: Path, tokenizer_folder: Path) -> Desk:
    """A desk with a teacher of chats, and two students of the same tokens, which end otherwise."""
    desk = make_desk(tmp_path)
    tokenizer = load_tokenizer(str(tokenizer_folder), "test")
    tokenizer.add_special_tokens({"additional_special_tokens": [TURN, STOP]})
    tokenizer.eos_token = STOP
    tokenizer.chat_template = TEMPLATE
    make_model("llama", VOCABULARY + 16).save_pretrained(desk.root / "teacher")
    tokenizer.save_pretrained(desk.root / "teacher")
    for name, end in (("other", "</s>"), ("same", "[E]")):
        made: Any = byte_pairs(PAIRS, end="</s>", extra=["[E]", "[T]"])
        model_of(desk.root / name, made, "</s>")
        saved(desk.root / name, made, end=end)
        (desk.root / name / "chat_template.jinja").write_text("{{ 'its own' }}")
    rows = [json.dumps({"messages": chat}) for chat in CHATS]
    desk.write("chats.jsonl", "\n".join(rows))
    desk.write("r.toml", RECIPE)
    return desk


def test_a_special_token_without_a_counterpart_is_found_before_the_teacher_works(
    chatting: Desk,
) -> None:
    for command in ("plan", "teacher-logits", "run"):
        line = chatting.refused(command, "r.toml")
        assert line.startswith(
            f"error: students.a.retokenize: the teacher's chat template writes {TURN}, and the"
        )
        assert line.endswith(f'special = {{ "{TURN}" = TEXT }}')


@pytest.mark.slow
def test_a_student_of_chats_has_the_template_that_it_learned(chatting: Desk) -> None:
    chatting.edit("train = {", f"{SPECIAL}\ntrain = {{")
    positions = json.loads(chatting.done("plan", "r.toml", "--json").stdout)["tokens"][0]["stores"]
    chatting.done("teacher-logits", "r.toml")
    kept = ("--set", "students.a.retokenize={}")
    before = chatting.snapshot()
    line = chatting.coldstill("train-student", "r.toml", "--student", "a", *kept).stderr
    assert f"the special token '{TURN}' has no counterpart" in line
    assert chatting.snapshot() == before
    assert not (chatting.run / "tokens").exists()
    output = chatting.done("train-student", "r.toml").stderr
    note = (
        "retokenize logits: the store has chats, so the tokenizer of students.a now has the chat "
        "template of the teacher, with special tokens of its own"
    )
    assert output.splitlines().count(note) == 1
    chatting.done("evaluate", "r.toml")
    chatting.done("export", "r.toml", "a", "--to", "hf")
    folders = sorted((chatting.run / "tokens").iterdir())
    assert len(folders) == 2  # the students' turns end differently
    exported = chatting.run / "students/a/exports/hf"
    for name, model, end in (
        ("a", exported, "</s>"),
        ("b", chatting.run / "students/b/model", "[E]"),
    ):
        tokenizer = load_tokenizer(str(model), name)
        assert tokenizer.eos_token == end
        key = chatting.json("students", name, "student.json")["tokens"]
        assert key["spelling"]
        written = {
            tuple(tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False))
            for chat in CHATS
        }
        settings = json.loads((model / "generation_config.json").read_bytes())
        assert tokenizer.convert_tokens_to_ids(end) in (
            [settings["eos_token_id"]]
            if isinstance(settings["eos_token_id"], int)
            else settings["eos_token_id"]
        )
        learned = []
        for folder in folders:
            store = open_store(folder / "logits")
            if load_tokenizer(str(folder / "logits/tokenizer"), name).eos_token != end:
                continue
            sequences = store.read(np.arange(len(store))).sequences
            for tokens, starts in zip(sequences.tokens, sequences.document_starts, strict=True):
                ends = [*starts[1:].tolist(), len(tokens)]
                pairs = zip(starts.tolist(), ends, strict=True)
                learned += [tuple(tokens[begin:last].tolist()) for begin, last in pairs]
            counted = store.positions
        assert len(learned) > 10
        assert {*learned} <= written
    assert positions["train"]["positions"] == pytest.approx(counted, rel=0.02)
