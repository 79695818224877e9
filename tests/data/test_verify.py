"""Checks and repairs of stores: records, shards, their order and their tokenizer."""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from coldstill.data.codecs import CODECS
from coldstill.data.files import json_bytes
from coldstill.data.formats import STORES
from coldstill.data.maintenance.merge import merge
from coldstill.data.maintenance.rewrite import convert
from coldstill.data.maintenance.shard import SequenceOrder
from coldstill.data.maintenance.verify import Repaired, leftovers, repair, uncached, verify
from coldstill.data.places.local import LocalPlace
from coldstill.data.schema import Capture
from coldstill.data.store import writer
from coldstill.data.store.layout import sealed
from coldstill.data.store.manifest import Part, read_manifest
from coldstill.data.store.reader import open_store
from coldstill.data.store.writer import ShardWriter
from oracles import (
    FULL,
    VOCABULARY,
    digests,
    manifest_for,
    random_block,
    whole_store,
    write_missing,
    write_tokenizer,
)
from refusals import refusal

if TYPE_CHECKING:
    from coldstill.data.schema import Block
    from coldstill.data.store.commit import ShardStatistics
    from coldstill.data.store.manifest import Manifest
    from distance import Distance

KINDS = list(itertools.product(sorted(STORES), sorted(CODECS)))
BLOCK = random_block(0, 10)
CAPTURES = {
    "everything": FULL,
    "no head": Capture(head=0, tail=2),
    "no tail": Capture(head=2, tail=0),
    "neither": Capture(head=0, tail=0),
    "whole vocabulary": Capture(head=VOCABULARY, tail=0),
    "temperatures": Capture(head=3, tail=2, temperatures=(0.25, 4.0)),
    "samples without log-probabilities": Capture(head=5, tail=9),
}


def make(root: Path, block: Block = BLOCK, **options: Any) -> Manifest:
    """A whole store; that of `BLOCK` has 10 sequences in shards of 4, 4 and 2."""
    return whole_store(root, block, **options)


def problems(root: Path | str, *, tokenizer: bool = True) -> list[str]:
    """The lines of `verify`, if asked without that of a missing tokenizer."""
    lines = [str(problem) for problem in verify(str(root))]
    assert all("\n" not in line for line in lines)
    return [line for line in lines if tokenizer or "tokenizer: missing" not in line]


def record(root: Path, shard: int) -> Path:
    return root / "shards" / f"{shard:05d}.json"


def edit(path: Path, change: dict[str, Any]) -> None:
    """Change a record and seal it again."""
    path.write_bytes(json_bytes(sealed(json.loads(path.read_text()) | change)))


def largest(root: Path, shard: int) -> Path:
    """The largest file of a shard's data."""
    files = [p for p in root.glob(f"shards/{shard:05d}*/**/*") if p.is_file()]
    files += [p for p in root.glob(f"shards/{shard:05d}.*") if p.is_file() and p.suffix != ".json"]
    return max(files, key=lambda path: path.stat().st_size)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


@pytest.mark.slow
@pytest.mark.parametrize(("store", "codec"), KINDS)
def test_a_whole_store_has_no_problems(tmp_path: Path, store: str, codec: str) -> None:
    for name, capture in CAPTURES.items():
        make(tmp_path / name, random_block(0, 10, capture), store=store, codec=codec)
        assert problems(tmp_path / name) == []


def test_progress_is_reported_up_to_the_whole_store(tmp_path: Path) -> None:
    make(tmp_path)
    seen: list[tuple[str, int, int]] = []
    assert list(verify(str(tmp_path), lambda *what: seen.append(what))) == []
    assert seen == [("verify", 4, 10), ("verify", 8, 10), ("verify", 10, 10)]
    seen.clear()
    repair(str(tmp_path), notify=lambda *what: seen.append(what))
    assert seen == [("repair", 4, 10), ("repair", 8, 10), ("repair", 10, 10)]


