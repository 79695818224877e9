"""What does not fit, or may not be written, is told before a teacher is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from coldstill.data.errors import ColdstillError
from coldstill.pipeline.planning.room import existing, expect_room, expect_writable
from coldstill.pipeline.recipe.reading import load_recipe
from coldstill.pipeline.recipe.run_folder import open_run

if TYPE_CHECKING:
    from desk import Desk

pytest_plugins = ("desk",)


def free(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("U", (), {"free": count})())


def missing(desk: Desk, *arguments: str) -> int:
    stores = json.loads(desk.coldstill("plan", "r.toml", "--json", *arguments).stdout)["stores"]
    return sum(store["bytes_missing"] for store in stores.values())


def test_a_disk_that_is_too_small_ends_a_plan_with_1_after_its_figures(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = missing(desk)
    assert needed > 1000
    before = desk.snapshot()
    free(monkeypatch, needed - 1)
    result = desk.coldstill("plan", "r.toml")
    assert result.exit_code == 1
    assert result.stdout.splitlines()[-1].endswith(" free: not enough")
    lines = result.stderr.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: runs/r/logits and runs/r/heldout: about ")
    assert "logits.path" in lines[0]
    assert json.loads(desk.coldstill("plan", "r.toml", "--json").stdout)["free_bytes"] == needed - 1
    free(monkeypatch, needed)
    desk.done("plan", "r.toml")
    assert desk.snapshot() == before


def test_only_what_is_missing_has_to_fit(finished: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_recipe(str(finished.root / "r.toml"))
    run = open_run(finished.root / "runs", "r", loaded)
    free(monkeypatch, 0)
    expect_room(loaded, run)
    (finished.run / "logits" / "shards" / "00001.json").unlink()
    with pytest.raises(ColdstillError, match=r"runs/r/logits: .* and 0 B are free; free some"):
        expect_room(loaded, run)
    free(monkeypatch, missing(finished))
    expect_room(loaded, run)


def test_a_distant_store_needs_no_room_here(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.edit("[logits]\n", '[logits]\npath = "memory://room/logits"\n')
    desk.edit("[evaluation]\n", '[evaluation]\npath = "memory://room/heldout"\n')
    free(monkeypatch, 0)
    loaded = load_recipe(str(desk.root / "r.toml"))
    expect_room(loaded, open_run(desk.root / "runs", "r", loaded))


def test_a_folder_below_a_file_is_refused(desk: Desk) -> None:
    desk.write("taken", "a file")
    result = desk.coldstill("plan", "r.toml", "--set", "logits.path=taken/logits")
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert f"{desk.root / 'taken'} is a file" in result.stderr


def test_a_folder_that_refuses_is_named_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    expect_writable(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(ColdstillError) as told:
        expect_writable(tmp_path / "a" / "b")
    where, reason = str(told.value).split(": cannot be written: ")
    assert where == str(tmp_path / "a" / "b")
    assert reason.startswith(f"Permission denied in {tmp_path}; ")


def test_the_nearest_folder_that_is_there(tmp_path: Path) -> None:
    assert existing(tmp_path / "a" / "b") == tmp_path
    assert existing(tmp_path) == tmp_path
