"""Checks of whole shards: their order, their statistics, and whether they can be read."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from coldstill.data.errors import ColdstillError
from coldstill.data.maintenance.merge import merge
from coldstill.data.maintenance.shard import SequenceOrder
from coldstill.data.maintenance.verify import leftovers, repair, uncached, verify
from coldstill.data.places.local import LocalPlace
from coldstill.data.store.manifest import Part, read_manifest
from coldstill.data.store.reader import open_store
from coldstill.data.store.writer import ShardWriter
from oracles import digests, manifest_for, random_block, write_missing

if TYPE_CHECKING:
    from coldstill.data.schema import Block
    from coldstill.data.store.commit import Commit, ShardStatistics
    from coldstill.data.store.manifest import Manifest
    from distance import Distance

pytest_plugins = ("distance",)

BLOCK = random_block(0, 10)  # three shards, of which the last is short, of two blocks each
TOKENIZER = "tokenizer: not there; its ids can no longer be read as text"
UNORDERED = "a sequence id that is not above the one before"


def said(path: Path | str) -> list[str]:
    """All problems except the missing tokenizer of these stores."""
    lines = [str(problem) for problem in verify(str(path))]
    return [line for line in lines if not line.endswith(TOKENIZER)]


def make(root: Path | str, block: Block = BLOCK, **options: Any) -> Manifest:
    manifest = manifest_for(block, **options)
    write_missing(root, manifest, block)
    return manifest


def rearranged(*rows: int) -> Block:
    return BLOCK.take(np.array(rows))


@pytest.mark.parametrize("store", ["arrow", "zarr"])
@pytest.mark.parametrize("codec", ["compact", "plain"])
@pytest.mark.parametrize(
    ("rows", "wrong"),
    [
        ((0, 2, 3, 5, 6, 7, 8, 9), []),
        ((0, 1, 3, 2, 4, 5, 6, 7), ["shard 0, sequence 3"]),  # the first of a block
        ((0, 2, 1, 3, 4, 5, 6, 7), ["shard 0, sequence 2"]),  # inside one
        ((0, 1, 2, 7, 4, 5, 6, 8), ["shard 1, sequence 4"]),  # the first of a shard
        ((0, 1, 2, 3, 0, 1, 2, 3), ["shard 1, sequence 4"]),  # a shard that comes twice
        (
            (5, 5, 6, 6, 7, 8, 9, 9),
            [f"shard {s}, sequence {r}" for s, r in ((0, 1), (0, 3), (1, 7))],
        ),
    ],
)
def test_sequences_out_of_order_are_found(
    tmp_path: Path, store: str, codec: str, rows: tuple[int, ...], wrong: list[str]
) -> None:
    make(tmp_path, rearranged(*rows), store=store, codec=codec)
    assert said(tmp_path) == [f"{where}: {UNORDERED}" for where in wrong]
    dropped = sorted({int(where.split()[1].rstrip(",")) for where in wrong})
    assert repair(str(tmp_path)).dropped == dropped


def test_a_gap_does_not_hide_disorder(tmp_path: Path) -> None:
    make(tmp_path, rearranged(0, 1, 2, 3, 4, 5, 6, 7, 2, 9))
    (tmp_path / "shards" / "00001.json").unlink()
    (tmp_path / "shards" / "00001.arrow").unlink()
    assert said(tmp_path) == ["shard 1: not there", f"shard 2, sequence 8: {UNORDERED}"]


def test_each_part_of_a_merged_store_has_its_own_order(tmp_path: Path) -> None:
    other = random_block(5, 7)
    make(tmp_path / "a")
    manifest = manifest_for(other)
    manifest = replace(manifest, corpus=replace(manifest.corpus, fingerprint="5" * 64))
    write_missing(tmp_path / "b", manifest, other)
    merge([f"{tmp_path}/a", f"{tmp_path}/b"], f"{tmp_path}/ab", None, None)
    assert said(tmp_path / "ab") == []


def test_order_is_followed_within_parts_and_across_calls() -> None:
    part = Part(corpus="x", documents=1, packing="y", sequences=3)
    order = SequenceOrder(replace(manifest_for(BLOCK), parts=(part, replace(part, sequences=4))))
    assert order.first_break(0, np.array([4, 7])) is None
    assert order.first_break(2, np.array([9, 0, 1])) is None  # the second part begins at 3
    assert order.first_break(5, np.array([], np.int64)) is None
    assert order.first_break(5, np.array([1, 5])) == 0
    alone = SequenceOrder(manifest_for(BLOCK))
    assert alone.first_break(0, np.array([4, 7, 7, 3])) == 2
    assert alone.first_break(4, np.array([4, 5])) is None


def test_every_damaged_block_of_a_shard_is_reported(tmp_path: Path) -> None:
    entropy = BLOCK.targets.entropy.copy()
    borders = BLOCK.sequences.positions.offsets
    entropy[borders[[0, 3, 9]]] = 99.0  # in both blocks of shard 0, and in shard 2
    broken = replace(BLOCK, targets=replace(BLOCK.targets, entropy=entropy))
    make(tmp_path, broken)
    found = [problem for problem in verify(str(tmp_path)) if problem.shard is not None]
    assert [(problem.shard, problem.sequence) for problem in found] == [(0, 0), (0, 3), (2, 9)]
    starts = [int(BLOCK.sequences.positions[row][0]) for row in (0, 3, 9)]
    assert [problem.position for problem in found] == starts


def test_a_block_that_cannot_be_decoded_does_not_hide_the_next(tmp_path: Path) -> None:
    capture = replace(BLOCK.capture, tail=BLOCK.capture.tail + 1)
    manifest = make(tmp_path, codec="plain")
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "kept").mkdir()
    (tmp_path / "shards").rename(tmp_path / "kept" / "shards")
    with ShardWriter(tmp_path, replace(manifest, capture=capture)):
        (tmp_path / "kept" / "shards").rename(tmp_path / "shards")
    lines = said(tmp_path)
    assert len(lines) == 5  # one for each block
    assert all("column 'tail_ids' should be int32" in line for line in lines)
    assert [line.split(":")[0] for line in lines[:2]] == [
        "shard 0, sequence 0",
        "shard 0, sequence 3",
    ]


def statistics_changed(root: Path, shard: int, **changed: Any) -> None:
    """Commit other statistics for a shard."""
    reader = open_store(root)
    block = reader.read(np.array(reader.manifest.shard_rows(shard)))
    sums: ShardStatistics = replace(reader.commit(shard).statistics, **changed)
    (root / "shards" / f"{shard:05d}.json").unlink()
    with ShardWriter(root, reader.manifest) as writer:
        writer.write(shard, block, statistics=replace(sums, distortion=0.0))


def commit_of(root: Path, shard: int) -> Commit:
    return open_store(root).commit(shard)


@pytest.mark.parametrize("name", ["entropy_bins", "mass_bins"])
def test_a_rounded_value_may_only_change_to_a_neighbouring_bin(tmp_path: Path, name: str) -> None:
    make(tmp_path, codec="compact")
    bins = getattr(commit_of(tmp_path, 0).statistics, name)
    assert said(tmp_path) == []
    statistics_changed(tmp_path, 0, **{name: (sum(bins), *(0 for _ in bins[1:]))})
    (line,) = said(tmp_path)
    assert line.startswith(f"shard 0: its commit record says a {name} of ")


class Refusing:
    """Make a file unreadable for a while."""

    def __init__(self, patch: pytest.MonkeyPatch, name: str, number: int) -> None:
        opened = Path.open

        def refused(path: Path, *arguments: Any, **options: Any) -> Any:
            if path.name == name:
                raise OSError(number, os.strerror(number), str(path))
            return opened(path, *arguments, **options)

        patch.setattr(Path, "open", refused)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.EMFILE])
@pytest.mark.parametrize("name", ["00001.arrow", "00001.json"])
def test_a_shard_that_cannot_be_read_now_is_not_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, number: int
) -> None:
    make(tmp_path)
    before = digests(tmp_path)
    with monkeypatch.context() as patch:
        Refusing(patch, name, number)
        for look in (lambda: said(tmp_path), lambda: repair(str(tmp_path))):
            with pytest.raises(OSError, match=os.strerror(number)):
                look()
    assert digests(tmp_path) == before
    assert repair(str(tmp_path)).dropped == []


def test_a_commit_record_that_is_a_folder_is_deleted(tmp_path: Path) -> None:
    make(tmp_path)
    path = tmp_path / "shards" / "00001.json"
    path.unlink()
    path.mkdir()
    assert said(tmp_path) == [f"shard 1: {path}: damaged: no file"]
    assert repair(str(tmp_path)).dropped == [1]
    assert not path.exists()


def test_leftovers_are_listed(tmp_path: Path) -> None:
    make(tmp_path)
    assert leftovers(str(tmp_path)) == []
    left = [tmp_path / ".unfinished-1", tmp_path / "shards" / ".unfinished-2-00000.arrow"]
    for path in left:
        path.write_text("half")
    assert leftovers(str(tmp_path)) == [str(path) for path in left]


def object_changed(memory: Distance, name: str) -> None:
    """Flip one bit of an object, not of its cached copies."""
    place = memory.place()
    content = bytearray(place.read(name))
    content[len(content) // 2] ^= 1
    place._objects.write(name, bytes(content))


@pytest.mark.parametrize("store", ["arrow", "zarr"])
def test_a_copy_in_the_cache_does_not_hide_a_damaged_object(
    memory: Distance, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, store: str
) -> None:
    monkeypatch.setenv("COLDSTILL_CACHE", str(tmp_path / "usual"))
    url = f"{memory.url}/store"
    make(url, store=store)
    open_store(url).read(np.arange(10))
    assert said(url) == []
    names = sorted(memory.place().sizes("shards"))
    data = [name for name in names if "00001." in name and name.endswith((".arrow", "/c/0"))]
    object_changed(memory, data[0])
    open_store(url).read(np.arange(10))  # from the cache, as it was
    (line,) = said(url)
    assert line.startswith("shard 1: ")
    assert "checksum" in line
    assert repair(url).dropped == [1]


def test_one_shard_is_fetched_at_a_time(memory: Distance, tmp_path: Path) -> None:
    url = f"{memory.url}/store"
    make(url)
    with uncached(url) as (place, forget):
        manifest = read_manifest(place)
        folders = []
        for shard in range(manifest.shards):
            commit = open_store(url).commit(shard)
            folders.append(place.shard(commit, f"shards/{shard:05d}.arrow"))
            assert folders[-1].exists()
            forget()
            assert not any(path.exists() for path in folders)
    assert not folders[0].parents[1].exists()


def test_a_local_store_is_not_copied(tmp_path: Path) -> None:
    make(tmp_path)
    with uncached(str(tmp_path)) as (place, forget):
        assert isinstance(place, LocalPlace)
        forget()
    assert said(tmp_path) == []


@pytest.mark.parametrize("fault", ["lost", "busy", "denied"])
@pytest.mark.parametrize("what", [r"GET .*00001\.arrow", r"GET .*00001\.json"])
def test_a_network_error_is_not_damage(s3: Distance, fault: Any, what: str) -> None:
    url = f"{s3.url}/store"
    make(url)
    before = s3.digests()
    s3.network.spoil(fault, what)
    for look in (lambda: said(url), lambda: repair(url)):
        with pytest.raises(ColdstillError) as caught:
            look()
        assert "\n" not in str(caught.value)
    s3.network.faults.clear()
    assert s3.digests() == before
    assert repair(url).dropped == []
