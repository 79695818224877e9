"""Tokens without a row in the teacher's model are refused if needed, otherwise left out."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from checkpoints import save_checkpoint
from coldstill.data.store.reader import open_store
from coldstill.stages.models.loading import load_tokenizer
from conftest import VOCABULARY, make_model

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from desk import Desk

pytest_plugins = ("desk",)


def with_tokens(desk: Desk, tokenizer: Any, add: Callable[[Any], object]) -> Path:
    """A teacher of `VOCABULARY` rows whose tokenizer has more tokens."""
    folder = save_checkpoint(desk.root / "teacher", tokenizer)
    more = load_tokenizer(str(folder), "test")
    add(more)
    more.save_pretrained(folder)
    desk.edit("[teacher]\nmodel = ", '[teacher]\nmodel = "teacher"\n#')
    return folder


@pytest.mark.parametrize(
    ("role", "use"),
    [("pad_token", "sequences are padded with it"), ("eos_token", "texts need it")],
)
def test_a_needed_token_is_refused_before_any_model_is_loaded(
    desk: Desk, tokenizer: Any, role: str, use: str
) -> None:
    with_tokens(desk, tokenizer, lambda more: more.add_special_tokens({role: "[PAD]"}))
    for command in (("plan",), ("plan", "--pilot", "2"), ("teacher-logits",)):
        line = desk.refused(command[0], "r.toml", *command[1:])
        assert line.startswith(
            "error: teacher.model: its tokenizer has the token '[PAD]' at id 320, its model has "
            "320 rows (ids 0 to 319), and "
        )
        assert f"its {role}: {use};" in line


def test_a_role_in_the_tokenizer_s_settings_counts(desk: Desk, tokenizer: Any) -> None:
    folder = with_tokens(desk, tokenizer, lambda _: None)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "pad_token": "<fill>"}))
    for command in ("plan", "teacher-logits"):
        assert "the token '<fill>' at id 320" in desk.refused(command, "r.toml")


def test_a_token_of_the_vocabulary_is_refused(desk: Desk, tokenizer: Any) -> None:
    with_tokens(desk, tokenizer, lambda _: None)
    make_model("llama", VOCABULARY - 10).save_pretrained(desk.root / "teacher")
    for command in ("plan", "teacher-logits"):
        line = desk.refused(command, "r.toml")
        assert "at id 310, its model has 310 rows" in line
        assert "one of its vocabulary" in line


def test_a_token_that_no_text_contains_is_left_out_and_reported(desk: Desk, tokenizer: Any) -> None:
    def add(more: Any) -> None:
        more.add_tokens(["[PAD]"])
        more.add_special_tokens({"extra_special_tokens": ["[MORE]"], "mask_token": "[MASK]"})

    with_tokens(desk, tokenizer, add)
    desk.edit(
        "[students.baseline]",
        '[students.own]\nmodel = "teacher"\ntrain = { steps = 1, batch_tokens = 256 }\n'
        "[students.baseline]",
    )
    plan = desk.done("plan", "r.toml").stdout
    assert "without '[MASK]', '[MORE]', '[PAD]', for which the model has no row" in plan
    output = desk.done("teacher-logits", "r.toml").stderr
    desk.done("train-student", "r.toml", "--student", "small", "--student", "own")
    note = "3 tokens of the tokenizer left out, without a row in the model: "
    assert output.count(note) == 1
    store = open_store(desk.run / "logits")
    assert store.manifest.tokenizer.size == VOCABULARY
    plain = tokenizer.get_vocab()
    for folder in (store.tokenizer_folder(), desk.run / "students" / "own" / "model"):
        assert load_tokenizer(str(folder), "test").get_vocab() == plain
    assert desk.json("students", "small", "model", "config.json")["vocab_size"] == VOCABULARY
    desk.done("export", "r", "small", "--to", "hf", "--to", "gguf-f16")


@pytest.mark.parametrize("place", ["text", "separator"])
def test_a_token_that_a_text_contains_is_refused(desk: Desk, tokenizer: Any, place: str) -> None:
    with_tokens(desk, tokenizer, lambda more: more.add_tokens(["[PAD]"]))
    desk.write("texts/a.txt", "some text" + " [PAD]" * (place == "text"))
    desk.write("texts/b.txt", "other text")
    desk.edit("files = [", 'files = ["texts", ')
    if place == "separator":
        desk.edit("holdout", 'separator = "[PAD]"\nholdout')
    where = "texts/a.txt" if place == "text" else "corpus.separator"
    for command in ("plan", "teacher-logits"):
        line = desk.refused(command, "r.toml")
        assert line.startswith(f"error: {where}: contains the token '[PAD]', which the tokenizer")


def test_rows_with_such_a_token_are_skipped_and_counted_with_bad_rows_skip(
    desk: Desk, tokenizer: Any
) -> None:
    with_tokens(desk, tokenizer, lambda more: more.add_tokens(["[PAD]"]))
    desk.write("texts/a.txt", "some text [PAD]")
    desk.write("texts/b.txt", "other text")
    desk.edit("files = [", 'files = ["texts", ')
    for command in ("plan", "teacher-logits"):
        line = desk.refused(command, "r.toml")
        assert line.endswith('or skip such rows with corpus.bad_rows = "skip"')
    desk.edit("holdout", 'bad_rows = "skip"\nholdout')
    desk.done("plan", "r.toml")
    output = desk.done("teacher-logits", "r.toml").stderr
    assert "; 1 rows with a token that the model has no row for skipped" in output
    assert desk.json("corpus", "corpus.json")["counts"]["rowless_tokens"] == 1
