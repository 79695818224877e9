"""Pruned students on the command line: `prune-student`, `train-student`, `plan`, and refusals."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
from coldstill.stages.planning.model_sizes import sizes_of_model
from coldstill.stages.students.pruning.config import PruneConfig
from conftest import FAMILIES
from small_runs import save_teacher
from student_recipe import ORIGIN, fault, load

if TYPE_CHECKING:
    from pathlib import Path

    from desk import Desk

pytest_plugins = ("desk",)


def test_cuts_have_two_forms_and_survive_the_record_of_a_run(tmp_path: Path) -> None:
    by_loss = PruneConfig(parameters="25%", layers_by="loss")
    cases: dict[str, tuple[PruneConfig, ...]] = {
        '{ parameters = "50%" }': (PruneConfig(parameters="50%"),),
        "{ parameters = 1000 }": (PruneConfig(parameters=1000),),
        "{ layers = 2, hidden = 64, heads = 4 }": (PruneConfig(layers=2, hidden=64, heads=4),),
        '[{ layers = 2 }, { parameters = "25%", layers_by = "loss" }]': (
            PruneConfig(layers=2), by_loss,
        ),
    }  # fmt: skip
    for line, expected in cases.items():
        student = load(tmp_path, f"prune = {line}\n")["small"]
        assert student.prune == expected
        dumped = json.loads(student.model_dump_json())
        assert isinstance(dumped["prune"], dict) == (len(expected) == 1)
        assert type(student).model_validate(dumped) == student
    text = 'prune = { layers = 2 }\n[students.other]\nlike = "small"\nprune = { hidden = 8 }\n'
    students = load(tmp_path, text)
    assert students["other"].prune == (PruneConfig(hidden=8),)
    again = load(tmp_path, text.replace("prune = { hidden = 8 }", "layers = [0]"))["other"]
    assert (again.prune, again.layers is None) == (None, False)


def test_impossible_cuts_are_refused(tmp_path: Path) -> None:
    neither = "is neither a number of param"
    integer = "input should be a valid integer"
    for line, message in (
        ("{}", "small.prune: needs sizes such as { hidden = 512, feed_forward = 1536 }, or param"),
        ("[]", 'small.prune: [] is neither a table such as { parameters = "50%" } nor a list of'),
        ("3", "small.prune: 3 is neither a table such as"),
        ("{ hiden = 3 }", "small.prune: unknown key 'hiden'; did you mean 'hidden'? (have: laye"),
        ("[{ layers = 2 }, { hiden = 3 }]", "small.prune.1: unknown key 'hiden'; did you mean"),
        ("{ layers = 0 }", "small.prune.layers: input should be greater than or equal to 1, not"),
        ("{ layers = true }", f"small.prune.layers: {integer}, not True"),
        ('{ layers = "2" }', f"small.prune.layers: {integer}, not '2'"),
        ("{ heads = 2.0 }", f"small.prune.heads: {integer}, not 2.0"),
        ("{ layers = 2, sequences = true }", f"prune.sequences: {integer}"),
        ('{ parameters = "half" }', f"small.prune.parameters: 'half' {neither}"),
        ('{ parameters = "120%" }', f"small.prune.parameters: '120%' {neither}"),
        ('{ parameters = "0%" }', f"small.prune.parameters: '0%' {neither}"),
        ("{ parameters = 0.5 }", f"small.prune.parameters: 0.5 {neither}"),
        ("{ parameters = true }", f"small.prune.parameters: True {neither}"),
        ('{ layers = 2, layers_by = "luck" }', "small.prune.layers_by: input should be 'infl"),
        (f"{{ layers = 2 }}\n{ORIGIN}", "not both 'architecture' and 'prune'"),
    ):
        assert message in fault(tmp_path, f"prune = {line}\n")


@pytest.fixture(scope="module")
def _captured(tmp_path_factory: pytest.TempPathFactory, texts: Path, tokenizer: Any) -> Desk:
    from desk import RECIPE as TEMPLATE
    from desk import Desk

    desk = Desk(tmp_path_factory.mktemp("captured"))
    sizes = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, "llama", {**FAMILIES["llama"], **sizes})
        save_teacher(desk.root / "teacher", tokenizer)
    desk.write("r.toml", TEMPLATE.format(texts=texts, teacher='model = "./teacher"'))
    desk.edit(f"[students.small]\n{ORIGIN}", '[students.small]\nprune = { parameters = "50%" }')
    desk.edit('like = "small"', f'like = "small"\n{ORIGIN}')
    desk.done("teacher-logits", "r.toml")
    return desk


@pytest.fixture
def deep(_captured: Desk, tmp_path: Path) -> Desk:
    """A desk whose teacher has three layers of four heads; its logits are captured."""
    shutil.copytree(_captured.root, tmp_path, dirs_exist_ok=True)
    return type(_captured)(tmp_path)


@pytest.mark.slow
def test_a_student_is_pruned_shown_trained_and_measured(deep: Desk) -> None:
    plan = json.loads(deep.done("plan", "r.toml", "--json").stdout)
    result = deep.done("prune-student", "r.toml", "--student", "small")
    folder = deep.run / "students" / "small"
    assert sorted(path.name for path in folder.iterdir()) == ["pruning.json", "start"]
    record = deep.json("students", "small", "pruning.json")
    lines = [line.split() for line in result.stdout.splitlines()]
    assert lines[0] == ["small", "before", "after"]
    assert lines[1] == ["layers", "3", "3"]
    sizes = record["sizes"]["after"]
    assert lines[2] == ["hidden", "32", str(sizes["hidden"]), f"{sizes['hidden'] / 32:.1%}"]
    assert lines[6][:1] == ["parameters"]
    assert lines[6][2] == f"{record['parameters']['after']:,}"
    assert lines[7][:3] == [
        "loss", f"{record['loss']['before']:.4f}", f"{record['loss']['after']:.4f}",
    ]  # fmt: skip
    assert plan["students"]["small"]["parameters"] == record["parameters"]["after"]
    assert {"prune-student small", "train-student small"} <= plan["memory"].keys()

    shutil.rmtree(deep.root / "teacher")  # it is not needed again
    before = deep.snapshot()
    again = deep.done("prune-student", "r.toml", "--json")
    assert json.loads(again.stdout) == {"small": [record]}
    assert "already pruned" in again.stderr
    made = {path: content for path, content in deep.snapshot().items() if "/small/" in path}
    assert made == {path: content for path, content in before.items() if "/small/" in path}
    deep.done("train-student", "r.toml")
    assert "already trained" in deep.done("prune-student", "r.toml").stderr
    assert not (folder / "start").exists()
    found = sizes_of_model(folder / "model")
    assert found is not None
    assert found.parameters == record["parameters"]["after"]
    deep.done("evaluate", "r.toml")
    line = deep.refused("prune-student", "r.toml", "--set", "students.small.prune.layers=2")
    assert "students.small was trained with student.prune.layers = None, now 2;" in line


@pytest.mark.slow
def test_a_variant_is_cut_twice_and_trained_twice(deep: Desk) -> None:
    setting = "students.small.prune=[{ layers = 2 }, { kv_heads = 1, hidden = 16 }]"
    plan = json.loads(deep.done("plan", "r.toml", "--json", "--set", setting).stdout)
    # the first cut of two does not replace a single cut
    deep.done("prune-student", "r.toml", "--student", "small", "--set", setting)
    deep.done("prune-student", "r.toml", "--student", "small")
    assert (deep.run / "students" / "small" / "start").is_dir()
    deep.done("train-student", "r.toml", "--student", "small")
    assert not (deep.run / "students" / "small" / "rounds" / "1" / "start").exists()
    deep.done("train-student", "r.toml", "--student", "twice", "--set", setting)
    folder = deep.run / "students" / "twice"
    assert (folder / "rounds" / "1" / "metrics.jsonl").exists()
    assert not (folder / "rounds" / "1" / "model").exists()
    config = deep.json("students", "twice", "model", "config.json")
    assert (config["num_hidden_layers"], config["hidden_size"]) == (2, 16)
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (2, 1)
    assert config["head_dim"] == 8
    found = sizes_of_model(folder / "model")
    assert found is not None
    assert plan["students"]["small"]["parameters"] == found.parameters
    assert plan["students"]["small"]["steps"] == 6
    shutil.rmtree(deep.root / "teacher")
    result = deep.done("prune-student", "r.toml", "--student", "twice", "--set", setting)
    heads = [line.split("  ")[0] for line in result.stdout.splitlines() if "before  " in line]
    assert heads == ["twice, cut 1 of 2", "twice, cut 2 of 2"]
    assert "layers kept" in result.stdout


@pytest.mark.slow
def test_a_changed_list_of_cuts_is_refused_by_its_first_changed_entry(deep: Desk) -> None:
    def setting(cuts: str) -> tuple[str, ...]:
        return ("--student", "small", "--set", f"students.small.prune={cuts}")

    cuts = "[{ layers = 2 }, { hidden = 16 }]"
    deep.done("train-student", "r.toml", *setting(cuts))
    for changed, message in (
        ("[{ layers = 2 }, { hidden = 24 }]", "student.prune.1.hidden = 16, now 24;"),
        ("[{ layers = 1 }, { hidden = 16 }]", "student.prune.0.layers = 2, now 1;"),
        (cuts.replace("]", ", { heads = 2 }]"), "student.prune.2 = None, now {'heads': 2, "),
        ("{ layers = 2 }", "student.prune.1 = {'hidden': 16..., now None;"),
    ):
        line = deep.refused("train-student", "r.toml", *setting(changed))
        assert f"students.small was trained with {message}" in line


@pytest.mark.slow
def test_a_budget_that_is_hardly_used_is_reported(deep: Desk) -> None:
    setting = ("--set", 'students.small.prune={ hidden = 8, parameters = "90%" }')
    facts = json.loads(deep.done("plan", "r.toml", "--json", *setting).stdout)
    note = facts["students"]["small"]["note"]
    assert "note         " + note in deep.done("plan", "r.toml", *setting).stdout
    result = deep.done("prune-student", "r.toml", "--student", "small", *setting)
    record = deep.json("students", "small", "pruning.json")["parameters"]
    assert note == (
        f"students.small.prune: leaves {record['after']:,} parameters, "
        f"{record['after'] / record['teacher']:.1%} of the teacher's, of the "
        f"{int(0.9 * record['teacher']):,} that parameters = 90% allows; hidden = 8 does "
        "not allow more"
    )
    assert note in result.stderr
    usual = json.loads(deep.done("plan", "r.toml", "--json").stdout)["students"]
    assert {name: student["note"] for name, student in usual.items()} == {
        "small": None, "baseline": None,
    }  # fmt: skip


@pytest.mark.slow
def test_impossible_sizes_change_nothing_and_stop_the_plan_too(deep: Desk) -> None:
    for setting, message in (
        ("prune.heads=3", "students.small.prune: heads = 3 cannot be divided among 2 key-value"),
        ("prune.hidden=64", "students.small.prune: hidden = 64, the model to cut has 32 chan"),
        ("prune.layers=4", "students.small.prune: layers = 4, the model to cut has 3 layers"),
        ("prune={ parameters = 10 }", "students.small.prune: parameters = 10 are too few "),
        ("prune={ parameters = 10000000 }", "parameters = 10,000,000, the model to cut has "),
    ):
        for command in ("plan", "prune-student", "train-student"):
            students = () if command == "plan" else ("--student", "small")
            line = deep.refused(command, "r.toml", *students, "--set", f"students.small.{setting}")
            assert message in line, command


@pytest.mark.slow
def test_students_that_are_not_pruned_and_other_settings_are_refused(deep: Desk) -> None:
    line = deep.refused("prune-student", "r.toml", "--student", "baseline")
    assert line == (
        "error: students.baseline: has no 'prune', such as prune = { parameters = \"50%\" }, so "
        "there is nothing to cut (students with one: small)"
    )
    line = deep.refused("prune-student", "r.toml", "--student", "none")
    assert "no student 'none'" in line
    deep.done("prune-student", "r.toml")
    for command in ("prune-student", "train-student"):
        line = deep.refused(
            command, "r.toml", "--student", "small", "--set", "students.small.prune.layers=2"
        )
        assert (
            "students.small.prune was pruned without layers, now with layers = 2; make another"
            in line
        )
    twice = 'students.small.prune=[{ layers = 2 }, { parameters = "50%" }]'
    line = deep.refused("train-student", "r.toml", "--student", "small", "--set", twice)
    assert "students.small.prune was pruned with cut = 1, now with cut = 2; make another" in line
    # how it is trained may still change
    deep.done(
        "train-student", "r.toml", "--student", "small", "--set", "students.small.train.steps=2"
    )
    deep.edit('prune = { parameters = "50%" }', "layers = [0]")
    line = deep.refused("prune-student", "r.toml")
    assert line == (
        "error: r: no student of the recipe has 'prune', such as prune = { parameters = \"50%\" }"
    )
