"""What a recipe will do and cost."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
from coldstill.data.reader import open_store
from coldstill.data.schema import Capture
from coldstill.pipeline.plan import expected_bytes

if TYPE_CHECKING:
    from pathlib import Path

    from desk import Desk

pytest_plugins = ("desk",)


def facts(desk: Desk, *arguments: str) -> Any:
    """The plan as JSON."""
    return json.loads(desk.done("plan", "r.toml", "--json", *arguments).stdout)


def test_a_plan_before_anything_is_done_touches_nothing_and_estimates(
    desk: Desk, texts: Path
) -> None:
    before = desk.snapshot()
    plan = facts(desk)
    text = desk.done("plan", "r.toml").stdout
    assert desk.snapshot() == before
    assert not (desk.root / "runs").exists()
    size = sum(path.stat().st_size for path in texts.iterdir())
    assert plan["source_bytes"] == size
    assert plan["sources"] == 60
    assert plan["counted"] is False
    assert sum(store["positions"] for store in plan["stores"].values()) <= size // 4
    assert plan["students"] == {
        name: {"steps": 3, "tokens": 768, "done": False} for name in ("small", "baseline")
    }
    assert plan["free_bytes"] > 0
    lines = text.splitlines()
    assert [line.split()[0] for line in lines] == [
        "corpus",
        "teacher",
        "train",
        "heldout",
        "student",
        "student",
        "disk",
    ]
    assert lines[2].endswith("to do")
    assert "about" in lines[2]


def test_a_plan_afterwards_counts_and_says_what_is_done(finished: Desk) -> None:
    plan = facts(finished)
    assert plan["counted"] is True
    assert all(student["done"] for student in plan["students"].values())
    for split, folder in (("train", "logits"), ("heldout", "heldout")):
        store = open_store(finished.run / folder)
        said = plan["stores"][split]
        assert (said["shards_done"], said["shards"]) == (store.manifest.shards,) * 2
        if split == "train":
            assert said["positions"] == store.positions
            stored = sum(commit.bytes for commit in store.commits())
            assert said["bytes"] == pytest.approx(stored, rel=1.2)  # small files are mostly frame
    text = finished.done("plan", "r.toml").stdout
    assert "to do" not in text
    assert "about" not in text


def test_a_plan_of_a_killed_capture_counts_its_shards(finished: Desk) -> None:
    (finished.run / "logits" / "shards" / "00001.json").unlink()
    said = facts(finished)["stores"]["train"]
    assert said["shards_done"] == said["shards"] - 1
    assert f"{said['shards_done']} of {said['shards']} shards" in (
        finished.done("plan", "r.toml").stdout
    )


def test_a_sample_of_the_corpus_is_planned_as_one(finished: Desk) -> None:
    whole = facts(finished)["stores"]["train"]["positions"]
    half = facts(finished, "--set", "logits.sequences=10")["stores"]["train"]["positions"]
    sequences = facts(finished)["sequences"]["train"]
    assert half == pytest.approx(whole * 10 / sequences, abs=1)


def test_a_disk_that_is_too_small_is_told_in_time(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("U", (), {"free": 10})())
    assert desk.done("plan", "r.toml").stdout.splitlines()[-1].endswith("10 B free: not enough")


@pytest.mark.parametrize(
    ("capture", "expected"),
    [
        (Capture(head=16, tail=0), 16 * 8 + 12),
        (Capture(head=0, tail=16), 16 * 4 + 12),
        (Capture(head=16, tail=16, tail_logprobs=True), 16 * 8 + 16 * 8 + 12),
        (Capture(head=16, tail=16, temperatures=(2.0,)), 16 * 8 + 16 * 8 + 12 + 4),
    ],
)
def test_a_position_costs_what_its_columns_hold(capture: Capture, expected: int) -> None:
    assert expected_bytes(capture, "plain") == expected + 8  # its token, position and borders


def test_a_compact_store_is_about_as_large_as_foretold(desk: Desk) -> None:
    foretold = facts(desk)["stores"]["train"]["bytes_per_position"]
    desk.done("teacher-logits", "r.toml")
    store = open_store(desk.run / "logits")
    # of a store of a few hundred positions much is file format
    stored = sum(commit.bytes for commit in store.commits()) / store.positions
    assert foretold < stored < 20 * foretold


def test_the_built_in_recipe_can_be_planned_on_any_machine(desk: Desk) -> None:
    text = desk.done("plan", "demo").stdout
    assert "teacher      trained here, not yet" in text
    assert "students" not in text
