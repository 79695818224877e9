"""Reading recipes: where they come from, how they are overridden, what is wrong with them."""

from __future__ import annotations

import itertools
import json
import re
from typing import TYPE_CHECKING, Any

import coldstill.stages.config
import pytest
from coldstill.data.errors import ColdstillError
from coldstill.pipeline.recipe.reading import BUILT_IN, load_recipe

if TYPE_CHECKING:
    from pathlib import Path

WHOLE = """\
name = "r"
seed = 3
[corpus]
files = ["texts"]
[teacher]
model = "ORG/NAME"
[students.small]
architecture = { layers = 2, hidden = 64, heads = 4 }
train = { steps = 5, learning_rate = 2e-3 }
"""


def load(text: str, folder: Path, *settings: str, student: str | None = None) -> Any:
    """The recipe of a text, with overrides."""
    path = folder / "r.toml"
    path.write_text(text, encoding="utf-8")
    return load_recipe(str(path), settings, student).recipe


def fault(text: str, folder: Path, *settings: str, student: str | None = None) -> str:
    """The one-line error for a text, with overrides."""
    with pytest.raises(ColdstillError) as caught:
        load(text, folder, *settings, student=student)
    line = str(caught.value)
    assert "\n" not in line
    return line.replace(str(folder / "r.toml"), "r.toml")


def test_every_built_in_recipe_loads_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for path in BUILT_IN.glob("*.toml"):
        (tmp_path / path.stem).mkdir()  # a folder that is not a run does not hide the recipe
        loaded = load_recipe(path.stem)
        assert loaded.recipe.name == path.stem
        assert loaded.base == tmp_path
        assert loaded.text == path.read_text(encoding="utf-8")


def test_a_recipe_from_any_editor_is_read_and_kept_unchanged(tmp_path: Path) -> None:
    for mark, end in itertools.product((b"", b"\xef\xbb\xbf"), ("\n", "\r\n")):
        content = mark + WHOLE.replace("\n", end).encode()
        (tmp_path / "r.toml").write_bytes(content)
        loaded = load_recipe(str(tmp_path / "r.toml"))
        assert loaded.recipe.seed == 3
        assert loaded.base == tmp_path
        assert loaded.text.encode() == content


def test_a_run_folder_gives_the_validated_recipe(tmp_path: Path) -> None:
    text = WHOLE + '[students.other]\nlike = "small"\nobjective = { cross_entropy = 1.0 }\n'
    (tmp_path / "r.toml").write_text(text, encoding="utf-8")
    loaded = load_recipe(str(tmp_path / "r.toml"), ("seed=9",))
    run = tmp_path / "run"
    run.mkdir()
    stored = {"recipe": json.loads(loaded.recipe.model_dump_json()), "base": str(loaded.base)}
    (run / "recipe.resolved.json").write_text(json.dumps(stored), encoding="utf-8")
    (run / "recipe.toml").write_text(text, encoding="utf-8")
    again = load_recipe(str(run))
    assert again == loaded
    assert again.recipe.seed == 9
    for content in ("[]", "{", "{}", '{"recipe": {}}', '{"recipe": [], "base": 1}'):
        (run / "recipe.resolved.json").write_text(content, encoding="utf-8")
        with pytest.raises(ColdstillError, match=r"recipe\.resolved\.json: "):
            load_recipe(str(run))


