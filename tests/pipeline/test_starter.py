"""The recipe that `coldstill init` writes."""

from __future__ import annotations

import tomllib
from typing import TYPE_CHECKING

import pytest
from coldstill.data.errors import ColdstillError
from coldstill.pipeline.recipe.reading import load_recipe
from coldstill.pipeline.recipe.writing import write_starter

if TYPE_CHECKING:
    from pathlib import Path

    from desk import Desk

pytest_plugins = ("desk",)


def test_the_starter_is_a_recipe_once_its_placeholders_are_filled_in(
    desk: Desk, texts: Path, teacher_folder: Path
) -> None:
    result = desk.done("init", "mine")
    assert result.stdout == f"wrote {desk.root}/mine.toml\n"
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


def test_an_existing_recipe_is_never_replaced(desk: Desk) -> None:
    desk.write("mine.toml", "precious")
    line = desk.refused("init", "mine")
    assert line == f"error: {desk.root}/mine.toml: exists already; choose another name or edit it"


@pytest.mark.parametrize("name", ["", "a/b", "../up", ".hidden", "a b", "-x", "x\n"])
def test_a_starter_needs_a_name_that_can_be_a_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(ColdstillError, match="cannot name a run"):
        write_starter(tmp_path, name)
    assert list(tmp_path.iterdir()) == []
