"""Students of every origin and of several teachers, from the recipe to the saved model."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
from coldstill.data.errors import ColdstillError
from coldstill.data.files import first_difference
from coldstill.pipeline.recipe.reading import load_recipe
from coldstill.stages.config import LayersConfig, LoraConfig
from coldstill.stages.planning.model_sizes import adapter_parameters, sizes_of_model
from safetensors.torch import load_file
from small_runs import CLOCKS, save_teacher
from student_recipe import ORIGIN, fault, load

if TYPE_CHECKING:
    from pathlib import Path

    from click.testing import Result
    from desk import Desk

pytest_plugins = ("desk",)


def test_layers_have_three_forms_that_survive_the_record_of_a_run(tmp_path: Path) -> None:
    for line, expected in (
        ("{ every = 2 }", LayersConfig(every=2)),
        ("{ keep = 4 }", LayersConfig(keep=4)),
        ("[0, 2, 5]", LayersConfig(only=(0, 2, 5))),
    ):
        student = load(tmp_path, f"layers = {line}\n")["small"]
        assert student.layers == expected
        assert type(student).model_validate(json.loads(student.model_dump_json())) == student


def test_wrong_origins_are_refused(tmp_path: Path) -> None:
    increasing = "is not an increasing list of layers, such as [0, 2"
    needs = ".layers: needs one of 'every', 'keep' and a list "
    for lines, message in (
        ("", "needs one of 'architecture', 'model', 'layers' and 'prune'"),
        ('model = "x/y"\nlayers = [0]', "and 'prune', not both 'model' and 'layers'"),
        ("layers = []", f".layers: [] {increasing}"),
        ("layers = [2, 0]", f".layers: [2, 0] {increasing}"),
        ("layers = [1, 1]", f".layers: [1, 1] {increasing}"),
        ("layers = [-1]", ".layers.only.0: input should be greater than or equal to 0, not -1"),
        ("layers = {}", needs),
        ("layers = { every = 2, keep = 3 }", needs),
        ("layers = { every = 0 }", ".layers.every: input should be greater than or equal to 1"),
        ("layers = { keep = 1 }", ".layers.keep: input should be greater than or equal to 2"),
        ("layers = { evry = 2 }", ".layers: unknown key 'evry'; did you mean 'every'?"),
        ("layers = 3", ".layers: "),
        (
            f"{ORIGIN}\nlora = {{ rank = 4 }}",
            "has 'lora' with 'architecture': the weights of a new",
        ),
        ('model = "x/y"\nlora = { rang = 4 }', ".lora: unknown key 'rang'; did you mean 'rank'?"),
        (
            'model = "x/y"\nlora = { rank = 4 }\nquantize = "int8"',
            "has both 'lora' and 'quantize': adapters are added to the weights after the last step",
        ),
        (
            f'{ORIGIN}\nquantize = "int5"',
            ".quantize.scheme: input should be 'int4', 'int4-dynamic'",
        ),
        (f'{ORIGIN}\nquantize = {{ scheme = "int4", start = 1 }}', ".start: input should be less"),
    ):
        line = fault(tmp_path, f"{lines}\n")
        assert line.startswith("r.toml: students.small")
        assert message in line


def test_a_students_own_layers_replace_the_inherited_origin(tmp_path: Path) -> None:
    for lora, first, second in itertools.product(
        ("", "lora = { rank = 4 }\n"),
        ('model = "x/y"', "layers = { every = 2 }"),
        (ORIGIN, 'model = "a/b"', "layers = { keep = 4 }", "layers = [0, 3]"),
    ):
        text = f'{first}\n{lora}[students.other]\nlike = "small"\n{second}\n'
        other, plain = load(tmp_path, text)["other"], load(tmp_path, f"{second}\n")["small"]
        found, expected = ((one.architecture, one.model, one.layers) for one in (other, plain))
        assert found == expected
        # adapters need trained weights
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


@pytest.mark.slow
def test_a_student_of_layers_is_trained_compared_and_made_once(deep: Desk, tokenizer: Any) -> None:
    deep.done("train-student", "r.toml", "--student", "small")
    config = deep.json("students", "small", "model", "config.json")
    assert config["num_hidden_layers"] == 2
    assert not (deep.run / "students" / "small" / "start").exists()
    save_teacher(deep.root / "teacher", tokenizer, seed=9)
    line = deep.refused("train-student", "r.toml", "--student", "baseline")
    assert "students.baseline.layers: " in line
    assert "is not the teacher of the store (teacher): its fingerprint is " in line
    shutil.rmtree(deep.root / "teacher")  # a trained student does not need it
    before = deep.snapshot()
    result = deep.done("train-student", "r.toml", "--student", "small")
    assert "already trained" in result.stderr
    assert deep.snapshot() == before
    line = deep.refused("train-student", "r.toml", "--set", "students.small.layers=[0,3]")
    assert "students.small was trained with student.layers." in line
    line = deep.refused("train-student", "r.toml", "--student", "baseline")
    assert line == "error: students.baseline.layers: no folder ./teacher"
    deep.done("evaluate", "r.toml")


@pytest.mark.slow
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


@pytest.mark.slow
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


def test_a_key_that_an_older_record_lacks_counts_as_off() -> None:
    old = {"train": {"steps": 3, "trainer": {}}}
    off = {"train": {"steps": 3, "trainer": {}, "compile": False}, "lora": None}
    assert first_difference(old, off) is None
    on = {"train": {"steps": 3, "trainer": {}, "compile": True}}
    assert first_difference(old, on) == "train.compile = None, now True"
    # a missing key of transformers does not mean off
    beta = {"train": {"steps": 3, "trainer": {"adam_beta1": 0.0}}}
    assert first_difference(old, beta) == "train.trainer.adam_beta1 = None, now 0.0"


def test_the_first_different_entry_of_a_list_of_tables_is_named() -> None:
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


MIX = '[students.mix]\nlike = "small"\nteachers = {teachers}\n'
OTHER = '{ logits = "runs/o/logits", weight = 0.5 }'


@pytest.fixture(scope="module")
def _two_runs(
    _finished: tuple[Desk, Result], tokenizer: Any, tmp_path_factory: pytest.TempPathFactory
) -> Desk:
    desk = dataclasses.replace(_finished[0], root=tmp_path_factory.mktemp("two") / "desk")
    shutil.copytree(_finished[0].root, desk.root)
    save_teacher(desk.root / "second", tokenizer, seed=2)
    recipe = (desk.root / "r.toml").read_text(encoding="utf-8")
    other = recipe.replace('name = "r"', 'name = "o"').replace('"teacher"', '"second"')
    desk.write("o.toml", other.replace("tail = 4\nshard_tokens = 640", "tail = 0"))
    desk.done("teacher-logits", "o.toml")
    return desk


@pytest.fixture
def two_runs(_two_runs: Desk, tmp_path: Path) -> Desk:
    """A finished run `r`, and a run `o` of another teacher over the same corpus."""
    shutil.copytree(_two_runs.root, tmp_path / "desk")
    return dataclasses.replace(_two_runs, root=tmp_path / "desk")


def add_student(desk: Desk, teachers: str) -> None:
    recipe = (desk.root / "r.toml").read_text(encoding="utf-8")
    desk.write("r.toml", recipe + MIX.format(teachers=teachers))


def lines(desk: Desk, student: str) -> list[dict[str, float]]:
    path = desk.run / "students" / student / "metrics.jsonl"
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{k: v for k, v in line.items() if k not in CLOCKS} for line in found]


def train(desk: Desk) -> Result:
    return desk.done("train-student", "r.toml", "--student", "mix")


@pytest.mark.slow
def test_two_teachers_are_mixed_by_weight(two_runs: Desk) -> None:
    for number, name in enumerate(
        ("runs/o/logits", "runs/o", "o", f"file://{two_runs.root}/runs/o/logits")
    ):
        teachers = f'students.small.teachers=[{{ logits = "{name}", weight = 0.5 }}]'
        student = f"mix{number}"
        two_runs.done("train-student", "r.toml", "--student", student, "--set", teachers)
        mixed, alone = lines(two_runs, student), lines(two_runs, "small")
        assert [line["step"] for line in mixed] == [1, 2, 3]
        assert mixed[0]["kl_teacher_0"] == alone[0]["kl"]
        assert mixed[0]["kl_teacher_1"] != pytest.approx(alone[0]["kl"], rel=1e-2)
        for line in mixed:
            half = 0.5 * line["kl_teacher_0"] + 0.5 * line["kl_teacher_1"]
            assert line["kl"] == pytest.approx(half, rel=1e-6)
            assert line["loss"] == pytest.approx(half, rel=1e-6)
    two_runs.done("evaluate", "r.toml", "--student", "mix0")
    evaluated = two_runs.json("students", "mix0", "evaluation.json")
    small = two_runs.json("students", "small", "evaluation.json")
    assert evaluated["heldout"] == small["heldout"]


@pytest.mark.slow
def test_a_student_that_is_trained_stays_and_a_changed_store_is_refused(two_runs: Desk) -> None:
    add_student(two_runs, f"[{OTHER}]")
    train(two_runs)
    assert "already trained" in train(two_runs).stderr
    recorded = two_runs.json("students", "mix", "student.json")
    assert recorded["others"].keys() == {"runs/o/logits"}
    assert "others" not in two_runs.json("students", "small", "student.json")
    assert "teachers" not in two_runs.json("students", "small", "student.json")["student"]
    shutil.rmtree(two_runs.root / "runs" / "o" / "logits")
    two_runs.done("teacher-logits", "o.toml", "--set", "logits.head=6")
    line = two_runs.refused("train-student", "r.toml", "--student", "mix")
    assert "students.mix was trained with others.runs/o/logits = " in line
    two_runs.edit("weight = 0.5", "weight = 0.4")
    line = two_runs.refused("train-student", "r.toml", "--student", "mix")
    assert "students.mix was trained with " in line


@pytest.mark.slow
def test_a_store_of_other_sequences_is_refused_before_anything_is_trained(two_runs: Desk) -> None:
    shutil.rmtree(two_runs.run / "students" / "small")
    add_student(two_runs, f"[{OTHER}]")
    for change, message in (
        ("corpus.sequence_length=16", "packing.sequence_length: 32 in runs/r/logits, 16 in"),
        ("corpus.holdout=0.4", "corpus.documents: "),
        ("logits.sequences=7", "sequences: "),
    ):
        shutil.rmtree(two_runs.root / "runs" / "o")
        two_runs.done("teacher-logits", "o.toml", "--set", change)
        line = two_runs.refused("train-student", "r.toml")
        assert "students.mix.teachers: these stores hold different sequences: " in line
        assert message in line


@pytest.mark.slow
def test_a_store_of_another_tokenizer_is_refused(two_runs: Desk) -> None:
    files = [two_runs.root / "second" / name for name in ("tokenizer.json", "vocab.json")]
    text = files[0].read_text(encoding="utf-8")
    table = json.loads(text)["model"]["vocab"]
    first, second = (token for token in table if table[token] in (310, 311))
    # two tokens change places, so that every number of the corpus stays what it was
    for a, b in ((first, "\0"), (second, first), ("\0", second)):
        text = text.replace(json.dumps(a) + ":", json.dumps(b) + ":")
    files[0].write_text(text, encoding="utf-8")
    shutil.rmtree(two_runs.root / "runs" / "o")
    two_runs.done("teacher-logits", "o.toml")
    add_student(two_runs, f"[{OTHER}]")
    line = two_runs.refused("train-student", "r.toml", "--student", "mix")
    assert "different sequences: tokenizer.fingerprint: " in line


@pytest.mark.slow
def test_a_store_that_is_not_there_or_not_whole_is_refused(two_runs: Desk) -> None:
    add_student(two_runs, '[{ logits = "none", weight = 0.5 }]')
    line = two_runs.refused("train-student", "r.toml", "--student", "mix")
    assert "students.mix.teachers: none: no store in " in line
    two_runs.edit('"none"', '"o"')
    (two_runs.root / "runs" / "o" / "logits" / "shards" / "00000.json").unlink()
    line = two_runs.refused("train-student", "r.toml", "--student", "mix")
    assert "logits: incomplete, 0 of 1 shards; finish it with coldstill teacher-logits" in line


WHOLE = """\
name = "r"
corpus = { files = ["stdlib:"] }
teacher = { model = "x" }
[students.small]
architecture = { layers = 1, hidden = 32, heads = 2 }
train = { steps = 3 }
"""


def shares(folder: Path, teachers: str) -> tuple[float, ...]:
    (folder / "r.toml").write_text(WHOLE + MIX.format(teachers=teachers), encoding="utf-8")
    return load_recipe(str(folder / "r.toml")).recipe.student("mix").shares


def test_shares_are_parts_of_one_and_wrong_weights_are_refused(tmp_path: Path) -> None:
    for teachers, expected in (
        ("[]", (1.0,)),
        (f"[{OTHER}]", (0.5, 0.5)),
        ('[{ logits = "a", weight = 0.3 }, { logits = "b", weight = 0.2 }]', (0.5, 0.3, 0.2)),
        ('[{ logits = "a", weight = 3 }, { weight = 1 }]', (0.25, 0.75)),
        ('[{ logits = "a", weight = 1 }]', (0.0, 1.0)),
        ('[{ logits = "a", weight = 0.7 }, { logits = "b", weight = 0.3 }]', (0.0, 0.7, 0.3)),
    ):
        found = shares(tmp_path, teachers)
        assert found == pytest.approx(expected)
        assert [share == 0 for share in found] == [share == 0 for share in expected]
    for teachers, message in (
        ("[{ weight = 1 }, { weight = 2 }]", "only one entry can lack 'logits'"),
        ('[{ logits = "a", weight = 0.1 }, { logits = "a", weight = 0.1 }]', "the same 'logits'"),
        ('[{ logits = "a" }]', "students.mix.teachers.0.weight: missing"),
        ('[{ logits = "a", wieght = 1 }]', "unknown key 'wieght'; did you mean 'weight'?"),
    ):
        with pytest.raises(ColdstillError) as error:
            shares(tmp_path, teachers)
        assert message in str(error.value)
        assert "\n" not in str(error.value)


def test_like_inherits_the_teachers_unless_the_student_has_its_own(tmp_path: Path) -> None:
    text = WHOLE + MIX.format(teachers=f"[{OTHER}]")
    text += '[students.a]\nlike = "mix"\n[students.b]\nlike = "mix"\nteachers = []\n'
    text += '[students.c]\nlike = "mix"\n[[students.c.teachers]]\nlogits = "x"\nweight = 0.1\n'
    (tmp_path / "r.toml").write_text(text, encoding="utf-8")
    recipe = load_recipe(str(tmp_path / "r.toml")).recipe
    assert recipe.student("a").shares == (0.5, 0.5)
    assert recipe.student("b").shares == (1.0,)
    assert recipe.student("c").shares == (0.9, 0.1)
