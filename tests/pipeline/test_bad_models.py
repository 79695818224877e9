"""Models with wrong weights, own code or missing token rows are refused before any work."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from checkpoints import configure, renamed, save_checkpoint
from coldstill.data.store.reader import open_store
from coldstill.pipeline.planning.checks import _is_unusual
from coldstill.pipeline.recipe.reading import load_recipe
from coldstill.stages.models.loading import load_tokenizer
from conftest import VOCABULARY, make_model

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from desk import Desk

pytest_plugins = ("desk",)

TRAIN = "train = { steps = 1, batch_tokens = 256 }"
COMPILED = renamed(lambda key: f"_orig_mod.{key}")
LOST = {
    "compiled": (lambda key: f"_orig_mod.{key}", "the names in the file carry '_orig_mod.'"),
    "renamed": (lambda key: f"student.{key}", "carry 'student.'"),
    "a layer": (lambda key: None if ".layers.1." in key else key, "the file lacks layer 1"),
    "a tensor": (lambda key: None if "1.mlp.up_proj" in key else key, "would be random numbers"),
    "the head": (lambda key: None if "lm_head" in key else key, "the head is neither"),
}


def add_student(desk: Desk, origin: str = 'model = "base"', name: str = "own") -> None:
    """Add a student to the recipe."""
    desk.edit("[students.baseline]", f"[students.{name}]\n{origin}\n{TRAIN}\n[students.baseline]")


def use_teacher(desk: Desk, folder: str = "teacher") -> None:
    """Make a folder the teacher."""
    desk.edit("[teacher]\nmodel = ", f'[teacher]\nmodel = "{folder}"\n#')


@pytest.mark.slow
@pytest.mark.parametrize("what", LOST)
def test_a_plan_refuses_weights_that_do_not_fit_the_checkpoint(
    desk: Desk, tokenizer: Any, what: str
) -> None:
    rename, reason = LOST[what]
    save_checkpoint(desk.root / "base", tokenizer, renamed(rename))
    add_student(desk)
    line = desk.refused("plan", "r.toml")
    assert line.startswith("error: students.own.model: the weights in ")
    assert reason in line
    desk.edit('model = "base"\n', 'model = "none"\n')
    use_teacher(desk, "base")
    line = desk.refused("plan", "r.toml")
    assert line.startswith("error: teacher.model: the weights in ")
    assert reason in line


def test_weights_of_a_compiled_teacher_stop_every_command(desk: Desk, tokenizer: Any) -> None:
    save_checkpoint(desk.root / "teacher", tokenizer, COMPILED)
    use_teacher(desk)
    line = desk.refused("teacher-logits", "r.toml")
    assert line.startswith("error: teacher.model: the weights in ")
    assert "torch.compile" in line
    assert desk.refused("plan", "r.toml", "--pilot", "2") == line
    correcting = ("--set", "teacher.train.steps=2")
    assert desk.refused("train-teacher", "r.toml", *correcting) == line


@pytest.mark.slow
def test_weights_of_a_student_are_checked_by_every_command(finished: Desk, tokenizer: Any) -> None:
    save_checkpoint(finished.root / "base", tokenizer, COMPILED)
    add_student(finished)
    line = finished.refused("train-student", "r.toml", "--student", "own")
    assert line.startswith("error: students.own.model: the weights in ")
    # the file of a trained student was replaced by another
    save_checkpoint(finished.run / "students" / "small" / "model", tokenizer, COMPILED)
    for command in (("evaluate", "r.toml"), ("export", "r", "small", "--to", "hf")):
        line = finished.refused(*command)
        assert line.startswith("error: students.small: the weights in runs/r/students/small/model ")


@pytest.mark.parametrize("command", ["plan", "run"])
def test_a_student_s_weights_code_and_tokens_are_checked_before_the_teacher_runs(
    desk: Desk, tokenizer: Any, command: str
) -> None:
    base = save_checkpoint(desk.root / "base", tokenizer, tie_word_embeddings=False)
    pointer = b"version https://git-lfs.github.com/spec/v1\n"
    (base / "model.safetensors").write_bytes(pointer)
    add_student(desk)
    assert "is a pointer of Git LFS" in desk.refused(command, "r.toml")
    save_checkpoint(base, tokenizer)
    (base / "model.safetensors").rename(base / "model-1.safetensors")
    names = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    assert "1 of them missing (model-2.safetensors)" in desk.refused(command, "r.toml")
    (base / "model.safetensors.index.json").unlink()
    (base / "model-1.safetensors").rename(base / "model.safetensors")
    own = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    configure(base, model_type="own", auto_map=own)
    line = desk.refused(command, "r.toml")
    assert line.endswith("allow it with students.own.trust_remote_code = true")
    make_model("llama", VOCABULARY - 10).save_pretrained(base)
    line = desk.refused(command, "r.toml")
    assert line.startswith("error: students.own.model: its tokenizer has the token ")
    assert "at id 310, its model has 310 rows" in line


def test_a_plain_model_is_checked_without_transformers(tokenizer: Any, tmp_path: Path) -> None:
    for family in ("llama", "llama-tied", "gpt2"):
        folder = save_checkpoint(tmp_path / family, tokenizer, family=family)
        assert _is_unusual(folder, own_code=False) is False
        for weights in folder.glob("*.safetensors"):
            weights.unlink()  # they may be on the machine that captures
        assert _is_unusual(folder, own_code=False) is False


@pytest.mark.parametrize("family", ["rwkv", "bloom"])
def test_a_student_that_cannot_learn_from_a_packed_store_is_refused_before_capture(
    desk: Desk, family: str
) -> None:
    sizes = "layers = 1, hidden = 32, heads = 2, feed_forward = 128"
    add_student(desk, f'architecture = {{ family = "{family}", {sizes} }}')
    for command in ("plan", "run"):
        line = desk.refused(command, "r.toml")
        assert line.startswith(
            f"error: students.own: a {family!r} model cannot keep packed documents apart, so"
        )
        assert "set corpus.pack = false" in line
    desk.done("plan", "r.toml", "--set", "corpus.pack=false")


def with_tokens(desk: Desk, tokenizer: Any, add: Callable[[Any], object]) -> Path:
    """A teacher of `VOCABULARY` rows whose tokenizer has more tokens."""
    folder = save_checkpoint(desk.root / "teacher", tokenizer)
    more = load_tokenizer(str(folder), "test")
    add(more)
    more.save_pretrained(folder)
    use_teacher(desk)
    return folder


@pytest.mark.parametrize(
    ("role", "use"),
    [("pad_token", "sequences are padded with it"), ("eos_token", "texts need it")],
)
def test_a_needed_token_without_a_row_is_refused(
    desk: Desk, tokenizer: Any, role: str, use: str
) -> None:
    folder = with_tokens(desk, tokenizer, lambda more: more.add_special_tokens({role: "[PAD]"}))
    for command in (("plan",), ("plan", "--pilot", "2"), ("teacher-logits",)):
        line = desk.refused(command[0], "r.toml", *command[1:])
        assert line.startswith(
            "error: teacher.model: its tokenizer has the token '[PAD]' at id 320, its model has "
            "320 rows (ids 0 to 319), and "
        )
        assert f"its {role}: {use};" in line
    make_model("llama", VOCABULARY - 10).save_pretrained(folder)
    for command in (("plan",), ("teacher-logits",)):
        line = desk.refused(command[0], "r.toml")
        assert "at id 310, its model has 310 rows" in line
        assert "one of its vocabulary" in line


def test_a_role_in_the_tokenizer_s_settings_counts(desk: Desk, tokenizer: Any) -> None:
    path = with_tokens(desk, tokenizer, lambda _: None) / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "pad_token": "<fill>"}))
    for command in ("plan", "teacher-logits"):
        assert "the token '<fill>' at id 320" in desk.refused(command, "r.toml")


@pytest.mark.slow
def test_a_token_that_no_text_contains_is_left_out_and_reported(desk: Desk, tokenizer: Any) -> None:
    def add(more: Any) -> None:
        more.add_tokens(["[PAD]"])
        more.add_special_tokens({"extra_special_tokens": ["[MORE]"], "mask_token": "[MASK]"})

    with_tokens(desk, tokenizer, add)
    add_student(desk, 'model = "teacher"')
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


@pytest.mark.slow
def test_a_text_with_a_token_without_a_row_is_refused_or_skipped(
    desk: Desk, tokenizer: Any
) -> None:
    with_tokens(desk, tokenizer, lambda more: more.add_tokens(["[PAD]"]))
    desk.write("texts/a.txt", "some text [PAD]")
    desk.write("texts/b.txt", "other text")
    for command in ("plan", "teacher-logits"):
        line = desk.refused(command, "r.toml", "--set", 'corpus.separator="[PAD]"')
        assert line.startswith("error: corpus.separator: contains the token '[PAD]', for which ")
    desk.edit("files = [", 'files = ["texts", ')
    for command in ("plan", "teacher-logits"):
        line = desk.refused(command, "r.toml")
        assert line.startswith("error: texts/a.txt: contains the token '[PAD]', for which ")
        assert line.endswith('or skip such rows with corpus.bad_rows = "skip"')
    desk.edit("holdout", 'bad_rows = "skip"\nholdout')
    desk.done("plan", "r.toml")
    output = desk.done("teacher-logits", "r.toml").stderr
    assert "; 1 rows with a token that the model has no row for skipped" in output
    assert desk.json("corpus", "corpus.json")["counts"]["rowless_tokens"] == 1


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
PLAIN = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}


@pytest.fixture
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that the model's own code writes when it runs."""
    return tmp_path_factory.mktemp("own") / "ran"


