"""Python code that a model brings runs only where the recipe allows it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from checkpoints import configure, save_checkpoint
from coldstill.pipeline.recipe.reading import load_recipe

if TYPE_CHECKING:
    from pathlib import Path

    from desk import Desk

pytest_plugins = ("desk",)

CODE = """\
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM

Path({ran!r}).touch()


class OddConfig(LlamaConfig):
    model_type = "odd"


class OddModel(LlamaForCausalLM):
    config_class = OddConfig
"""
MAP = {"AutoConfig": "modeling_odd.OddConfig", "AutoModelForCausalLM": "modeling_odd.OddModel"}
TRAIN = "train = { steps = 1, batch_tokens = 256 }"


@pytest.fixture
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """There once the model's own code has run."""
    return tmp_path_factory.mktemp("own") / "ran"


@pytest.fixture
def odd(desk: Desk, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, ran: Path) -> Desk:
    """A desk whose teacher has a class of its own."""

    def asked(*_: Any) -> str:
        raise AssertionError("a question on the terminal")

    monkeypatch.setattr("builtins.input", asked)
    folder = save_checkpoint(desk.root / "odd", tokenizer)
    configure(folder, model_type="odd", architectures=["OddModel"], auto_map=MAP)
    desk.write("odd/modeling_odd.py", CODE.format(ran=str(ran)))
    desk.edit("[teacher]\nmodel = ", '[teacher]\nmodel = "odd"\n#')
    return desk


def test_model_code_never_runs_unless_it_is_allowed(odd: Desk, ran: Path) -> None:
    line = odd.refused("teacher-logits", "r.toml")
    assert line.startswith("error: teacher.model: ")
    assert "brings its own code (modeling_odd.py)" in line
    assert line.endswith("allow it with teacher.trust_remote_code = true")
    odd.edit("[logits]", "train = { steps = 1 }\n[logits]")
    assert odd.refused("train-teacher", "r.toml") == line
    assert not ran.exists()


def test_a_model_that_transformers_knows_needs_no_code(odd: Desk, ran: Path) -> None:
    configure(odd.root / "odd", model_type="llama", architectures=["LlamaForCausalLM"])
    odd.done("teacher-logits", "r.toml")
    assert not ran.exists()
    assert "trust_remote_code" not in odd.json("logits", "manifest.json")["teacher"]


def test_allowed_code_runs_from_the_capture_to_the_export(odd: Desk) -> None:
    odd.edit("[logits]", "trust_remote_code = true\n[logits]")
    odd.edit(
        "[students.baseline]",
        f'[students.half]\nlayers = [0]\n{TRAIN}\n[students.own]\nmodel = "odd"\n{TRAIN}\n'
        "[students.baseline]",
    )
    odd.done("teacher-logits", "r.toml")
    assert odd.json("logits", "manifest.json")["teacher"]["trust_remote_code"] is True
    assert odd.json("logits", "manifest.json")["teacher"]["family"] == "odd"
    refused = odd.refused("train-student", "r.toml", "--student", "own")
    assert refused.endswith("allow it with students.own.trust_remote_code = true")
    odd.edit('model = "odd"\ntrain', 'model = "odd"\ntrust_remote_code = true\ntrain')
    names = ("--student", "half", "--student", "own")
    odd.done("train-student", "r.toml", *names)
    odd.done("evaluate", "r.toml", *names)
    # the permission says nothing of how it was trained
    assert "trust_remote_code" not in json.dumps(odd.json("students", "own", "student.json"))
    odd.done("export", "r", "half", "--to", "hf")
    odd.done("report", "r.toml")
    odd.edit("trust_remote_code = true\n[logits]", "[logits]")
    assert "teacher.trust_remote_code = true" in odd.refused("teacher-logits", "r.toml")


def test_other_code_is_another_teacher(odd: Desk) -> None:
    odd.edit("[logits]", "trust_remote_code = true\n[logits]")
    odd.done("teacher-logits", "r.toml")
    with (odd.root / "odd" / "modeling_odd.py").open("a") as stream:
        stream.write("# changed\n")
    assert "teacher.fingerprint" in odd.refused("teacher-logits", "r.toml")


def test_code_of_a_tokenizer_needs_permission_too(odd: Desk) -> None:
    configure(odd.root / "odd", model_type="llama", architectures=["LlamaForCausalLM"], auto_map={})
    path = odd.root / "odd" / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    own = {"tokenizer_class": "Odd", "auto_map": {"AutoTokenizer": [None, "tokens_odd.Odd"]}}
    path.write_text(json.dumps({**settings, **own}))
    odd.write(
        "odd/tokens_odd.py",
        "from transformers import PreTrainedTokenizerFast\n\n\n"
        "class Odd(PreTrainedTokenizerFast):\n    pass\n",
    )
    configure(odd.root / "odd", model_type="odd", auto_map=MAP)
    assert "brings its own code" in odd.refused("teacher-logits", "r.toml")
    odd.edit("[logits]", "trust_remote_code = true\n[logits]")
    odd.done("teacher-logits", "r.toml")
    # what lies in the store loads without it
    stored = odd.json("logits", "tokenizer", "tokenizer_config.json")
    assert "auto_map" not in stored
    odd.done("train-student", "r.toml", "--student", "small")


def test_the_permission_belongs_to_one_model(desk: Desk) -> None:
    desk.edit("[students.small]", "[students.small]\ntrust_remote_code = true")
    line = desk.refused("plan", "r.toml")
    assert "students.small: has 'trust_remote_code' without 'model'" in line
    desk.edit("trust_remote_code = true", "")
    train = "train = { steps = 1, batch_tokens = 256 }"
    desk.edit(
        "[students.baseline]",
        f'[students.a]\nmodel = "a"\ntrust_remote_code = true\n{train}\n'
        '[students.b]\nlike = "a"\nmodel = "b"\n[students.c]\nlike = "a"\n[students.baseline]',
    )
    recipe = load_recipe(str(desk.root / "r.toml"), (), None, desk.root / "runs").recipe
    trusted = {name: recipe.trusts(name) for name in ("a", "b", "c", "small")}
    assert trusted == {"a": True, "b": False, "c": True, "small": False}
