"""Students of several teachers, from the recipe to the metrics."""

from __future__ import annotations

import dataclasses
import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
from coldstill.data.errors import ColdstillError
from coldstill.pipeline.recipe.reading import load_recipe
from small_runs import CLOCKS, save_teacher

if TYPE_CHECKING:
    from pathlib import Path

    from click.testing import Result
    from desk import Desk

pytest_plugins = ("desk",)

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


@pytest.mark.parametrize("named", ["runs/o/logits", "runs/o", "o", "file:{root}/runs/o/logits"])
def test_two_teachers_are_mixed_by_weight(two_runs: Desk, named: str) -> None:
    named = named.replace("file:", "file://").format(root=two_runs.root)
    add_student(two_runs, f'[{{ logits = "{named}", weight = 0.5 }}]')
    train(two_runs)
    mixed, alone = lines(two_runs, "mix"), lines(two_runs, "small")
    assert [line["step"] for line in mixed] == [1, 2, 3]
    assert mixed[0]["kl_teacher_0"] == alone[0]["kl"]
    assert mixed[0]["kl_teacher_1"] != pytest.approx(alone[0]["kl"], rel=1e-2)
    for line in mixed:
        half = 0.5 * line["kl_teacher_0"] + 0.5 * line["kl_teacher_1"]
        assert line["kl"] == pytest.approx(half, rel=1e-6)
        assert line["loss"] == pytest.approx(half, rel=1e-6)
    two_runs.done("evaluate", "r.toml")
    evaluated = json.loads((two_runs.run / "students/mix/evaluation.json").read_text("utf-8"))
    small = json.loads((two_runs.run / "students/small/evaluation.json").read_text("utf-8"))
    assert evaluated["heldout"] == small["heldout"]


def test_all_weight_on_its_own_store_changes_nothing(two_runs: Desk) -> None:
    add_student(two_runs, '[{ weight = 1 }, { logits = "o", weight = 0 }]')
    train(two_runs)
    assert lines(two_runs, "mix") == lines(two_runs, "small")


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
    said = two_runs.refused("train-student", "r.toml", "--student", "mix")
    assert "students.mix was trained with others.runs/o/logits = " in said
    two_runs.edit("weight = 0.5", "weight = 0.4")
    said = two_runs.refused("train-student", "r.toml", "--student", "mix")
    assert "students.mix was trained with " in said


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("corpus.sequence_length=16", "packing.sequence_length: 32 in runs/r/logits, 16 in"),
        ("corpus.holdout=0.4", "corpus.documents: "),
        ("logits.sequences=7", "sequences: "),
    ],
)
def test_a_store_of_other_sequences_is_refused_before_anything_is_trained(
    two_runs: Desk, change: str, said: str
) -> None:
    shutil.rmtree(two_runs.root / "runs" / "o")
    two_runs.done("teacher-logits", "o.toml", "--set", change)
    shutil.rmtree(two_runs.run / "students" / "small")
    add_student(two_runs, f"[{OTHER}]")
    line = two_runs.refused("train-student", "r.toml")
    assert "students.mix.teachers: these stores hold different sequences: " in line
    assert said in line


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


def test_a_store_that_is_not_there_or_not_whole_is_refused(two_runs: Desk) -> None:
    add_student(two_runs, '[{ logits = "nobody", weight = 0.5 }]')
    line = two_runs.refused("train-student", "r.toml", "--student", "mix")
    assert "students.mix.teachers: nobody: no store in " in line
    two_runs.edit('"nobody"', '"o"')
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


@pytest.mark.parametrize(
    ("teachers", "expected"),
    [
        ("[]", (1.0,)),
        (f"[{OTHER}]", (0.5, 0.5)),
        ('[{ logits = "a", weight = 0.3 }, { logits = "b", weight = 0.2 }]', (0.5, 0.3, 0.2)),
        ('[{ logits = "a", weight = 3 }, { weight = 1 }]', (0.25, 0.75)),
        ('[{ logits = "a", weight = 1 }]', (0.0, 1.0)),
        ('[{ logits = "a", weight = 0.7 }, { logits = "b", weight = 0.3 }]', (0.0, 0.7, 0.3)),
    ],
)
def test_shares_are_parts_of_one(
    teachers: str, expected: tuple[float, ...], tmp_path: Path
) -> None:
    found = shares(tmp_path, teachers)
    assert found == pytest.approx(expected)
    assert [share == 0 for share in found] == [share == 0 for share in expected]


@pytest.mark.parametrize(
    ("teachers", "said"),
    [
        (
            '[{ logits = "a", weight = 1.2 }]',
            "the sum of the weights is 1.2, so the run's own store",
        ),
        ('[{ logits = "a", weight = 0 }, { weight = 0 }]', "all weights are 0"),
        ("[{ weight = 1 }, { weight = 2 }]", "only one entry can lack 'logits'"),
        ('[{ logits = "a", weight = 0.1 }, { logits = "a", weight = 0.1 }]', "the same 'logits'"),
        ('[{ logits = "a", weight = -1 }]', "students.mix.teachers.0.weight: "),
        ('[{ logits = "a" }]', "students.mix.teachers.0.weight: missing"),
        ('[{ logits = "a", wieght = 1 }]', "unknown key 'wieght'; did you mean 'weight'?"),
    ],
)
def test_weights_that_add_up_to_nothing_are_refused(
    teachers: str, said: str, tmp_path: Path
) -> None:
    with pytest.raises(ColdstillError) as error:
        shares(tmp_path, teachers)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_like_takes_over_the_teachers_and_may_have_its_own(tmp_path: Path) -> None:
    text = WHOLE + MIX.format(teachers=f"[{OTHER}]")
    text += '[students.a]\nlike = "mix"\n[students.b]\nlike = "mix"\nteachers = []\n'
    text += '[students.c]\nlike = "mix"\n[[students.c.teachers]]\nlogits = "x"\nweight = 0.1\n'
    (tmp_path / "r.toml").write_text(text, encoding="utf-8")
    recipe = load_recipe(str(tmp_path / "r.toml")).recipe
    assert recipe.student("a").shares == (0.5, 0.5)
    assert recipe.student("b").shares == (1.0,)
    assert recipe.student("c").shares == (0.9, 0.1)
