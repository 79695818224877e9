from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from children import Dying, Killed, running, together
from coldstill.data.codecs.plain import PlainCodec
from coldstill.data.files import SCRATCH_PREFIX
from coldstill.data.store.commit import shard_files
from coldstill.data.store.writer import ShardWriter
from oracles import digests, manifest_for, random_block, write_missing
from refusals import refusal

if TYPE_CHECKING:
    from collections.abc import Callable

    from coldstill.data.schema import Block, Capture
    from coldstill.data.store.manifest import Manifest

BLOCK = random_block(0, 10)  # three shards, of which the last is short, of two blocks each
MANIFEST = manifest_for(BLOCK)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What a store looks like that was never interrupted."""
    root = tmp_path_factory.mktemp("whole")
    write_missing(root, MANIFEST, BLOCK)
    shards = [f"shards/0000{i}{end}" for i in range(3) for end in (".arrow", ".json")]
    assert sorted(digests(root)) == sorted(["manifest.json", *shards])
    return digests(root)


def scratch_in(root: Path) -> list[str]:
    return [path.name for path in root.rglob(f"{SCRATCH_PREFIX}*")]


CHANGES: list[tuple[Any, str]] = [
    (os, "fsync"),
    *((Path, name) for name in ("replace", "unlink", "write_bytes", "mkdir")),
    (shutil, "rmtree"),
    (PlainCodec, "encode"),  # between the blocks of a shard
]
"""What changes the disk."""


def write_claimed(root: Path, manifest: Manifest, block: Block) -> None:
    """As `write_missing`, by one of several writers."""
    with ShardWriter(root, manifest, shared=True) as writer:
        for shard in writer.missing():
            with writer.claim(shard) as mine:
                assert mine
                writer.write(shard, block.take(np.array(manifest.shard_rows(shard))))


@pytest.mark.parametrize("write", [write_missing, write_claimed])
def test_a_store_killed_at_any_point_and_finished_is_byte_identical(
    tmp_path: Path, whole: dict[str, str], write: Callable[[Path, Manifest, Block], None]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        disk = Dying(patch, sys.maxsize, CHANGES)
        write(tmp_path / "counted", MANIFEST, BLOCK)
    assert disk.calls > 30
    seen = set()
    for last in range(1, disk.calls + 1):
        root = tmp_path / str(last)
        with pytest.MonkeyPatch.context() as patch:
            Dying(patch, last, CHANGES)
            with pytest.raises(Killed):
                write(root, MANIFEST, BLOCK)
        for record in root.glob("shards/0*.json"):  # every shard with a record is whole
            shard = str(record.with_suffix(".arrow").relative_to(root))
            assert digests(root)[shard] == whole[shard]
        seen.add(len(list(root.glob("shards/0*.json"))))
        write(root, MANIFEST, BLOCK)
        assert scratch_in(root) == [], last
        assert not (root / "claims").exists()
        assert digests(root) == whole, last
    assert seen == {0, 1, 2, 3}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("x"), MemoryError()])
def test_an_error_between_blocks_leaves_the_shard_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, whole: dict[str, str]
) -> None:
    encode, calls = PlainCodec.encode, []

    def sometimes(self: PlainCodec, block: Block) -> Any:
        calls.append(block)
        if len(calls) == 4:  # the second block of the second shard
            raise error
        return encode(self, block)

    monkeypatch.setattr(PlainCodec, "encode", sometimes)
    with pytest.raises(type(error)):
        write_missing(tmp_path, MANIFEST, BLOCK)
    assert scratch_in(tmp_path) == []
    with ShardWriter(tmp_path, MANIFEST) as writer:
        assert writer.missing() == [1, 2]
    write_missing(tmp_path, MANIFEST, BLOCK)
    assert digests(tmp_path) == whole


def test_shards_are_written_in_any_order_and_again_if_their_record_is_missing(
    tmp_path: Path, whole: dict[str, str]
) -> None:
    for shard in (2, 0, 1):
        with ShardWriter(tmp_path, MANIFEST) as writer:
            assert shard in writer.missing()
            writer.write(shard, part(shard))
            assert shard not in writer.missing()
    (tmp_path / "shards" / "00001.json").unlink()
    (tmp_path / "shards" / "00001.arrow").write_bytes(b"damaged")
    write_missing(tmp_path, MANIFEST, BLOCK)
    assert digests(tmp_path) == whole


WRITE_SLOWLY = """
import sys, time
from pathlib import Path
from coldstill.data.codecs.plain import PlainCodec
from oracles import manifest_for, random_block, write_missing