def test_a_missing_recipe_is_refused_with_the_known_names(tmp_path: Path) -> None:
    with pytest.raises(ColdstillError, match=r"nothing\.toml: no recipe file.*built in: .*demo"):
        load_recipe("nothing.toml")
    with pytest.raises(ColdstillError, match=r"a folder without recipe\.resolved\.json, so not a"):
        load_recipe(str(tmp_path))
    (tmp_path / "r.toml").write_bytes(b'name = "\xff"')
    with pytest.raises(ColdstillError, match="byte 8 is not valid UTF-8"):
        load_recipe(str(tmp_path / "r.toml"))
    line = fault("name = 'r'\n= 3", tmp_path)
    assert re.fullmatch(r"r\.toml: not valid TOML: .*\(at line 2, column \d+\)", line)
    for line, key in (
        ('name = "r"\n', "name"),
        ('[corpus]\nfiles = ["texts"]\n', "corpus"),
        ('files = ["texts"]\n', "corpus.files"),
        ("steps = 5, ", "students.small.train.steps"),
        ("hidden = 64, ", "students.small.architecture.hidden"),
        ("train = { steps = 5, learning_rate = 2e-3 }\n", "students.small.train"),
    ):
        assert line in WHOLE
        missing = f"r.toml: {key}: missing, and it has no default"
        assert fault(WHOLE.replace(line, ""), tmp_path) == missing


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seed", "sede", "recipe: unknown key 'sede'; did you mean 'seed'? (have: name, seed, "),
        ("files", "file", "corpus: unknown key 'file'; did you mean 'files'? (have: files, "),
        ("model", "modell", "teacher: unknown key 'modell'; did you mean 'model'? (have: model, "),
        ("[teacher]", "[teachers]", "recipe: unknown key 'teachers'; did you mean 'teacher'?"),
        ("hidden", "hiden", "students.small.architecture: unknown key 'hiden'; did you mean 'hid"),
        ("learning_rate", "lr", "students.small.train: unknown key 'lr' (have: steps, batch_to"),
        ("architecture =", "arch =", "students.small: unknown key 'arch'; did you mean 'archite"),
        (
            "[teacher]",
            "[corpus.columns]\ntxt = 'a'\n[teacher]",
            "corpus.columns: unknown key 'txt'; did you mean 'text'? (have: text, prompt, ",
        ),
        ("[teacher]", "[logits]\nheads = 2\n[teacher]", "logits: unknown key 'heads'; did you me"),
        ("[teacher]", "[evaluation]\nhaed = 2\n[teacher]", "evaluation: unknown key 'haed'; did "),
        ("train =", "objective = { kll = 1 }\ntrain =", "students.small.objective: unknown key 'k"),
        (
            'model = "ORG/NAME"',
            "architecture = { layers = 1, hidden = 8, heads = 1 }\ntokenizer = { size = 300 }\n"
            "train = { steps = 1 }",
            "teacher.tokenizer: unknown key 'size' (have: vocabulary)",
        ),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest_and_all_known_ones(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    assert fault(WHOLE.replace(old, new, 1), tmp_path).startswith(f"r.toml: {message}")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("seed=many", "seed: input should be a valid integer"),
        ("seed=-1", "seed: input should be greater than or equal to 0, not -1"),
        ("corpus.files=[]", "corpus.files: tuple should have at least 1 item"),
        ("corpus.files=texts", "corpus.files: input should be a valid tuple, not 'texts'"),
        ("corpus.holdout=1", "corpus.holdout: input should be less than 1, not 1"),
        ("corpus.holdout=0", "corpus.holdout: input should be greater than 0, not 0"),
        ("corpus.pack=perhaps", "corpus.pack: input should be a valid boolean"),
        ("corpus.sequence_length=1", "corpus.sequence_length: input should be greater than or "),
        ("logits.head=-1", "logits.head: input should be greater than or equal to 0, not -1"),
        ("logits.temperatures=[0]", "logits.temperatures.0: input should be greater than 0"),
        ("logits.codec=zip", "logits: codec = 'zip' is unknown (have: compact, plain"),
        ("logits.codec={name='compact',levels=9}", "logits: codec 'compact': levels 9: 15 to 254"),
        ("logits.codec={levels=99}", "logits: codec = None is unknown (have: compact, plain"),
        ("logits.store={name='arrow',zstd=99}", "logits: store 'arrow': zstd 99"),
        ("logits.store=tar", "logits: store = 'tar' is unknown (have: arrow"),
        ("teacher.dtype=fp8", "teacher.dtype: input should be 'auto', 'fp32', 'bf16' or 'fp16'"),
        ("students.small.train.learning_rate=0", "students.small.train.learning_rate: input shou"),
        ("students.small.train.learning_rate=nan", "students.small.train.learning_rate: input "),
        ("students.small.train=5", "students.small.train: "),
        ("students.small=5", "students.small: "),
        ("students=5", "students: "),
        ("corpus=5", "corpus: "),
        ("name=", "name: string should match pattern"),
        ("name=a/b", "name: string should match pattern"),
        ("name=..", "name: string should match pattern"),
        ("name=3", "name: input should be a valid string, not 3"),
    ],
)
def test_a_wrong_value_is_shown_with_the_expected_one(
    tmp_path: Path, setting: str, message: str
) -> None:
    assert fault(WHOLE, tmp_path, setting).startswith(f"r.toml: {message}")


def test_names_temperatures_and_origins_have_rules(tmp_path: Path) -> None:
    for name in ("", "a/b", "../up", ".hidden", "a b", "-x"):
        line = fault(WHOLE.replace("students.small", f'students."{name}"'), tmp_path)
        assert f"'{name}'" in line
        assert "students" in line
    for name in ("", "a/b", ".."):
        assert f"'{name}'" in fault(WHOLE, tmp_path, "students.small.train.steps=9", student=name)
    assert "store nothing" in fault(WHOLE, tmp_path, "logits.head=0", "logits.tail=0")
    for temperatures in ("[1.0]", "[2, 2]", "[2, 1]"):
        line = fault(WHOLE, tmp_path, f"logits.temperatures={temperatures}")
        assert line.endswith("must differ from one another and from 1, always kept")
    assert fault(WHOLE.replace("train =", 'model = "x/y"\ntrain ='), tmp_path) == (
        "r.toml: students.small: needs one of 'architecture', 'model', 'layers' and 'prune', "
        "not both 'architecture' and 'model'"
    )


