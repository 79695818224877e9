from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from coldstill.data.codecs import CODECS
from coldstill.data.errors import ColdstillError
from coldstill.data.files import json_bytes, tokens_sha256
from coldstill.data.formats import STORES
from coldstill.data.maintenance.merge import merge
from coldstill.data.maintenance.rewrite import convert
from coldstill.data.maintenance.shard import Problem
from coldstill.data.maintenance.verify import Repaired, leftovers, repair, verify
from coldstill.data.places.local import LocalPlace
from coldstill.data.schema import Capture
from coldstill.data.store.layout import sealed
from coldstill.data.store.manifest import TokenizerIdentity, read_manifest
from coldstill.data.store.writer import ShardWriter
from oracles import FULL, VOCABULARY, digests, manifest_for, random_block, write_missing
from tokenizers import Tokenizer, models

if TYPE_CHECKING:
    from pathlib import Path

    from coldstill.data.store.manifest import Manifest

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


def write_tokenizer(root: Path, prefix: str = "word") -> str:
    """Write a tokenizer with the vocabulary of the blocks; returns its fingerprint."""
    table = {f"{prefix}{index}": index for index in range(VOCABULARY)}
    (root / "tokenizer").mkdir(parents=True, exist_ok=True)
    model: Any = models.WordLevel(table, unk_token=f"{prefix}0")
    Tokenizer(model).save(str(root / "tokenizer" / "tokenizer.json"))
    return tokens_sha256(table)


def make(root: Path, capture: Capture = FULL, **options: Any) -> Manifest:
    """A whole store of 10 sequences in shards of 4, 4 and 2."""
    block = BLOCK if capture is FULL else random_block(0, 10, capture)
    named = TokenizerIdentity(fingerprint=write_tokenizer(root), size=VOCABULARY)
    manifest = replace(manifest_for(block, **options), tokenizer=named)
    write_missing(root, manifest, block)
    return manifest


def said(root: Path) -> list[str]:
    lines = [str(problem) for problem in verify(str(root))]
    assert all("\n" not in line for line in lines)
    return lines


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


@pytest.mark.parametrize(("store", "codec"), KINDS)
@pytest.mark.parametrize("capture", CAPTURES.values(), ids=CAPTURES.keys())
def test_nothing_is_wrong_with_a_whole_store(
    tmp_path: Path, store: str, codec: str, capture: Capture
) -> None:
    make(tmp_path, capture, store=store, codec=codec)
    assert said(tmp_path) == []


def test_a_problem_names_its_place() -> None:
    assert str(Problem(what="late")) == "late"
    assert str(Problem(what="late", shard=0)) == "shard 0: late"
    problem = Problem(what="late", shard=3, sequence=812, position=0)
    assert str(problem) == "shard 3, sequence 812, position 0: late"


def test_progress_is_reported_up_to_the_whole_store(tmp_path: Path) -> None:
    make(tmp_path)
    seen: list[tuple[str, int, int]] = []
    assert list(verify(str(tmp_path), lambda *what: seen.append(what))) == []
    assert seen == [("verify", 4, 10), ("verify", 8, 10), ("verify", 10, 10)]
    seen.clear()
    repair(str(tmp_path), notify=lambda *what: seen.append(what))
    assert seen == [("repair", 4, 10), ("repair", 8, 10), ("repair", 10, 10)]


def test_a_folder_without_a_store_is_refused(tmp_path: Path) -> None:
    for check in (lambda: list(verify(str(tmp_path))), lambda: repair(str(tmp_path))):
        with pytest.raises(ColdstillError, match=r"no manifest\.json there, so not a store"):
            check()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("store", "codec"), KINDS)
def test_a_shard_that_was_never_written_is_missing_and_the_others_are_checked(
    tmp_path: Path, store: str, codec: str
) -> None:
    make(tmp_path, store=store, codec=codec)
    flip(largest(tmp_path, 1))
    assert repair(str(tmp_path)).dropped == [1]
    flip(largest(tmp_path, 2))
    missing, damaged = verify(str(tmp_path))
    assert missing == Problem(what="not there", shard=1, missing=True)
    assert (damaged.shard, damaged.missing) == (2, False)


def test_a_missing_changed_or_unreadable_tokenizer_is_found(tmp_path: Path) -> None:
    make(tmp_path)
    where = tmp_path / "tokenizer"
    for content in (b"", b"{", b"{}", b'{"model": 5}', b"\xff\xfe"):
        (where / "tokenizer.json").write_bytes(content)
        (line,) = said(tmp_path)
        assert line.startswith(f"{where}: ")
    write_tokenizer(tmp_path, prefix="mot")
    assert said(tmp_path) == [f"{where}: not the tokenizer that the manifest names"]
    shutil.rmtree(where)
    assert said(tmp_path) == [f"{where}: not there; its ids can no longer be read as text"]