def test_a_folder_without_a_store_is_refused(tmp_path: Path) -> None:
    for check in (problems, repair):
        assert "no manifest.json there, so not a store" in refusal(check, str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_missing_changed_or_unreadable_tokenizer_is_found(tmp_path: Path) -> None:
    make(tmp_path)
    where = tmp_path / "tokenizer"
    for content in (b"", b"{", b"{}", b'{"model": 5}', b"\xff\xfe"):
        (where / "tokenizer.json").write_bytes(content)
        (line,) = problems(tmp_path)
        assert line.startswith(f"{where}: ")
    write_tokenizer(tmp_path, "mot")
    assert problems(tmp_path) == [f"{where}: not the tokenizer that the manifest names"]
    shutil.rmtree(where)
    assert problems(tmp_path) == [f"{where}: missing; its ids can no longer be read as text"]


def test_every_file_of_the_tokenizer_is_compared_with_its_record(tmp_path: Path) -> None:
    make(tmp_path)
    shutil.copytree(tmp_path / "tokenizer", tmp_path / "made")
    (tmp_path / "made" / "tokenizer_config.json").write_text("{}")
    with ShardWriter(tmp_path, read_manifest(LocalPlace(tmp_path))) as writer:
        writer.add_tokenizer(tmp_path / "made")
    assert problems(tmp_path) == []
    config = tmp_path / "tokenizer" / "tokenizer_config.json"
    config.write_text("{ }")
    assert problems(tmp_path) == [f"{config}: damaged: not what was written"]
    config.unlink()
    assert problems(tmp_path) == [f"{config}: damaged: not what was written"]
    record = tmp_path / "tokenizer.files.json"
    record.write_text(record.read_text().replace("tokenizer_config", "tokenizer-config"))
    assert problems(tmp_path) == [f"{record}: damaged: its contents do not match their seal"]


@pytest.mark.slow
def test_a_file_that_belongs_to_no_shard_is_found(tmp_path: Path) -> None:
    make(tmp_path)
    shards = tmp_path / "shards"
    for name in ("notes.txt", "00003.json", "00003.arrow", "00000.zarr", "0.json", "00000.arrow.o"):
        (shards / name).write_text("not ours")
        assert problems(tmp_path) == [f"{shards / name}: belongs to no shard"]
        (shards / name).unlink()
    record(tmp_path, 1).unlink()
    stray = f"{shards / '00001.arrow'}: belongs to no shard"
    assert problems(tmp_path) == [stray, "shard 1: missing"]
    assert repair(str(tmp_path)).strays == ["00001.arrow"]
    assert problems(tmp_path) == ["shard 1: missing"]
    make(tmp_path / "zarr", store="zarr")
    path = tmp_path / "zarr" / "shards" / "00001.zarr" / "entropy" / "notes.txt"
    path.write_text("not ours")
    assert problems(tmp_path / "zarr") == [f"shard 1: {path}: not in its commit record"]


def more(value: Any) -> Any:
    if isinstance(value, list):
        return [value[0] + 1, *value[1:]]
    return value + 1 if isinstance(value, int) else value + 0.5


COUNTS = ["documents", "tokens", "positions"]
SUMS = ["loss", "entropy", "head_mass", "correct", "separator_mass", "separators"]
SUMS += ["entropy_bins", "mass_bins"]


def wrong_record(root: Path, shard: int, name: str, change: Any = more) -> None:
    path = record(root, shard)
    value = json.loads(path.read_text())
    part = value if name in COUNTS else value["statistics"]
    part[name] = change(part[name])
    edit(path, value)


@pytest.mark.slow
@pytest.mark.parametrize("codec", sorted(CODECS))
def test_a_record_of_other_sums_is_found(tmp_path: Path, codec: str) -> None:
    make(tmp_path, codec=codec)
    path = record(tmp_path, 1)
    whole = path.read_bytes()
    for name in COUNTS + SUMS:
        wrong_record(tmp_path, 1, name)
        (line,) = problems(tmp_path)
        assert line.startswith("shard 1: its commit record has ")
        assert name in line
        path.write_bytes(whole)
    for name, change, expected in (
        ("entropy_bins", lambda bins: [*bins[1:], bins[0]], "entropy_bins = "),
        ("distortion", lambda value: -1e-6, "distortion = -1e-06"),
    ):
        wrong_record(tmp_path, 1, name, change)
        (line,) = problems(tmp_path)
        assert line.startswith(f"shard 1: its commit record has {expected}")
        path.write_bytes(whole)
    path.write_bytes(record(tmp_path, 0).read_bytes())
    wrong = "names shard 0 with 4 sequences, expected shard 1 with 4"
    assert problems(tmp_path) == [f"shard 1: {path}: {wrong}"]


def test_a_record_with_other_white_space_is_not_the_bytes_that_were_written(tmp_path: Path) -> None:
    make(tmp_path)
    for name, where in (("shards/00002.json", "shard 2: "), ("manifest.json", "")):
        path = tmp_path / name
        whole = path.read_text()
        path.write_text(json.dumps(json.loads(whole)))
        assert problems(tmp_path) == [f"{where}{path}: damaged: not the bytes that were written"]
        path.write_text(whole)


def test_a_manifest_of_another_store_is_found(tmp_path: Path) -> None:
    make(tmp_path, codec="compact")
    path = tmp_path / "manifest.json"
    codec = json.loads(path.read_text())["codec"]
    edit(path, {"codec": codec | {"vocabulary": VOCABULARY + 1}})
    assert problems(tmp_path) == [f"{path}: its codec is for 41 tokens, its tokenizer has 40"]
    edit(path, {"codec": codec, "sequences": 2**22})
    lines = problems(tmp_path)
    assert len(lines) < 30  # of a million missing shards
    assert "names shard 2 with 2 sequences, expected shard 2 with 4" in lines[0]
    assert lines[1] == "shard 3: missing"
    last, after = len(lines) + 1, 2**20 - len(lines) - 2
    assert lines[-1] == f"shard {last}: missing, and so are the {after} after it"


@pytest.mark.slow
@pytest.mark.parametrize(("store", "codec"), KINDS)
def test_a_repair_deletes_damaged_shards_and_a_writer_fills_the_gap(
    tmp_path: Path, store: str, codec: str
) -> None:
    manifest = make(tmp_path, store=store, codec=codec)
    whole = digests(tmp_path)
    flip(largest(tmp_path, 0))
    wrong_record(tmp_path, 2, "loss")
    (tmp_path / "shards" / "notes").mkdir()
    (tmp_path / "shards" / "notes" / "one.txt").write_text("not ours")
    (tmp_path / "shards" / "00009.json").write_text("{}")
    (tmp_path / ".unfinished-1").write_text("half")
    found = repair(str(tmp_path))
    assert [problem.shard for problem in found.problems] == [0, 2]
    assert (found.dropped, found.strays, found.missing) == ([0, 2], ["00009.json", "notes"], 2)
    gone = ("shards/00000", "shards/00002")
    assert digests(tmp_path) == {n: d for n, d in whole.items() if not n.startswith(gone)}
    assert problems(tmp_path) == ["shard 0: missing", "shard 2: missing"]
    write_missing(tmp_path, manifest, BLOCK)
    assert digests(tmp_path) == whole
    assert repair(str(tmp_path)) == Repaired(problems=[], dropped=[], strays=[], missing=0)


def test_a_dry_repair_changes_nothing(tmp_path: Path) -> None:
    make(tmp_path)
    (tmp_path / "shards" / "notes.txt").write_text("not ours")
    (tmp_path / ".unfinished-1").write_text("half")
    flip(record(tmp_path, 1))
    before = digests(tmp_path)
    found = repair(str(tmp_path), pretend=True)
    assert (found.dropped, found.strays, found.missing) == ([1], ["notes.txt"], 1)
    assert digests(tmp_path) == before
    assert repair(str(tmp_path)) == found


def test_a_repair_under_a_damaged_manifest_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    make(tmp_path)
    path = tmp_path / "manifest.json"
    whole = path.read_text()
    flip(record(tmp_path, 1))
    (tmp_path / "shards" / "notes.txt").write_text("not ours")
    (tmp_path / ".unfinished-1").write_text("half")
    for damaged in (whole.replace("0", "1", 1), json.dumps(json.loads(whole)), ""):
        path.write_text(damaged)
        before = digests(tmp_path)
        for pretend in (False, True):
            message = refusal(repair, str(tmp_path), pretend=pretend)
            assert message.startswith(f"{path}: ")
            assert "a manifest cannot be repaired" in message
            assert digests(tmp_path) == before


def test_verify_ignores_claims(tmp_path: Path) -> None:
    root = tmp_path / "store"
    manifest = make(root)
    whole = digests(root)
    (root / "claims").mkdir()
    for name in ("00001", "starting"):
        (root / "claims" / name).touch()
    with ShardWriter(root, manifest, shared=True) as writer, writer.claim(7):
        assert (root / "claims" / "00007").exists()
        assert problems(root) == []
        assert leftovers(str(root)) == []
        convert(str(root), str(tmp_path / "converted"), None, None)
        merge([str(root)], str(tmp_path / "merged"), None, None)
    for name in ("converted", "merged"):
        assert not (tmp_path / name / "claims").exists()
        assert set(digests(tmp_path / name)) == {*whole, "tokenizer.files.json"}
    (root / "claims").mkdir(exist_ok=True)
    (root / "claims" / "00001").touch()
    assert repair(str(root)) == Repaired(problems=[], dropped=[], strays=[], missing=0)
    assert not (root / "claims").exists()
    assert digests(root) == whole


@pytest.mark.parametrize("shared", [False, True])
def test_maintenance_is_refused_while_other_processes_write(tmp_path: Path, shared: bool) -> None:
    source, root = tmp_path / "source", tmp_path / "store"
    manifest = make(source)
    make(root)
    flip(record(root, 1))
    with ShardWriter(root, manifest, shared=shared):
        before = digests(root)
        for change in (
            lambda: repair(str(root)),
            lambda: convert(str(source), str(root), None, None),
            lambda: merge([str(source)], str(root), None, None),
        ):
            wait = f"{root}: another process is writing this store; wait for it"
            assert refusal(change) == wait
            assert digests(root) == before
    assert repair(str(root)).dropped == [1]


def test_a_writer_is_refused_during_a_repair(tmp_path: Path) -> None:
    manifest, met = make(tmp_path), []

    def notify(*_: Any) -> None:
        met.append(refusal(ShardWriter(tmp_path, manifest, shared=True).__enter__))

    assert repair(str(tmp_path), notify=notify).problems == []
    assert len(met) == 3
    assert all("another process is writing this store" in message for message in met)
    with ShardWriter(tmp_path, manifest, shared=True):
        pass


pytest_plugins = ("distance",)

UNORDERED = "a sequence id that is not above the one before"


@pytest.mark.slow
@pytest.mark.parametrize(("store", "codec"), KINDS)
def test_sequences_out_of_order_are_found(tmp_path: Path, store: str, codec: str) -> None:
    for number, (rows, wrong) in enumerate(
        (
            ((0, 2, 3, 5, 6, 7, 8, 9), []),
            ((0, 1, 3, 2, 4, 5, 6, 7), [(0, 3)]),  # the first of a block
            ((0, 2, 1, 3, 4, 5, 6, 7), [(0, 2)]),  # inside one
            ((0, 1, 2, 7, 4, 5, 6, 8), [(1, 4)]),  # the first of a shard
            ((0, 1, 2, 3, 0, 1, 2, 3), [(1, 4)]),  # a shard that comes twice
            ((5, 5, 6, 6, 7, 8, 9, 9), [(0, 1), (0, 3), (1, 7)]),
        )
    ):
        root = tmp_path / str(number)
        make(root, BLOCK.take(np.array(rows)), store=store, codec=codec)
        expected = [f"shard {shard}, sequence {row}: {UNORDERED}" for shard, row in wrong]
        assert problems(root) == expected
        assert repair(str(root)).dropped == sorted({shard for shard, _ in wrong})


def test_a_gap_does_not_hide_disorder(tmp_path: Path) -> None:
    make(tmp_path, BLOCK.take(np.array([0, 1, 2, 3, 4, 5, 6, 7, 2, 9])))
    (tmp_path / "shards" / "00001.json").unlink()
    (tmp_path / "shards" / "00001.arrow").unlink()
    assert problems(tmp_path) == ["shard 1: missing", f"shard 2, sequence 8: {UNORDERED}"]


def test_each_part_of_a_merged_store_has_its_own_order(tmp_path: Path) -> None:
    make(tmp_path / "a")
    make(tmp_path / "b", random_block(5, 7), corpus="5")
    merge([f"{tmp_path}/a", f"{tmp_path}/b"], f"{tmp_path}/ab", None, None)
    assert problems(tmp_path / "ab") == []
    part = Part(corpus="x", documents=1, packing="y", sequences=3)
    order = SequenceOrder(replace(manifest_for(BLOCK), parts=(part, replace(part, sequences=4))))
    assert order.first_break(0, np.array([4, 7])) is None
    assert order.first_break(2, np.array([9, 0, 1])) is None  # the second part begins at 3
    assert order.first_break(5, np.array([], np.int64)) is None
    assert order.first_break(5, np.array([1, 5])) == 0


def test_every_damaged_block_of_a_shard_is_reported_with_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "check_hashes", lambda sequences: None)  # it would refuse them
    entropy, hashes = BLOCK.targets.entropy.copy(), BLOCK.sequences.hashes.copy()
    positions = BLOCK.sequences.positions
    entropy[positions.offsets[[0, 3, 9]]] = -1.0  # in both blocks of shard 0, and in shard 2
    hashes[5] += np.uint64(1)
    broken = replace(
        BLOCK,
        targets=replace(BLOCK.targets, entropy=entropy),
        sequences=replace(BLOCK.sequences, hashes=hashes),
    )
    make(tmp_path, broken)
    first, second, third, fourth = problems(tmp_path)
    for line, shard, row in ((first, 0, 0), (second, 0, 3), (fourth, 2, 9)):
        where = f"shard {shard}, sequence {row}, position {positions[row][0]}"
        assert line == f"{where}: an entropy that is not in [0, log V]"
    assert third.startswith("shard 1, sequence 5: sequence 5 is not what was written")