def test_a_teacher_is_named_or_made_but_not_both(tmp_path: Path) -> None:
    sizes = "architecture = { layers = 1, hidden = 8, heads = 1 }\n"
    both = fault(WHOLE.replace("[teacher]\n", f"[teacher]\n{sizes}"), tmp_path)
    assert both.startswith("r.toml: teacher: has both 'model' and a table for making one")
    half = fault(WHOLE.replace('model = "ORG/NAME"\n', sizes), tmp_path)
    assert half == (
        "r.toml: teacher: needs either 'model' or all of 'architecture', 'tokenizer' and 'train'"
    )


def test_an_existing_teacher_can_be_corrected(tmp_path: Path) -> None:
    def refusal(keys: str) -> str:
        return fault(WHOLE.replace("[teacher]\n", f"[teacher]\n{keys}\n"), tmp_path)

    train = "train = { steps = 3 }\n"
    assert refusal("lora = {}").startswith(
        "r.toml: teacher: has 'lora' without 'train': set the length"
    )
    whole = refusal(f"{train}tokenizer = {{}}")
    assert "teacher: has both 'model' and a table for making one; keep either 'model' (and" in whole
    made = "architecture = { layers = 1, hidden = 8, heads = 1 }\ntokenizer = {}\nlora = {}\n"
    new = fault(WHOLE.replace('model = "ORG/NAME"\n', made + train), tmp_path)
    assert new.startswith("r.toml: teacher: has 'lora' without 'model': the weights of a new")
    for targets, shown in (("'q_proj'", "'q_proj'"), ("[]", "[]"), ("['a', 3]", "['a', 3]")):
        assert refusal(f"{train}lora = {{ targets = {targets} }}") == (
            f"r.toml: teacher.lora.targets: {shown} is neither 'all-linear' nor a list of layer "
            "names such as ['q_proj', 'v_proj']"
        )
    assert "teacher.lora.rank: input should be greater than or equal to 1, not 0" in refusal(
        f"{train}lora = {{ rank = 0 }}"
    )
    assert "teacher.lora: unknown key 'rnk'; did you mean 'rank'? (have: rank, alpha, " in refusal(
        f"{train}lora = {{ rnk = 4 }}"
    )
    text = WHOLE.replace("[teacher]\n", f"[teacher]\n{train}lora = {{ alpha = 8 }}\n")
    path = tmp_path / "corrected.toml"
    path.write_text(text, encoding="utf-8")
    teacher = load_recipe(str(path)).recipe.teacher
    assert teacher.is_trained_here
    assert teacher.lora == coldstill.stages.config.LoraConfig(
        rank=16, alpha=8.0, dropout=0.0, targets="all-linear"
    )


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("seed=7", {"seed": 7}),
        ("name=other-name", {"name": "other-name"}),
        ('name="quoted"', {"name": "quoted"}),
        ("name = spaced ", {"name": "spaced"}),
        ("corpus.holdout=2e-1", {"corpus": {"holdout": 0.2}}),
        ('corpus.separator=""', {"corpus": {"separator": ""}}),
        ("corpus.separator==", {"corpus": {"separator": "="}}),
        ("corpus.pack=false", {"corpus": {"pack": False}}),
        ('corpus.files=["a b", "c"]', {"corpus": {"files": ["a b", "c"]}}),
        ("logits.temperatures=[2, 4.0]", {"logits": {"temperatures": [2.0, 4.0]}}),
        ("corpus.columns.text=body", {"corpus": {"columns": {"text": "body"}}}),
        ("students.small.train.steps=9", {"students": {"small": {"train": {"steps": 9}}}}),
        ("students.small.train.trainer.tf32=true", {}),
        (
            'students.new={ like = "small", objective = { kl = 0.5 } }',
            {"students": {"new": {"objective": {"kl": 0.5}}}},
        ),
        ("students.new.like=small", {"students": {"new": {"train": {"steps": 5}}}}),
    ],
)
def test_any_key_can_be_overridden(tmp_path: Path, setting: str, expected: dict[str, Any]) -> None:
    found = load(WHOLE, tmp_path, setting).model_dump(mode="json")
    assert _part(found, expected) == expected
    if expected:
        assert _part(load(WHOLE, tmp_path).model_dump(mode="json"), expected) != expected


def _part(found: Any, like: Any) -> Any:
    """The keys of `found` that `like` has."""
    if isinstance(like, dict):
        found = found if isinstance(found, dict) else {}
        return {key: _part(found.get(key), inner) for key, inner in like.items()}
    return found


