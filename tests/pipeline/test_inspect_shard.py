"""One shard, as part of its store and by itself."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import numpy as np
import pytest
from coldstill.data.formats import STORES
from coldstill.data.schema import Ragged
from coldstill.data.store.reader import open_store
from inspected import desk_at, shown, write_store

if TYPE_CHECKING:
    from pathlib import Path

    from desk import Desk

pytest_plugins = ("desk", "inspect_fixtures")


@pytest.mark.parametrize("codec", ["plain", "compact"])
@pytest.mark.parametrize("store", list(STORES))
def test_one_shard_is_shown_as_part_of_its_store(tmp_path: Path, store: str, codec: str) -> None:
    write_store(tmp_path / "s", store=store, codec=codec)
    desk, name = desk_at(tmp_path), f"s/shards/00002{STORES[store].suffix}"
    facts = shown(desk, name)
    part = open_store(tmp_path / "s").read(np.arange(8, 10))
    assert (facts["shard"], facts["rows"], facts["sequences"]) == (2, [8, 10], 2)
    assert facts["positions"] == len(part.targets)
    loss = -part.targets.label_logprob.mean()
    assert facts["teacher_loss"] == pytest.approx(loss, abs=0.01)
    assert sum(facts["histograms"]["entropy"]["positions"]) == len(part.targets)
    columns = {column["name"]: column for column in facts["columns"]}
    assert columns["token_ids"]["values"] == len(part.sequences.tokens.values)
    assert columns["head_ids"]["values"] == len(part.targets)
    text = desk.done("inspect", name).stdout
    assert "this shard  2: sequences 8 to 9; all lines below are about it alone" in text


def test_a_shard_is_found_from_inside_its_folder(alone: Desk) -> None:
    inside = desk_at(alone.root / "s" / "shards")
    assert shown(inside, "00002.arrow")["rows"] == [8, 10]
    assert shown(desk_at(alone.root / "s"), "shards/00002.arrow")["rows"] == [8, 10]


@pytest.mark.parametrize("codec", ["plain", "compact"])
@pytest.mark.parametrize("store", list(STORES))
def test_a_shard_without_a_manifest_shows_its_columns(
    tmp_path: Path, store: str, codec: str
) -> None:
    block = write_store(tmp_path / "s", store=store, codec=codec)
    suffix = STORES[store].suffix
    shard, lone = tmp_path / "s" / "shards" / f"00000{suffix}", tmp_path / f"lone{suffix}"
    (shutil.copytree if shard.is_dir() else shutil.copy)(shard, lone)
    desk = desk_at(tmp_path)
    facts = shown(desk, lone.name)
    assert (facts["store"], facts["path"]) == (store, lone.name)
    files = [path for path in [lone, *lone.rglob("*")] if path.is_file()]
    assert facts["bytes"] == sum(path.stat().st_size for path in files)
    columns = open_store(tmp_path / "s").manifest.make_codec("").encode(block.take(np.arange(4)))
    assert {column["name"] for column in facts["columns"]} == set(columns)
    for found in facts["columns"]:
        column = columns[found["name"]]
        values = column.values if isinstance(column, Ragged) else column
        kind = values.dtype.name + "".join(f" x {width}" for width in values.shape[1:])
        assert (found["type"], found["values"]) == (kind, len(values))
        assert (found["rows"], found["list"]) == (4, isinstance(column, Ragged))
    text = desk.done("inspect", lone.name).stdout
    assert text.startswith("there is no manifest.json in ")
    assert "holds       4 sequences" in text
    assert max(map(len, text.splitlines()[2:])) <= 100
    for view in (["--sequence", "0"], ["--html", "p.html"]):
        line = desk.refused("inspect", lone.name, *view)
        assert line.endswith("without it no target can be read")


def test_a_shard_without_a_commit_record_is_shown_alone(alone: Desk) -> None:
    (alone.root / "s" / "shards" / "00001.json").unlink()
    facts = shown(alone, "s/shards/00001.arrow")
    assert facts["note"].startswith("the store s has no commit record of it")
    assert "manifest" not in facts


@pytest.mark.parametrize("store", list(STORES))
def test_a_damaged_shard_is_one_line(tmp_path: Path, store: str) -> None:
    write_store(tmp_path / "s", store=store)
    shard = tmp_path / "s" / "shards" / f"00001{STORES[store].suffix}"
    largest = max([shard, *shard.rglob("*")], key=lambda p: p.stat().st_size if p.is_file() else 0)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 255
    largest.write_bytes(content)
    desk = desk_at(tmp_path)
    name = str(shard.relative_to(tmp_path))
    for arguments in ([name], ["s", "--sequence", "5"], ["s", "--html", "p.html"]):
        line = desk.refused("inspect", *arguments)
        assert "damaged: its checksum is not the one it was written with" in line
    desk.done("inspect", "s")  # from the commit records, which are whole
    desk.done("inspect", "s", "--sequence", "0")


def test_a_missing_shard_is_refused(alone: Desk) -> None:
    for name in ("lone.arrow", "s/shards/00009.arrow", "lone.zarr"):
        assert alone.refused("inspect", name) == f"error: {name}: does not exist"


def test_a_file_that_only_looks_like_a_shard_is_refused(tmp_path: Path) -> None:
    desk = desk_at(tmp_path)
    for content in (b"", b"ARROW1\0\0", b"no table at all"):
        desk.write("lone.arrow", content)
        desk.write("lone.zarr/zarr.json", content)
        assert "lone.arrow: not a whole Arrow file: " in desk.refused("inspect", "lone.arrow")
        assert "lone.zarr: not a whole Zarr group: " in desk.refused("inspect", "lone.zarr")
