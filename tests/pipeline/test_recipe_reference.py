"""The recipe reference: complete, up to date in pipeline/README.md, and printed by recipe-help."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import coldstill.pipeline
import pytest
from coldstill.data.errors import ColdstillError
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
    tables,
)

if TYPE_CHECKING:
    from desk import Desk

pytest_plugins = ("desk",)

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
    found = {f"{table.places[0]}.{key.name}": key for table in tables() for key in table.keys}
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


def test_tables_are_listed_once_with_all_their_places() -> None:
    places = [table.places for table in tables()]
    assert ("teacher.train", "students.NAME.train") in places
    assert ("students.NAME.objective.KEY",) in places
    assert names_at([]) == ["name", "seed", "corpus", "teacher", "logits", "evaluation", "students"]
    assert names_at(["students", "small", "prune", "0"])[0] == "layers"


@pytest.mark.parametrize(
    ("name", "titles"),
    [
        ("corpus.columns", ["corpus.columns", "corpus"]),
        ("students.small.train.steps", ["teacher.train, students.NAME.train"]),
        ("objective.kl", ["students.NAME.objective"]),
        ("seed", ["recipe", "teacher.train, students.NAME.train"]),
        ("recipe", ["recipe"]),
    ],
)
def test_a_name_or_the_end_of_one_is_explained(name: str, titles: list[str]) -> None:
    text = explained(name)
    assert [line for line in text.splitlines() if line[:1].strip()] == titles
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("stepps", "steps"),
        ("students.a.train.stps", "students.NAME.train.steps"),
        ("students.train.steps", "students.NAME.train.steps"),
        ("corpus.colums", "corpus.columns"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(name: str, near: str) -> None:
    with pytest.raises(ColdstillError, match=f"no table or key .{name}.; did you mean '{near}'"):
        explained(name)
    with pytest.raises(ColdstillError, match=r"no table or key 'xyzzy' \("):
        explained("xyzzy")


def test_the_command_prints_all_tables_one_of_them_or_one_line(desk: Desk) -> None:
    assert desk.done("recipe-help").stdout == overview() + "\n"
    for table in tables():
        assert f"\n{', '.join(table.places)}\n  " in f"\n{overview()}" or table.places == ("",)
    one = desk.done("recipe-help", "logits.head").stdout
    assert one.startswith(
        "logits\n  head: integer at least 0; default 0\n      How many of the most"
    )
    line = desk.refused("recipe-help", "heda")
    assert "a recipe has no table or key 'heda'; did you mean 'head'?" in line
