"""Students of every origin, from the recipe to the saved model."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
from coldstill.data.files import first_difference
from coldstill.stages.config import LayersConfig, LoraConfig
from coldstill.stages.planning.model_sizes import adapter_parameters, sizes_of_model
from safetensors.torch import load_file
from small_runs import save_teacher
from student_recipe import ORIGIN, fault, load

if TYPE_CHECKING:
    from pathlib import Path

    from desk import Desk

pytest_plugins = ("desk",)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{ every = 2 }", LayersConfig(every=2)),
        ("{ keep = 4 }", LayersConfig(keep=4)),
        ("[0, 2, 5]", LayersConfig(only=(0, 2, 5))),
    ],
)
def test_layers_have_three_forms_that_survive_the_record_of_a_run(
    line: str, expected: LayersConfig, tmp_path: Path
) -> None:
    student = load(tmp_path, f"layers = {line}\n")["small"]
    assert student.layers == expected
    again = type(student).model_validate(json.loads(student.model_dump_json()))
    assert again == student


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("", "needs one of 'architecture', 'model', 'layers' and 'prune'"),
        ('model = "x/y"\nlayers = [0]', "and 'prune', not both 'model' and 'layers'"),
        ("layers = []", ".layers: [] is not an increasing list of layers, such as [0, 2, 5]"),
        ("layers = [2, 0]", ".layers: [2, 0] is not an increasing list of layers, such as [0, 2,"),
        ("layers = [1, 1]", ".layers: [1, 1] is not an increasing list of layers, such as [0, 2,"),
        ("layers = [-1]", ".layers.only.0: input should be greater than or equal to 0, not -1"),
        ("layers = {}", ".layers: needs one of 'every', 'keep' and a list of layers, such as { e"),
        ("layers = { every = 2, keep = 3 }", ".layers: needs one of 'every', 'keep' and a list "),
        ("layers = { every = 0 }", ".layers.every: input should be greater than or equal to 1"),
        ("layers = { keep = 1 }", ".layers.keep: input should be greater than or equal to 2"),
        ("layers = { evry = 2 }", ".layers: unknown key 'evry'; did you mean 'every'?"),
        ("layers = 3", ".layers: "),
        (f"{ORIGIN}\nlora = {{ rank = 4 }}", "has 'lora' with 'architecture': the weights of"),
        ('model = "x/y"\nlora = { rang = 4 }', ".lora: unknown key 'rang'; did you mean 'rank'?"),
    ],
)
def test_wrong_origins_are_refused(lines: str, said: str, tmp_path: Path) -> None:
    line = fault(tmp_path, f"{lines}\n")
    assert line.startswith("r.toml: students.small")
    assert said in line


@pytest.mark.parametrize("lora", ["", "lora = { rank = 4 }\n"], ids=["full", "lora"])
@pytest.mark.parametrize("first", ['model = "x/y"', "layers = { every = 2 }"])
@pytest.mark.parametrize(
    "second", [ORIGIN, 'model = "a/b"', "layers = { keep = 4 }", "layers = [0, 3]"]
)
def test_a_students_own_layers_replace_the_inherited_origin(
    lora: str, first: str, second: str, tmp_path: Path
) -> None:
    text = f'{first}\n{lora}[students.other]\nlike = "small"\n{second}\n'
    students = load(tmp_path, text)
    plain = load(tmp_path, f"{second}\n")["small"]
    other = students["other"]
    assert (other.architecture, other.model, other.layers) == (
        plain.architecture, plain.model, plain.layers,
    )  # fmt: skip
    # adapters need weights to stand on
    keeps = bool(lora) and second != ORIGIN
    assert other.lora == (LoraConfig(rank=4) if keeps else None)


@pytest.fixture
def deep(desk: Desk, tokenizer: Any) -> Desk:
    """A desk whose teacher has four layers; its logits are captured."""
    from conftest import FAMILIES

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, "llama", {**FAMILIES["llama"], "num_hidden_layers": 4})
        save_teacher(desk.root / "teacher", tokenizer)
    text = (desk.root / "r.toml").read_text(encoding="utf-8")
    line = next(line for line in text.splitlines() if line.startswith("model = "))
    desk.edit(line, 'model = "./teacher"')  # not to be taken for a name on a hub
    desk.edit(ORIGIN, "layers = { every = 2 }")
    desk.done("teacher-logits", "r.toml")
    return desk


def test_a_student_of_layers_is_trained_compared_and_made_once(deep: Desk) -> None:
    deep.done("train-student", "r.toml", "--student", "small")
    config = deep.json("students", "small", "model", "config.json")
    assert config["num_hidden_layers"] == 2
    assert not (deep.run / "students" / "small" / "start").exists()
    shutil.rmtree(deep.root / "teacher")  # a trained student asks nobody
    before = deep.snapshot()
    result = deep.done("train-student", "r.toml", "--student", "small")
    assert "already trained" in result.stderr
    assert deep.snapshot() == before
    line = deep.refused("train-student", "r.toml", "--set", "students.small.layers=[0,3]")
    assert "students.small was trained with student.layers." in line
    line = deep.refused("train-student", "r.toml", "--student", "baseline")
    assert line == "error: students.baseline.layers: no folder ./teacher"
    deep.done("evaluate", "r.toml")


def test_adapters_are_merged_into_an_ordinary_checkpoint(deep: Desk) -> None:
    deep.edit("layers = { every = 2 }", "layers = [0, 3]\nlora = { rank = 2 }")
    result = deep.done("train-student", "r.toml", "--student", "small")
    assert "adapter weights trained and merged into" in result.stderr
    weights = load_file(deep.run / "students" / "small" / "model" / "model.safetensors")
    old = load_file(deep.root / "teacher" / "model.safetensors")
    assert (weights["model.norm.weight"] == old["model.norm.weight"]).all()
    name = "model.layers.{}.self_attn.q_proj.weight"
    moved = (weights[name.format(1)] - old[name.format(3)]).abs().max()
    assert 0 < float(moved) < 0.1


def test_another_teacher_than_the_stores_is_refused(deep: Desk, tokenizer: Any) -> None:
    save_teacher(deep.root / "teacher", tokenizer, seed=9)
    line = deep.refused("train-student", "r.toml", "--student", "small")
    assert "students.small.layers: " in line
    assert "is not the teacher of the store (teacher): its fingerprint is " in line


def test_layers_of_a_teacher_trained_here(desk: Desk) -> None:
    text = (desk.root / "r.toml").read_text(encoding="utf-8")
    line = next(line for line in text.splitlines() if line.startswith("model = "))
    desk.edit(
        line,
        "architecture = { layers = 3, hidden = 32, heads = 2 }\ntokenizer = { vocabulary = 300 }\n"
        "train = { steps = 1, batch_tokens = 256 }",
    )
    desk.edit(ORIGIN, "layers = { keep = 2 }")
    plan = json.loads(desk.done("plan", "r.toml", "--json").stdout)
    desk.done("teacher-logits", "r.toml")
    desk.done("train-student", "r.toml", "--student", "small")
    found = sizes_of_model(desk.run / "students" / "small" / "model")
    assert found is not None
    assert found.layers == 2
    assert plan["students"]["small"]["parameters"] == found.parameters


def test_a_plan_counts_students_before_they_are_made(deep: Desk) -> None:
    deep.edit('[students.baseline]\nlike = "small"', '[students.baseline]\nlike = "small"\n'
              'model = "teacher"\nlora = { rank = 4 }')  # fmt: skip
    plan = json.loads(deep.done("plan", "r.toml", "--json").stdout)
    assert "parameters, 3 steps" in deep.done("plan", "r.toml").stdout
    deep.done("train-student", "r.toml")
    memory = plan["memory"]
    for name in ("small", "baseline"):
        found = sizes_of_model(deep.run / "students" / name / "model")
        assert found is not None
        assert plan["students"][name]["parameters"] == found.parameters
    whole = sizes_of_model(deep.root / "teacher")
    assert whole is not None
    full = json.loads(
        deep.done("plan", "r.toml", "--json", "--set", "students.small.layers.every=1").stdout
    )["memory"]["train-student small"]
    # frozen weights need no gradient and no means, adapters do
    saved = 12 * whole.parameters - 16 * adapter_parameters(whole, 4)
    assert full - memory["train-student baseline"] == saved
    assert memory["train-student small"] < full
    again = ("students.small.layers.every=1", "students.small.train.gradient_checkpointing=true")
    settings = [part for setting in again for part in ("--set", setting)]
    less = json.loads(deep.done("plan", "r.toml", "--json", *settings).stdout)["memory"]
    assert less["train-student small"] < full


def test_a_record_that_is_older_than_a_key_means_that_it_was_off() -> None:
    old = {"train": {"steps": 3, "trainer": {}}}
    off = {"train": {"steps": 3, "trainer": {}, "compile": False}, "lora": None}
    assert first_difference(old, off) is None
    on = {"train": {"steps": 3, "trainer": {}, "compile": True}}
    assert first_difference(old, on) == "train.compile = None, now True"
    # keys of transformers are not off where they are not said
    said = {"train": {"steps": 3, "trainer": {"adam_beta1": 0.0}}}
    assert first_difference(old, said) == "train.trainer.adam_beta1 = None, now 0.0"


def test_of_lists_of_tables_the_first_entry_that_differs_is_named() -> None:
    def difference(old: Any, new: Any) -> str | None:
        return first_difference({"prune": old}, {"prune": new})

    two = [{"layers": 3}, {"hidden": 8}]
    assert difference(two, [{"layers": 3}, {"hidden": 8, "by": None}]) is None
    assert difference(two, [{"layers": 3}, {"hidden": 4}]) == "prune.1.hidden = 8, now 4"
    assert difference(two, [{"layers": 3}]) == "prune.1 = {'hidden': 8}, now None"
    assert difference({"layers": 3}, two) == "prune.1 = None, now {'hidden': 8}"
    assert difference({"layers": 3}, [{"layers": 3}]) is None
    assert difference({"layers": 2}, two) == "prune.0.layers = 2, now 3"
    # of numbers the whole list is shorter than a word about it
    assert difference([0, 2, 5], [0, 2]) == "prune = [0, 2, 5], now [0, 2]"
    assert difference([], two[:1]) == "prune = [], now [{'layers': 3}]"