def test_every_file_of_the_tokenizer_is_compared_with_its_record(tmp_path: Path) -> None:
    make(tmp_path)
    shutil.copytree(tmp_path / "tokenizer", tmp_path / "made")
    (tmp_path / "made" / "tokenizer_config.json").write_text("{}")
    with ShardWriter(tmp_path, read_manifest(LocalPlace(tmp_path))) as writer:
        writer.add_tokenizer(tmp_path / "made")
    assert said(tmp_path) == []
    config = tmp_path / "tokenizer" / "tokenizer_config.json"
    config.write_text("{ }")
    assert said(tmp_path) == [f"{config}: damaged: not what was written"]
    config.unlink()
    assert said(tmp_path) == [f"{config}: damaged: not what was written"]
    record = tmp_path / "tokenizer.files.json"
    record.write_text(record.read_text().replace("tokenizer_config", "tokenizer-config"))
    assert said(tmp_path) == [f"{record}: damaged: its contents do not match their seal"]


def test_a_zarr_shard_that_became_a_file_is_found_and_deleted(tmp_path: Path) -> None:
    make(tmp_path, store="zarr")
    shard = tmp_path / "shards" / "00001.zarr"
    shutil.rmtree(shard)
    shard.write_bytes(b"x")
    (problem,) = verify(str(tmp_path))
    assert problem.shard == 1
    assert repair(str(tmp_path)).dropped == [1]
    assert not shard.exists()


def test_a_file_that_belongs_to_no_shard_is_found(tmp_path: Path) -> None:
    make(tmp_path)
    for name in ("notes.txt", "00003.json", "00003.arrow", "00000.zarr", "0.json", "00000.arrow.o"):
        path = tmp_path / "shards" / name
        path.write_text("not ours")
        assert said(tmp_path) == [f"{path}: belongs to no shard"]
        path.unlink()


def test_data_without_a_commit_record_belong_to_no_shard(tmp_path: Path) -> None:
    make(tmp_path)
    record(tmp_path, 1).unlink()
    stray = f"{tmp_path / 'shards' / '00001.arrow'}: belongs to no shard"
    assert said(tmp_path) == [stray, "shard 1: not there"]
    assert repair(str(tmp_path)).strays == ["00001.arrow"]
    assert said(tmp_path) == ["shard 1: not there"]


@pytest.mark.parametrize("codec", sorted(CODECS))
def test_a_file_that_its_record_does_not_name_is_found(tmp_path: Path, codec: str) -> None:
    make(tmp_path, store="zarr", codec=codec)
    path = tmp_path / "shards" / "00001.zarr" / "entropy" / "notes.txt"
    path.write_text("not ours")
    assert said(tmp_path) == [f"shard 1: {path}: not in its commit record"]


def test_leftovers_of_a_crash_are_not_a_problem(tmp_path: Path) -> None:
    make(tmp_path)
    (tmp_path / "shards" / ".unfinished-1-00000.json").write_text("half")
    (tmp_path / "shards" / ".unfinished-2-00000.arrow").mkdir()
    (tmp_path / ".unfinished-3").mkdir()
    assert said(tmp_path) == []


def test_a_record_of_another_shard_is_found(tmp_path: Path) -> None:
    make(tmp_path)
    record(tmp_path, 1).write_bytes(record(tmp_path, 0).read_bytes())
    wrong = "names shard 0 with 4 sequences, expected shard 1 with 4"
    assert said(tmp_path) == [f"shard 1: {record(tmp_path, 1)}: {wrong}"]


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


@pytest.mark.parametrize("codec", sorted(CODECS))
@pytest.mark.parametrize("name", COUNTS + SUMS)
def test_a_record_of_other_sums_is_found(tmp_path: Path, codec: str, name: str) -> None:
    make(tmp_path, codec=codec)
    wrong_record(tmp_path, 1, name)
    (line, *others) = said(tmp_path)
    assert line.startswith("shard 1: its commit record says ")
    assert name in line
    assert others == []


def test_other_bins_and_a_negative_distortion_are_found(tmp_path: Path) -> None:
    make(tmp_path)
    whole = record(tmp_path, 1).read_bytes()
    wrong_record(tmp_path, 1, "entropy_bins", lambda bins: [*bins[1:], bins[0]])
    (line,) = said(tmp_path)
    assert line.startswith("shard 1: its commit record says a entropy_bins of ")
    record(tmp_path, 1).write_bytes(whole)
    wrong_record(tmp_path, 1, "distortion", lambda value: -1e-6)
    (line,) = said(tmp_path)
    assert line.startswith("shard 1: its commit record says a distortion of -1e-06")