@pytest.fixture
def odd(desk: Desk, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, ran: Path) -> Desk:
    """A desk whose teacher brings its own class."""

    def ask(*_: Any) -> str:
        raise AssertionError("a question on the terminal")

    monkeypatch.setattr("builtins.input", ask)
    folder = save_checkpoint(desk.root / "odd", tokenizer)
    configure(folder, model_type="odd", architectures=["OddModel"], auto_map=MAP)
    desk.write("odd/modeling_odd.py", CODE.format(ran=str(ran)))
    use_teacher(desk, "odd")
    return desk


@pytest.mark.slow
def test_model_code_never_runs_unless_it_is_allowed(odd: Desk, ran: Path) -> None:
    line = odd.refused("teacher-logits", "r.toml")
    assert line.startswith("error: teacher.model: ")
    assert "brings its own code (modeling_odd.py)" in line
    assert line.endswith("allow it with teacher.trust_remote_code = true")
    assert odd.refused("train-teacher", "r.toml", "--set", "teacher.train.steps=1") == line
    # a model of a family in transformers needs no code
    configure(odd.root / "odd", **PLAIN)
    odd.done("teacher-logits", "r.toml")
    assert not ran.exists()
    assert "trust_remote_code" not in odd.json("logits", "manifest.json")["teacher"]