encode, calls = PlainCodec.encode, []

def slowly(self, block):
    calls.append(block)
    if len(calls) == 4:
        print("writing", flush=True)
        time.sleep(60)
    return encode(self, block)

PlainCodec.encode = slowly
block = random_block(0, 10)
write_missing(Path(sys.argv[1]), manifest_for(block), block)
"""


def test_a_process_killed_while_writing_loses_one_shard_and_its_lock(
    tmp_path: Path, whole: dict[str, str]
) -> None:
    with running(WRITE_SLOWLY, tmp_path, line="writing"):
        assert len(scratch_in(tmp_path)) == 1
        message = refusal(ShardWriter(tmp_path, MANIFEST).__enter__)
        assert message == f"{tmp_path}: another process is writing this store; wait for it"
        assert len(scratch_in(tmp_path)) == 1  # the refused one has cleared nothing away
    assert sorted(path.name for path in tmp_path.glob("shards/0*")) == ["00000.arrow", "00000.json"]
    with ShardWriter(tmp_path, MANIFEST) as writer:
        assert scratch_in(tmp_path) == []
        assert writer.missing() == [1, 2]
    write_missing(tmp_path, MANIFEST, BLOCK)
    assert digests(tmp_path) == whole


@pytest.mark.parametrize(
    ("room", "where"), [(0, "manifest.json"), (6, "shards/00001.arrow")], ids=["begin", "later"]
)
def test_a_full_disk_keeps_what_was_finished_and_releases_the_lock(
    room: int, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: dict[str, str]
) -> None:
    fsync, calls = os.fsync, []

    def filling_up(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > room:  # file and folder of: the manifest, a shard, its record
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", filling_up)
        message = refusal(write_missing, tmp_path, MANIFEST, BLOCK)
    assert message.startswith(f"{tmp_path}/{where}: the disk is full")
    assert scratch_in(tmp_path) == []
    write_missing(tmp_path, MANIFEST, BLOCK)
    assert digests(tmp_path) == whole


def test_a_shared_writer_that_fails_to_begin_leaves_no_claim(tmp_path: Path) -> None:
    def fail(_: Path) -> None:
        raise KeyError

    with pytest.raises(KeyError), shared(tmp_path, save_tokenizer=fail):
        pass
    assert scratch_in(tmp_path) == []
    with ShardWriter(tmp_path, MANIFEST):
        assert not (tmp_path / "claims").exists()


def test_a_folder_that_is_not_a_store_is_left_alone(tmp_path: Path) -> None:
    store = tmp_path / "store"
    ShardWriter(store, MANIFEST).check()
    assert list(tmp_path.iterdir()) == []
    store.write_text("mine")
    message = refusal(write_missing, store, MANIFEST, BLOCK)
    assert "store: is a file, expected a store's folder" in message
    assert store.read_text() == "mine"
    store.unlink()
    write_missing(store, MANIFEST, BLOCK)
    manifest = store / "manifest.json"
    before = manifest.stat().st_ino, manifest.stat().st_mtime_ns
    renamed = replace(MANIFEST, teacher=replace(MANIFEST.teacher, name="other"))
    write_missing(store, renamed, BLOCK)
    after = manifest.stat().st_ino, manifest.stat().st_mtime_ns
    assert after == before  # it is never written again
    manifest.unlink()
    left = digests(store)
    message = refusal(ShardWriter(store, MANIFEST).__enter__)
    assert message == f"{store}: holds shards but no manifest.json; move it away"
    assert digests(store) == left


def test_the_commit_record_has_the_counts_of_the_shard(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, MANIFEST) as writer:
        commit = writer.write(1, part(1))
    path, sequences = tmp_path / "shards" / "00001.arrow", part(1).sequences
    assert (commit.shard, commit.sequences) == (1, 4)
    assert commit.documents == len(sequences.document_ids.values)
    assert commit.tokens == len(sequences.tokens.values)
    assert commit.positions == len(sequences.positions.values)
    assert commit.bytes == path.stat().st_size
    assert commit.files == shard_files(path)
    record = json.loads((tmp_path / "shards" / "00001.json").read_text())
    assert set(record) == {f.name for f in fields(commit)} | {"seal"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("head_ids", r"the codec changes the head ids of position "),
        ("tail", r"the codec changes the tail ids or counts of position "),
        ("label_logprob", r"the codec changes the label_logprob of position "),
        ("entropy", r"the codec changes the entropy of position "),
        ("tokens", r"sequence \d+ is not what was written: its tokens, document borders or "),
    ],
)
def test_a_shard_that_decodes_differently_is_never_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    decode = PlainCodec.decode

    def forgetful(self: PlainCodec, columns: Any, capture: Capture) -> Block:
        block = decode(self, columns, capture)
        if name == "tokens":
            tokens = block.sequences.tokens
            wrong = replace(tokens, values=tokens.values + 1)
            return replace(block, sequences=replace(block.sequences, tokens=wrong))
        if name == "tail":
            tail = block.targets.tail
            wrong_tail = replace(tail, ids=tail.ids + 1)
            return replace(block, targets=replace(block.targets, tail=wrong_tail))
        array = getattr(block.targets, name).copy()
        array[-1] += 1
        return replace(block, targets=replace(block.targets, **{name: array}))

    monkeypatch.setattr(PlainCodec, "decode", forgetful)
    with pytest.raises(ValueError, match=message):
        write_missing(tmp_path, MANIFEST, BLOCK)
    assert list(tmp_path.glob("shards/*")) == []
    assert scratch_in(tmp_path) == []


def shared(root: Path, **options: Any) -> ShardWriter:
    return ShardWriter(root, MANIFEST, shared=True, **options)


def part(shard: int) -> Block:
    return BLOCK.take(np.array(MANIFEST.shard_rows(shard)))


def test_several_writers_write_the_same_bytes_as_one(tmp_path: Path, whole: dict[str, str]) -> None:
    with shared(tmp_path) as one, shared(tmp_path) as other:
        assert other.missing() == [0, 1, 2]
        with one.claim(1) as mine, other.claim(1) as its, other.claim(0) as another:
            assert (mine, its, another) == (True, False, True)
            other.write(0, part(0))
            # blocks may be encoded by several threads
            parts = (part(1).take(rows) for rows in (np.arange(3), np.array([3])))
            with ThreadPoolExecutor(2) as threads:
                commit = one.commit(1, threads.map(one.encode, parts))
            assert (commit.sequences, commit.bytes) == (4, sum(file.bytes for file in commit.files))
        assert one.missing() == other.missing() == [2]
        with one.claim(0) as mine:
            assert not mine  # the other has committed it
        with other.claim(2) as its:
            assert its
            other.write(2, part(2))
        assert {name: digests(tmp_path)[name] for name in whole} == whole
        (tmp_path / "shards" / "00000.json").unlink()
        with one.claim(0) as mine:
            assert mine
    assert not (tmp_path / "claims").exists()


def test_only_the_first_of_several_writers_clears_up(tmp_path: Path) -> None:
    with shared(tmp_path) as first, first.place.scratch() as folder:
        (tmp_path / f"{SCRATCH_PREFIX}0-x").write_text("half")
        with shared(tmp_path) as second:
            assert len(scratch_in(tmp_path)) == 2
            with first.claim(0):
                second.place.clear()  # not even this takes away what is held
                assert (tmp_path / "claims" / "00000").exists()
        assert not folder.exists()
    (tmp_path / f"{SCRATCH_PREFIX}1-x").write_text("half")
    with shared(tmp_path):
        assert scratch_in(tmp_path) == []


def test_a_store_that_was_made_differently_meanwhile_is_refused(tmp_path: Path) -> None:
    late = shared(tmp_path)
    late.check()
    other = replace(MANIFEST, shard_sequences=5)
    with ShardWriter(tmp_path, other, shared=True):
        assert "made differently: shard_sequences" in refusal(late.__enter__)


def test_the_tokenizer_is_written_by_the_first(tmp_path: Path) -> None:
    calls = []

    def save(folder: Path) -> None:
        folder.mkdir()
        (folder / "tokenizer.json").write_text("{}")
        calls.append(folder)

    ready = threading.Barrier(4)

    def take_part() -> None:
        with shared(tmp_path, save_tokenizer=save):
            ready.wait(20)

    together(*[take_part] * 4)
    assert len(calls) == 1
    before = digests(tmp_path)
    assert set(before) == {"manifest.json", "tokenizer/tokenizer.json", "tokenizer.files.json"}
    (tmp_path / "tokenizer.files.json").unlink()  # killed before its record was written
    with ShardWriter(tmp_path, MANIFEST, save_tokenizer=save):
        pass
    assert len(calls) == 2
    assert digests(tmp_path) == before


def test_blocks_of_wrong_sizes_are_refused(tmp_path: Path) -> None:
    with shared(tmp_path) as writer, writer.claim(0):
        with pytest.raises(ValueError, match="shard 2 holds 2 sequences, got 4"):
            writer.write(2, BLOCK.take(np.arange(4)))
        for sizes in ((), (3,), (2, 2), (3, 2), (1, 3), (4,), (3, 1, 1)):
            blocks = [
                writer.encode(BLOCK.take(np.arange(start, end)))
                for start, end in itertools.pairwise(np.cumsum((0, *sizes)).tolist())
            ]
            expected = r"shard 0 holds \[3, 1\] sequences, got \[|a shard needs at least one block"
            with pytest.raises(ValueError, match=expected):
                writer.commit(0, blocks)
        assert writer.missing() == [0, 1, 2]
    assert scratch_in(tmp_path) == []
    assert list(tmp_path.glob("shards/*")) == []


WRITE_SHARED = """
import sys, time
from pathlib import Path
import numpy as np
from coldstill.data.store.writer import ShardWriter
from oracles import manifest_for, random_block

block = random_block(0, 10)
manifest = manifest_for(block)
with ShardWriter(Path(sys.argv[1]), manifest, shared=True) as writer, writer.claim(0) as mine:
    with writer.claim(1):
        writer.write(1, block.take(np.array(manifest.shard_rows(1))))
        print(mine, flush=True)
        time.sleep(60)
"""


def test_the_claims_of_a_killed_writer_are_free_at_once(
    tmp_path: Path, whole: dict[str, str]
) -> None:
    with running(WRITE_SHARED, tmp_path, line="True") as process, shared(tmp_path) as writer:
        with writer.claim(0) as its:
            assert not its
        process.kill()
        process.wait()
        with writer.claim(0) as its:
            assert its
            writer.write(0, part(0))
    # whole, so never claimed
    assert [path.name for path in tmp_path.glob("claims/0*")] == ["00001"]
    write_missing(tmp_path, MANIFEST, BLOCK)
    assert digests(tmp_path) == whole
    assert not (tmp_path / "claims").exists()
