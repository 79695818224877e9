"""Runs whose stores are far away: the same commands, the same students."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from coldstill.data.errors import ColdstillError
from coldstill.data.places.cache import CacheSettings
from coldstill.data.store.reader import open_store
from coldstill.pipeline.recipe.reading import load_recipe
from coldstill.pipeline.recipe.run_folder import open_run, record_recipe, recorded_run
from oracles import cached_bytes, digests

if TYPE_CHECKING:
    from desk import Desk
    from distance import Distance

pytest_plugins = ("desk", "distance")


def far_away(desk: Desk, distance: Distance, **more: str) -> None:
    """Put both stores of the recipe there, with a cache on the desk."""
    keys = {"path": f"{distance.url}/logits", "cache": "300 kB", "cache_folder": "cache"} | more
    lines = "\n".join(f'{key} = "{value}"' for key, value in keys.items())
    desk.edit("[logits]\n", f"[logits]\n{lines}\n")
    desk.edit("[evaluation]\n", f'[evaluation]\npath = "{distance.url}/heldout"\n')


def losses(desk: Desk) -> list[Any]:
    text = (desk.run / "students" / "small" / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line)["loss"] for line in text.splitlines()]


def test_a_run_with_its_stores_far_away_makes_the_same_students(
    finished: Desk, s3: Distance
) -> None:
    before, local = losses(finished), digests(finished.run / "logits")
    shutil.rmtree(finished.run)
    far_away(finished, s3)
    planned = finished.done("plan", "r.toml").stdout
    assert f", to do, in {s3.url}/logits" in planned
    assert " for the cache, " in planned
    s3.network.spoil("denied", r"PUT .*logits/shards/00002\.json", times=1)
    stopped = finished.coldstill("run", "r.toml")
    assert stopped.exit_code == 1
    last = stopped.stderr.splitlines()[-1]
    assert last.startswith(f"error: {s3.url}/logits/shards/00002.json: access refused")
    resumed = finished.done("run", "r.toml")
    assert "teacher-logits train: continuing: 2 of " in resumed.stderr
    far = s3.digests("logits")
    measured = "measurements.json"  # a measurement is never the same
    assert far.keys() == local.keys()
    assert [n for n in far if far[n] != local[n] and n != measured] == []
    assert losses(finished) == before
    assert not (finished.run / "logits").exists()
    assert not (finished.run / "heldout").exists()
    assert 0 < cached_bytes(finished.root / "cache") <= 300_000
    again = finished.done("run", "r.toml").stderr
    assert f"complete: {s3.url}/logits and {s3.url}/heldout" in again
    shown = finished.done("inspect", "runs/r").stdout
    assert f"{s3.url}/logits" in shown


def test_a_run_of_another_corpus_is_still_refused(desk: Desk, memory: Distance) -> None:
    far_away(desk, memory)
    desk.done("teacher-logits", "r.toml")
    line = desk.refused("teacher-logits", "r.toml", "--set", "corpus.sequence_length=16")
    assert "; logits was made from it" in line
    line = desk.refused("teacher-logits", "r.toml", "--set", "logits.head=5")
    assert f"{memory.url}/logits: made differently: capture.head" in line


def test_a_cache_that_is_too_small_is_refused_before_anything_is_trained(
    desk: Desk, memory: Distance
) -> None:
    far_away(desk, memory)
    desk.done("teacher-logits", "r.toml")
    line = desk.refused("train-student", "r.toml", "--set", "logits.cache=9 kB")
    assert line.startswith(f"error: {memory.url}/logits: logits.cache: 9,000 bytes are too few: ")


def test_a_store_that_is_not_there_yet_says_how_to_make_it(desk: Desk, memory: Distance) -> None:
    far_away(desk, memory)
    line = desk.refused("train-student", "r.toml")
    assert line == (
        f"error: {memory.url}/logits: no store there; make it first with coldstill teacher-logits r"
    )


def test_a_store_may_be_in_another_folder_of_this_disk(desk: Desk) -> None:
    desk.edit("[logits]\n", '[logits]\npath = "elsewhere/logits"\n')
    desk.done("teacher-logits", "r.toml")
    assert open_store(desk.root / "elsewhere" / "logits").place.room is None
    assert not (desk.run / "logits").exists()
    assert (desk.run / "heldout" / "manifest.json").exists()


def test_a_run_knows_where_its_stores_are(desk: Desk, memory: Distance) -> None:
    far_away(desk, memory)
    loaded = load_recipe(str(desk.root / "r.toml"))
    run = open_run(desk.root / "runs", "r", loaded)
    assert run.logits == f"{memory.url}/logits"
    assert run.heldout == f"{memory.url}/heldout"
    assert run.cache == CacheSettings(folder=desk.root / "cache", bytes=300_000)
    assert recorded_run(run.root).logits == run.root / "logits"  # nothing is recorded yet
    record_recipe(run, loaded)
    assert recorded_run(run.root) == run


@pytest.mark.parametrize("value", ["20 potatoes", "", "0"])
def test_a_cache_that_is_no_size_is_named(desk: Desk, value: str) -> None:
    with pytest.raises(ColdstillError) as caught:
        load_recipe(str(desk.root / "r.toml"), (f'logits.cache="{value}"',))
    assert str(caught.value).endswith(
        f"r.toml: logits.cache: '{value}' is not a size; write a number and a unit, such as '20 GB'"
    )


def test_a_cache_may_be_given_in_bytes_and_has_a_size_by_itself(desk: Desk) -> None:
    recipe = str(desk.root / "r.toml")
    assert load_recipe(recipe, ("logits.cache=5000",)).recipe.logits.cache == 5000
    assert load_recipe(recipe).recipe.logits.cache == 20 * 10**9
    run = open_run(Path("runs"), "r", load_recipe(recipe))
    assert run.logits == Path("runs/r/logits")