@pytest.mark.parametrize(
    ("name", "where"), [("shards/00002.json", "shard 2: "), ("manifest.json", "")]
)
def test_a_record_with_other_white_space_is_not_the_bytes_that_were_written(
    tmp_path: Path, name: str, where: str
) -> None:
    make(tmp_path)
    path = tmp_path / name
    path.write_text(json.dumps(json.loads(path.read_text())))
    assert said(tmp_path) == [f"{where}{path}: damaged: not the bytes that were written"]


def test_a_manifest_that_promises_too_many_shards_is_reported_soon(tmp_path: Path) -> None:
    make(tmp_path)
    edit(tmp_path / "manifest.json", {"sequences": 2**22})
    lines = said(tmp_path)
    assert len(lines) < 30
    assert "names shard 2 with 2 sequences, expected shard 2 with 4" in lines[0]
    assert lines[1] == "shard 3: not there"
    last, after = len(lines) + 1, 2**20 - len(lines) - 2
    assert lines[-1] == f"shard {last}: not there, nor the {after} after it"


def test_a_codec_for_another_tokenizer_is_found(tmp_path: Path) -> None:
    make(tmp_path, codec="compact")
    path = tmp_path / "manifest.json"
    codec = json.loads(path.read_text())["codec"]
    edit(path, {"codec": codec | {"vocabulary": VOCABULARY + 1}})
    assert said(tmp_path) == [f"{path}: its codec is for 41 tokens, its tokenizer has 40"]


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
    assert said(tmp_path) == ["shard 0: not there", "shard 2: not there"]
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


@pytest.mark.parametrize("pretend", [False, True])
@pytest.mark.parametrize("damage", ["flipped", "reformatted", "empty"])
def test_a_repair_under_a_damaged_manifest_is_refused_and_changes_nothing(
    tmp_path: Path, damage: str, pretend: bool
) -> None:
    make(tmp_path)
    path = tmp_path / "manifest.json"
    if damage == "flipped":
        flip(path)
    else:
        text = json.dumps(json.loads(path.read_text()))
        path.write_text(text if damage == "reformatted" else "")
    flip(record(tmp_path, 1))
    (tmp_path / "shards" / "notes.txt").write_text("not ours")
    (tmp_path / ".unfinished-1").write_text("half")
    before = digests(tmp_path)
    with pytest.raises(ColdstillError, match="a manifest cannot be repaired") as caught:
        repair(str(tmp_path), pretend=pretend)
    assert str(caught.value).startswith(f"{path}: ")
    assert digests(tmp_path) == before


def test_a_repair_is_refused_while_another_process_writes(tmp_path: Path) -> None:
    manifest = make(tmp_path)
    flip(record(tmp_path, 1))
    before = digests(tmp_path)
    with (
        ShardWriter(tmp_path, manifest),
        pytest.raises(ColdstillError, match="another process is writing this store"),
    ):
        repair(str(tmp_path))
    assert digests(tmp_path) == before
    assert repair(str(tmp_path)).dropped == [1]


def test_claims_do_not_belong_to_a_store(tmp_path: Path) -> None:
    root = tmp_path / "store"
    manifest = make(root)
    whole = digests(root)
    (root / "claims").mkdir()
    for name in ("00001", "starting"):
        (root / "claims" / name).touch()
    with ShardWriter(root, manifest, shared=True) as writer, writer.claim(7):
        assert (root / "claims" / "00007").exists()
        assert said(root) == []
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


def test_maintenance_is_refused_while_several_processes_write(tmp_path: Path) -> None:
    source, root = tmp_path / "source", tmp_path / "store"
    manifest = make(source)
    make(root)
    flip(record(root, 1))
    with ShardWriter(root, manifest, shared=True) as writer, writer.claim(0):
        before = digests(root)
        for change in (
            lambda: repair(str(root)),
            lambda: convert(str(source), str(root), None, None),
            lambda: merge([str(source)], str(root), None, None),
        ):
            with pytest.raises(ColdstillError) as caught:
                change()
            wait = f"{root}: another process is writing this store; wait for it"
            assert str(caught.value) == wait
            assert digests(root) == before
    assert repair(str(root)).dropped == [1]


def test_a_writer_is_refused_during_a_repair(tmp_path: Path) -> None:
    manifest = make(tmp_path)
    met = []

    def notify(*_: Any) -> None:
        with (
            pytest.raises(ColdstillError, match="another process is writing this store") as caught,
            ShardWriter(tmp_path, manifest, shared=True),
        ):
            pass
        met.append(caught.value)

    assert repair(str(tmp_path), notify=notify).problems == []
    assert len(met) == 3
    with ShardWriter(tmp_path, manifest, shared=True):
        pass
