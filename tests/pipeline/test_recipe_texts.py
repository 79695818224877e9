"""Recipes as texts: the starter of `init`, edits by `plan --write`, and the reference."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

import coldstill.pipeline
import pytest
import tomlkit
from coldstill.data.errors import ColdstillError
from coldstill.pipeline.recipe.reading import load_recipe
from coldstill.pipeline.recipe.reference import (
    BEGIN,
    END,
    RENEW,
    explained,
    main,
    markdown,
    names_at,
    overview,
    renewed,
    table_kinds,
)
from coldstill.pipeline.recipe.writing import write_capture, write_starter

if TYPE_CHECKING:
    from desk import Desk

pytest_plugins = ("desk",)


def test_the_starter_is_a_recipe_once_its_placeholders_are_filled_in(
    desk: Desk, texts: Path, teacher_folder: Path
) -> None:
    result = desk.done("init", "mine")
    assert result.stdout.startswith(f"wrote {desk.root}/mine.toml; name your texts (corpus.files)")
    assert "mine.toml: exists already" in desk.refused("init", "mine.toml")
    assert result.stderr == "next: coldstill plan mine\n"
    path = desk.root / "mine.toml"
    text = path.read_text(encoding="utf-8")
    assert load_recipe(str(path)).recipe.name == "mine"
    assert "'texts/': no such file or folder" in desk.refused("plan", "mine.toml")
    text = text.replace("texts/", str(texts)).replace("ORG/NAME", str(teacher_folder))
    path.write_text(text, encoding="utf-8")
    plan = desk.done("plan", "mine.toml").stdout
    assert "60 files" in plan
    assert " parameters, 2,000 steps of 65,536 tokens, to do" in plan


def test_the_starter_without_a_teacher_reports_what_is_missing(
    desk: Desk, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    desk.done("init", "mine")
    line = desk.refused("teacher-logits", "mine.toml", "--set", f'corpus.files=["{texts}"]')
    assert line.startswith(
        "error: teacher.model: no tokenizer in ORG/NAME (not a folder here, so taken as a "
    )


def test_the_starter_shows_every_table_and_explains_its_lines(tmp_path: Path) -> None:
    text = write_starter(tmp_path, "mine").read_text(encoding="utf-8")
    assert list(tomllib.loads(text)) == ["name", "seed", "corpus", "teacher", "logits", "students"]
    assert text.count("#") >= 8
    assert max(len(line) for line in text.splitlines()) <= 100


def test_a_starter_needs_a_free_name_that_can_be_a_folder(desk: Desk) -> None:
    desk.write("mine.toml", "precious")
    line = desk.refused("init", "mine")
    assert line == f"error: {desk.root}/mine.toml: exists already; choose another name or edit it"
    before = desk.snapshot()
    for name in ("", "a/b", "../up", ".hidden", "a b", "-x", "x\n"):
        with pytest.raises(ColdstillError, match="cannot name a run"):
            write_starter(desk.root, name)
    assert desk.snapshot() == before


TOP = '# mine\nname = "r"\n'
CASES = [
    (
        "[logits]  # kept\nhead = 16   # k\ntail=0x10\nshard_tokens = 4\n",
        "[logits]  # kept\nhead = 4   # k\ntail=20\nshard_tokens = 4\n",
    ),
    ("[logits]\ntail = 1\n[students]\n", "[logits]\ntail = 20\nhead = 4\n[students]\n"),
    ("[ logits ]\n[a]\nhead = 3\n", "[ logits ]\nhead = 4\ntail = 20\n[a]\nhead = 3\n"),
    ("[logits]\r\nhead = 16\r\n# end\r\n", "[logits]\r\nhead = 4\r\ntail = 20\r\n# end\r\n"),
    ("[logits]\nhead=1\n\n# next\n[a]\n", "[logits]\nhead=4\ntail = 20\n\n# next\n[a]\n"),
    ("[logits]", "[logits]\nhead = 4\ntail = 20\n"),
    ("[a]\nhead = 1\n", "[a]\nhead = 1\n\n[logits]\nhead = 4\ntail = 20\n"),
    ("", "\n[logits]\nhead = 4\ntail = 20\n"),
    ("[logits.codec]\nname='plain'\n[logits]\nhead=1\n[a]\n",
     "[logits.codec]\nname='plain'\n[logits]\nhead=4\ntail = 20\n[a]\n"),
    ("[logits]\n  head = 1_6 \n\ttail = +2#x", "[logits]\n  head = 4 \n\ttail = 20#x"),
    ("logits = { head = 16, tail = 16 } # c\n", "logits = { head = 4, tail = 20 } # c\n"),
    ("logits.head = 16\nlogits.tail = 3 # x\n", "logits.head = 4\nlogits.tail = 20 # x\n"),
    ("[logits]\n'head' = 16\ntail = 1\n", "[logits]\n'head' = 4\ntail = 20\n"),
    ('["logits"]\nhead = [\n16]\n', '["logits"]\nhead = 4\ntail = 20\n'),
    ('n = """\n[logits]\nhead = 16\n"""\n[logits]\nhead = 1\ntail = 1\n',
     'n = """\n[logits]\nhead = 16\n"""\n[logits]\nhead = 4\ntail = 20\n'),
]  # fmt: skip


@pytest.mark.parametrize(("before", "after"), CASES)
@pytest.mark.parametrize("start", ["", "\ufeff"], ids=["plain", "bom"])
def test_only_the_two_numbers_change(tmp_path: Path, before: str, after: str, start: str) -> None:
    newline = "\r\n" if "\r\n" in before else "\n"
    top = start + TOP.replace("\n", newline)
    path = tmp_path / "r.toml"
    path.write_bytes((top + before).encode())
    path.chmod(0o640)
    assert write_capture(path, 4, 20)
    text = path.read_bytes().decode()
    assert text == top + after
    table = tomllib.loads(text.removeprefix("\ufeff"))
    assert (table["logits"]["head"], table["logits"]["tail"]) == (4, 20)
    assert path.stat().st_mode & 0o777 == 0o640
    assert not write_capture(path, 4, 20), "the second time nothing changes"
    assert path.read_bytes().decode() == text


def test_an_edit_that_would_change_more_is_refused_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "r.toml"
    path.write_text("[logits]\nhead = 1\n", encoding="utf-8")
    for wrong in ("[logits]\nhead = 4\ntail = 20\nother = 1\n", "[logits"):
        monkeypatch.setattr(tomlkit, "dumps", lambda _, wrong=wrong: wrong)
        with pytest.raises(ColdstillError, match="tail = 20 by hand") as caught:
            write_capture(path, 4, 20)
        assert "\n" not in str(caught.value)
    assert path.read_text(encoding="utf-8") == "[logits]\nhead = 1\n"
    assert [p.name for p in tmp_path.iterdir()] == ["r.toml"]


def test_a_symbolic_link_stays_a_link(tmp_path: Path) -> None:
    real = tmp_path / "real.toml"
    real.write_text("[logits]\nhead = 1\ntail = 1\n", encoding="utf-8")
    link = tmp_path / "link.toml"
    link.symlink_to(real)
    write_capture(link, 4, 20)
    assert link.is_symlink()
    assert real.read_text(encoding="utf-8") == "[logits]\nhead = 4\ntail = 20\n"


PAGE = Path(coldstill.pipeline.__file__).parent / "README.md"


def test_the_reference_in_the_readme_is_up_to_date() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text == renewed(text), f"renew it with: {RENEW} pipeline/README.md"


def test_the_reference_is_renewed_between_its_markers_only(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold{END}\nafter\n", encoding="utf-8")
    main([str(page)])
    assert page.read_text(encoding="utf-8") == f"before\n{BEGIN}\n\n{markdown()}\n{END}\nafter\n"
    with pytest.raises(ColdstillError, match="needs <!-- recipe reference: begin --> and"):
        renewed("a page without markers")


def test_every_key_has_a_type_a_default_and_a_meaning_that_stands_alone() -> None:
    found = {f"{table.places[0]}.{key.name}": key for table in table_kinds() for key in table.keys}
    assert len(found) > 120
    for name, key in found.items():
        assert key.meaning[0].isupper() or key.meaning[0] in "`-", name
        assert key.meaning.endswith("."), name
        assert key.values, name
    kinds = {
        "corpus.sequence_length": ("integer at least 2", "1024"),
        "corpus.holdout": ("number above 0 and below 1", "0.02"),
        "corpus.files": ("list of strings", "required"),
        "corpus.separator": ("string", "unset"),
        "teacher.dtype": ('one of "auto", "fp32", "bf16", "fp16"', '"auto"'),
        "teacher.architecture.tied": ("true or false", "true"),
        "logits.temperatures": ("list of numbers above 0 and at most 100", "[]"),
        "logits.cache": ('bytes: an integer, or a string such as "20 GB"', "20000000000"),
        "students.NAME.layers": ("list of integers, or table", "unset"),
        "students.NAME.objective.kl": ("number at least 0, or table", "1.0"),
        "students.NAME.prune.parameters": ('integer at least 1, or share such as "50%"', "unset"),
    }
    assert {name: (found[name].values, found[name].default) for name in kinds} == kinds
    places = [table.places for table in table_kinds()]
    assert ("teacher.train", "students.NAME.train") in places
    assert ("students.NAME.objective.KEY", "students.NAME.rounds.objective.KEY") in places
    assert names_at([]) == ["name", "seed", "corpus", "teacher", "logits", "evaluation", "students"]
    assert names_at(["students", "small", "prune", "0"])[0] == "layers"


def test_a_name_or_the_end_of_one_is_explained() -> None:
    for name, titles in (
        ("corpus.columns", ["corpus.columns", "corpus"]),
        ("students.small.train.steps", ["teacher.train, students.NAME.train"]),
        ("objective.kl", ["students.NAME.objective, students.NAME.rounds.objective"]),
        ("seed", ["recipe", "teacher.train, students.NAME.train"]),
        ("recipe", ["recipe"]),
    ):
        text = explained(name)
        assert [line for line in text.splitlines() if line[:1].strip()] == titles
        assert max(map(len, text.splitlines())) <= 100
    for name, near in (
        ("stepps", "steps"), ("students.a.train.stps", "students.NAME.train.steps"),
        ("students.train.steps", "students.NAME.train.steps"), ("corpus.colums", "corpus.columns"),
    ):  # fmt: skip
        message = f"no table or key .{name}.; did you mean '{near}'"
        with pytest.raises(ColdstillError, match=message):
            explained(name)
    with pytest.raises(ColdstillError, match=r"no table or key 'xyzzy' \("):
        explained("xyzzy")


def test_the_command_prints_all_tables_one_of_them_or_one_line(desk: Desk) -> None:
    assert desk.done("recipe-help").stdout == overview() + "\n"
    for table in table_kinds():
        assert f"\n{', '.join(table.places)}\n  " in f"\n{overview()}" or table.places == ("",)
    one = desk.done("recipe-help", "logits.head").stdout
    assert one.startswith(
        "logits\n  head: integer at least 0; default 0\n      How many of the most"
    )
    line = desk.refused("recipe-help", "heda")
    assert "a recipe has no table or key 'heda'; did you mean 'head'?" in line
