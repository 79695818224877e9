"""The run folder: its places, its records, and where none may be."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import coldstill.pipeline.recipe.run_folder
import pytest
from coldstill.data.errors import ColdstillError
from coldstill.pipeline.recipe.reading import load_recipe
from coldstill.pipeline.recipe.run_folder import Run, open_run

if TYPE_CHECKING:
    from desk import Desk

pytest_plugins = ("desk",)


def test_every_place_lies_inside_the_run(tmp_path: Path) -> None:
    run = open_run(tmp_path, "r")
    places = [getattr(run, name) for name in dir(Run) if not name.startswith("_")]
    # beside it, because it is there before the run is
    paths = [p for p in places if isinstance(p, Path) and p != run.preparing]
    assert run.preparing == tmp_path / ".r.preparing"
    assert len(paths) >= 9
    assert all(path.is_relative_to(tmp_path / "r") for path in paths)
    assert run.student("s").model == tmp_path / "r" / "students" / "s" / "model"
    assert not run.root.exists(), "naming a run must not make it"


def test_the_recipe_is_recorded_as_written_and_as_validated(finished: Desk) -> None:
    assert (finished.run / "recipe.toml").read_bytes() == (finished.root / "r.toml").read_bytes()
    stored = finished.json("recipe.resolved.json")
    loaded = load_recipe(str(finished.root / "r.toml"))
    assert stored["recipe"] == json.loads(loaded.recipe.model_dump_json())
    assert Path(stored["base"]).is_absolute()


def test_the_environment_is_recorded(finished: Desk) -> None:
    machine = finished.json("env.json")
    assert machine["torch"] == version("torch")
    assert machine["coldstill"] == coldstill.__version__
    assert {"python", "platform", "transformers", "pyarrow", "numpy", "tokenizers"} <= set(machine)


def test_only_begun_students_are_named_in_order(tmp_path: Path) -> None:
    run = open_run(tmp_path, "r")
    assert run.student_names == []
    for name in ("b", "a", "empty"):
        run.student(name).root.mkdir(parents=True)
    for name in ("b", "a"):
        run.student(name).settings.write_text("{}", encoding="utf-8")
    assert run.student_names == ["a", "b"]


@pytest.mark.parametrize("room", ["pipeline", "stages", "data", "tests"])
def test_a_run_inside_a_source_room_is_refused(room: str, tmp_path: Path) -> None:
    source = Path(coldstill.pipeline.recipe.run_folder.__file__).resolve().parents[2]
    with pytest.raises(ColdstillError, match=rf"own source \({room}/\); choose another folder"):
        open_run(source / room, "r")
    (tmp_path / "link").symlink_to(source / room)
    with pytest.raises(ColdstillError, match="own source"):
        open_run(tmp_path / "link", "r")
    with pytest.raises(ColdstillError, match="own source"):
        open_run(source, room)
    assert open_run(source / "runs", room).root == source / "runs" / room