@pytest.mark.slow
def test_allowed_code_runs_from_the_capture_to_the_export(odd: Desk, ran: Path) -> None:
    odd.edit("[logits]", "trust_remote_code = true\n[logits]")
    add_student(odd, "layers = [0]", "half")
    add_student(odd, 'model = "odd"')
    odd.done("teacher-logits", "r.toml")
    assert ran.exists()
    assert odd.json("logits", "manifest.json")["teacher"]["trust_remote_code"] is True
    assert odd.json("logits", "manifest.json")["teacher"]["family"] == "odd"
    refused = odd.refused("train-student", "r.toml", "--student", "own")
    assert refused.endswith("allow it with students.own.trust_remote_code = true")
    odd.edit('model = "odd"\ntrain', 'model = "odd"\ntrust_remote_code = true\ntrain')
    names = ("--student", "half", "--student", "own")
    odd.done("train-student", "r.toml", *names)
    odd.done("evaluate", "r.toml", *names)
    # the permission does not change how the student was trained
    assert "trust_remote_code" not in json.dumps(odd.json("students", "own", "student.json"))
    odd.done("export", "r", "half", "--to", "hf")
    odd.done("report", "r.toml")
    with (odd.root / "odd" / "modeling_odd.py").open("a") as stream:
        stream.write("# changed\n")
    assert "teacher.fingerprint" in odd.refused("teacher-logits", "r.toml")
    odd.edit("trust_remote_code = true\n[logits]", "[logits]")
    assert "teacher.trust_remote_code = true" in odd.refused("teacher-logits", "r.toml")


@pytest.mark.slow
def test_code_of_a_tokenizer_needs_permission_too(odd: Desk) -> None:
    path = odd.root / "odd" / "tokenizer_config.json"
    own = {"tokenizer_class": "Odd", "auto_map": {"AutoTokenizer": [None, "tokens_odd.Odd"]}}
    path.write_text(json.dumps({**json.loads(path.read_text()), **own}))
    odd.write(
        "odd/tokens_odd.py",
        "from transformers import PreTrainedTokenizerFast\n\n\n"
        "class Odd(PreTrainedTokenizerFast):\n    pass\n",
    )
    assert "brings its own code" in odd.refused("teacher-logits", "r.toml")
    odd.edit("[logits]", "trust_remote_code = true\n[logits]")
    odd.done("teacher-logits", "r.toml")
    # the tokenizer in the store loads without the code
    assert "auto_map" not in odd.json("logits", "tokenizer", "tokenizer_config.json")
    odd.done("train-student", "r.toml", "--student", "small")


def test_the_permission_belongs_to_one_model(desk: Desk) -> None:
    desk.edit("[students.small]", "[students.small]\ntrust_remote_code = true")
    line = desk.refused("plan", "r.toml")
    assert "students.small: has 'trust_remote_code' without 'model'" in line
    desk.edit("trust_remote_code = true", "")
    add_student(desk, 'model = "a"\ntrust_remote_code = true', "a")
    desk.edit(
        "[students.baseline]",
        '[students.b]\nlike = "a"\nmodel = "b"\n[students.c]\nlike = "a"\n[students.baseline]',
    )
    recipe = load_recipe(str(desk.root / "r.toml"), (), None, desk.root / "runs").recipe
    trusted = {name: recipe.trusts(name) for name in ("a", "b", "c", "small")}
    assert trusted == {"a": True, "b": False, "c": True, "small": False}