def test_a_block_that_cannot_be_decoded_does_not_hide_the_next(tmp_path: Path) -> None:
    capture = replace(BLOCK.capture, tail=BLOCK.capture.tail + 1)
    manifest = make(tmp_path, codec="plain")
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "kept").mkdir()
    (tmp_path / "shards").rename(tmp_path / "kept" / "shards")
    with ShardWriter(tmp_path, replace(manifest, capture=capture)):
        (tmp_path / "kept" / "shards").rename(tmp_path / "shards")
    lines = problems(tmp_path)
    assert len(lines) == 5  # one for each block
    assert all("'tail_counts': those of a position do not sum to 4" in line for line in lines)
    assert [line.split(":")[0] for line in lines[:2]] == [
        "shard 0, sequence 0",
        "shard 0, sequence 3",
    ]


def commit_other_statistics(root: Path, shard: int, **changed: Any) -> None:
    reader = open_store(root)
    block = reader.read(np.array(reader.manifest.shard_rows(shard)))
    sums: ShardStatistics = replace(reader.commit(shard).statistics, **changed)
    record(root, shard).unlink()
    with ShardWriter(root, reader.manifest) as writer:
        writer.write(shard, block, statistics=replace(sums, distortion=0.0))


@pytest.mark.parametrize("name", ["entropy_bins", "mass_bins"])
def test_a_rounded_value_may_only_change_to_a_neighbouring_bin(tmp_path: Path, name: str) -> None:
    make(tmp_path, codec="compact")
    bins = getattr(open_store(tmp_path).commit(0).statistics, name)
    assert problems(tmp_path) == []
    commit_other_statistics(tmp_path, 0, **{name: (sum(bins), *(0 for _ in bins[1:]))})
    (line,) = problems(tmp_path)
    assert line.startswith(f"shard 0: its commit record has {name} = ")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.EMFILE])
