"""`plan` and `run` refuse models that will not load before they load the teacher."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from checkpoints import configure, renamed, save_checkpoint
from coldstill.pipeline.planning.checks import _is_unusual
from conftest import VOCABULARY, make_model

if TYPE_CHECKING:
    from pathlib import Path

    from desk import Desk

pytest_plugins = ("desk",)

_OWN = '[students.own]\nmodel = "base"\ntrain = { steps = 1, batch_tokens = 256 }\n'

LOST = {
    "compiled": (lambda key: f"_orig_mod.{key}", "carry '_orig_mod.'"),
    "renamed": (lambda key: f"student.{key}", "carry 'student.'"),
    "a layer": (lambda key: None if ".layers.1." in key else key, "the file lacks layer 1"),
    "a tensor": (lambda key: None if "1.mlp.up_proj" in key else key, "would be random numbers"),
    "the head": (lambda key: None if "lm_head" in key else key, "the head is neither"),
}


def with_student(desk: Desk) -> None:
    """Add a student that starts from the model in `base`."""
    desk.edit("[students.baseline]", f"{_OWN}[students.baseline]")


@pytest.mark.parametrize("what", LOST)
def test_a_plan_refuses_weights_that_do_not_fit_the_checkpoint(
    desk: Desk, tokenizer: Any, what: str
) -> None:
    rename, reason = LOST[what]
    save_checkpoint(desk.root / "base", tokenizer, renamed(rename))
    with_student(desk)
    line = desk.refused("plan", "r.toml")
    assert line.startswith("error: students.own.model: the weights in ")
    assert reason in line
    desk.edit('model = "base"\n', 'model = "none"\n')
    desk.edit("[teacher]\nmodel = ", '[teacher]\nmodel = "base"\n#')
    line = desk.refused("plan", "r.toml")
    assert line.startswith("error: teacher.model: the weights in ")
    assert reason in line


@pytest.mark.parametrize("command", ["plan", "run"])
def test_a_student_s_weights_code_and_tokens_are_checked_before_the_teacher_runs(
    desk: Desk, tokenizer: Any, command: str
) -> None:
    base = save_checkpoint(desk.root / "base", tokenizer, tie_word_embeddings=False)
    (base / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with_student(desk)
    assert "is a pointer of Git LFS" in desk.refused(command, "r.toml")
    save_checkpoint(base, tokenizer)
    own = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    configure(base, model_type="own", auto_map=own)
    line = desk.refused(command, "r.toml")
    assert line.endswith("allow it with students.own.trust_remote_code = true")
    make_model("llama", VOCABULARY - 10).save_pretrained(base)
    line = desk.refused(command, "r.toml")
    assert line.startswith("error: students.own.model: its tokenizer has the token ")
    assert "at id 310, its model has 310 rows" in line
    assert not (desk.run / "logits").exists()


def test_a_plan_refuses_an_index_with_missing_files(desk: Desk, tokenizer: Any) -> None:
    base = save_checkpoint(desk.root / "base", tokenizer)
    (base / "model.safetensors").rename(base / "model-1.safetensors")
    names = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with_student(desk)
    assert "1 of them missing (model-2.safetensors)" in desk.refused("plan", "r.toml")


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2"])
def test_a_plain_model_is_checked_without_transformers(
    tokenizer: Any, tmp_path: Path, family: str
) -> None:
    save_checkpoint(tmp_path, tokenizer, family=family)
    assert _is_unusual(tmp_path, own_code=False) is False
    for weights in tmp_path.glob("*.safetensors"):
        weights.unlink()  # they may be on the machine that captures
    assert _is_unusual(tmp_path, own_code=False) is False


@pytest.mark.parametrize("family", ["rwkv", "bloom"])
def test_a_student_that_cannot_learn_from_a_packed_store_is_refused_before_capture(
    desk: Desk, family: str
) -> None:
    sizes = "layers = 1, hidden = 32, heads = 2, feed_forward = 128"
    desk.edit(
        "[students.baseline]",
        f'[students.own]\narchitecture = {{ family = "{family}", {sizes} }}\n'
        "train = { steps = 1, batch_tokens = 256 }\n[students.baseline]",
    )
    for command in ("plan", "run"):
        line = desk.refused(command, "r.toml")
        assert line.startswith(
            f"error: students.own: a {family!r} model cannot keep packed documents apart, so"
        )
        assert "set corpus.pack = false" in line
    desk.done("plan", "r.toml", "--set", "corpus.pack=false")