def test_the_last_override_counts_and_wrong_ones_are_refused(tmp_path: Path) -> None:
    assert load(WHOLE, tmp_path, "seed=1", "seed=2").seed == 2
    for setting in ("seed", "=3", "a..b=3", ".seed=3", "a b=3", "seed.=1", ""):
        assert fault(WHOLE, tmp_path, setting) == f"--set {setting}: expected section.key=value"
    line = fault(WHOLE, tmp_path, "seed.high=3")
    assert line == "--set seed.high=3: 'seed' is a value, not a table"


LIKE = WHOLE.replace("heads = 4", "heads = 4, kv_heads = 2") + "[students.other]\n"


def test_like_inherits_the_unset_keys(tmp_path: Path) -> None:
    text = LIKE + 'like = "small"\narchitecture = { layers = 1 }\ntrain = { steps = 7 }\n'
    students = load(text, tmp_path).students
    assert students["other"].architecture.layers == 1
    assert students["other"].architecture.kv_heads == 2
    assert students["other"].train.steps == 7
    assert students["other"].train.learning_rate == 2e-3
    assert students["small"].architecture.layers == 2
    assert students["small"].train.steps == 5


def test_like_can_be_chained_in_any_order(tmp_path: Path) -> None:
    text = LIKE + 'like = "third"\n[students.third]\nlike = "small"\nobjective = { kl = 0.5 }\n'
    students = load(text, tmp_path).students
    assert students["other"] == students["third"]
    assert students["other"].objective.kl == 0.5
    assert students["other"].architecture == students["small"].architecture
    recipe = load(LIKE + 'like = "small"\n', tmp_path, "students.small.train.steps=9")
    assert recipe.students["other"].train.steps == 9, "an override of the other counts too"
    made, named = "architecture = { layers = 2, hidden = 64, heads = 4 }", 'model = "x/y"'
    for first, second in ((made, named), (named, made)):  # its own origin replaces the inherited
        base = WHOLE.replace(made, first)
        students = load(f'{base}[students.other]\nlike = "small"\n{second}\n', tmp_path).students
        assert (students["small"].model is None) != (students["other"].model is None)
    unknown = fault(LIKE + 'like = "smal"\n', tmp_path)
    assert unknown.startswith("r.toml: students.other.like: no student 'smal'")
    circle = fault(LIKE + 'like = "third"\n[students.third]\nlike = "other"\n', tmp_path)
    assert circle.startswith("r.toml: students.")
    assert "is circular: other -> third -> other" in circle
    assert "circular: other -> other" in fault(LIKE + 'like = "other"\n', tmp_path)


def test_a_new_name_makes_a_variant_and_leaves_the_old_student_as_it_was(tmp_path: Path) -> None:
    settings = ("students.small.train.steps=9", "students.small.objective.kl=0.5")
    recipe = load(WHOLE, tmp_path, *settings, student="small2")
    plain = load(WHOLE, tmp_path)
    assert recipe.students["small"] == plain.students["small"]
    assert recipe.students["small2"].train.steps == 9
    assert recipe.students["small2"].objective.kl == 0.5
    assert recipe.students["small2"].architecture == plain.students["small"].architecture
    text = LIKE + 'like = "small"\nobjective = { kl = 0.5 }\n'
    recipe = load(text, tmp_path, "students.other.train.steps=9", student="third")
    assert recipe.students["third"].objective.kl == 0.5
    assert recipe.students["third"].train.steps == 9
    assert recipe.students["other"].train.steps == 5
    recipe = load(WHOLE, tmp_path, "students.small.train.steps=9", student="small")
    assert list(recipe.students) == ["small"]
    assert recipe.students["small"].train.steps == 9


def test_a_variant_of_an_unknown_student_is_refused(tmp_path: Path) -> None:
    line = fault(WHOLE, tmp_path, "students.smal.train.steps=9", student="small2")
    assert line.startswith("--set students.smal: no student 'smal'; did you mean 'small'? (have: ")
    assert line == fault(WHOLE, tmp_path, "students.smal.train.steps=9")
    added = load(WHOLE, tmp_path, "students.other.like=small", "students.other.train.steps=9")
    assert added.students["other"].train.steps == 9
    empty = fault(WHOLE.partition("[students")[0], tmp_path, "students.a.like=b", student="c")
    assert empty == "--set students.a: no student 'a' to make 'c' from (have: none)"
    assert "students: " in fault(
        "students = 5\n" + WHOLE.partition("[st")[0], tmp_path, student="c"
    )
    with pytest.raises(ColdstillError, match=r"r: no student 'small2' \(have: small\); a variant"):
        load(WHOLE, tmp_path, student="small2").student("small2")