@pytest.mark.parametrize("name", ["00001.arrow", "00001.json"])
def test_a_shard_that_cannot_be_read_now_is_not_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, number: int
) -> None:
    make(tmp_path)
    before, opened = digests(tmp_path), Path.open

    def unreadable(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.name == name:
            raise OSError(number, os.strerror(number), str(path))
        return opened(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", unreadable)
        for look in (problems, lambda path: repair(str(path))):
            with pytest.raises(OSError, match=os.strerror(number)):
                look(tmp_path)
    assert digests(tmp_path) == before
    assert repair(str(tmp_path)).dropped == []


@pytest.mark.slow
def test_files_and_folders_that_changed_places_are_deleted(tmp_path: Path) -> None:
    make(tmp_path, store="zarr")
    path, shard = record(tmp_path, 1), tmp_path / "shards" / "00002.zarr"
    path.unlink()
    path.mkdir()
    shutil.rmtree(shard)
    shard.write_bytes(b"x")
    line, other = problems(tmp_path)
    assert line == f"shard 1: {path}: damaged: no file"
    assert other.startswith("shard 2: ")
    assert repair(str(tmp_path)).dropped == [1, 2]
    assert not path.exists()
    assert not shard.exists()


def test_leftovers_of_a_crash_are_listed_and_not_a_problem(tmp_path: Path) -> None:
    make(tmp_path)
    assert leftovers(str(tmp_path)) == []
    left = [tmp_path / ".unfinished-1", tmp_path / "shards" / ".unfinished-2-00000.arrow"]
    left[0].write_text("half")
    left[1].mkdir()
    assert leftovers(str(tmp_path)) == [str(path) for path in left]
    assert problems(tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("store", ["arrow", "zarr"])
def test_a_copy_in_the_cache_does_not_hide_a_damaged_object(
    memory: Distance, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, store: str
) -> None:
    monkeypatch.setenv("COLDSTILL_CACHE", str(tmp_path / "usual"))
    url, place = f"{memory.url}/store", memory.place()
    write_missing(url, manifest_for(BLOCK, store=store), BLOCK)
    open_store(url).read(np.arange(10))
    assert problems(url, tokenizer=False) == []
    name = next(n for n in sorted(place.sizes("shards")) if re.search(r"00001\..*(arrow|/c/0)$", n))
    content = bytearray(place.read(name))
    content[len(content) // 2] ^= 1
    place._objects.write(name, bytes(content))
    open_store(url).read(np.arange(10))  # from the cache, as it was
    (line,) = problems(url, tokenizer=False)
    assert line.startswith("shard 1: ")
    assert "checksum" in line
    assert repair(url).dropped == [1]


def test_one_shard_is_fetched_at_a_time_and_a_local_store_is_not_copied(
    memory: Distance, tmp_path: Path
) -> None:
    url = f"{memory.url}/store"
    write_missing(url, manifest_for(BLOCK), BLOCK)
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
    make(tmp_path)
    with uncached(str(tmp_path)) as (place, forget):
        assert isinstance(place, LocalPlace)
        forget()
    assert problems(tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["lost", "busy", "denied"])
@pytest.mark.parametrize("what", [r"GET .*00001\.arrow", r"GET .*00001\.json"])
def test_a_network_error_is_not_damage(s3: Distance, fault: Any, what: str) -> None:
    url = f"{s3.url}/store"
    write_missing(url, manifest_for(BLOCK), BLOCK)
    before = s3.digests()
    s3.network.spoil(fault, what)
    for look in (problems, repair):
        refusal(look, url)
    s3.network.faults.clear()
    assert s3.digests() == before
    assert repair(url).dropped == []
