from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from coldstill.data.codecs import CODECS
from coldstill.data.codecs.plain import PlainCodec
from coldstill.data.errors import ColdstillError
from coldstill.data.files import SCRATCH_PREFIX
from coldstill.data.store.commit import shard_files
from coldstill.data.store.writer import ShardWriter
from oracles import digests, manifest_for, random_block, write_missing

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
    return digests(root)


def scratch_in(root: Path) -> list[str]:
    return [path.name for path in root.rglob(f"{SCRATCH_PREFIX}*")]


def test_a_store_is_a_manifest_and_shards_with_their_records(whole: dict[str, str]) -> None:
    shards = [f"shards/0000{i}{end}" for i in range(3) for end in (".arrow", ".json")]
    assert sorted(whole) == sorted(["manifest.json", *shards])


class Killed(BaseException):
    """The process is gone."""


class DyingDisk:
    """Counts what changes the disk; from event number `last` on nothing changes it any more.

    Nothing cleans up after a process that was killed, so the clean-up must fail like the rest.
    """

    def __init__(self, patch: pytest.MonkeyPatch, last: int) -> None:
        self._patch, self.last, self.events = patch, last, 0
        self._kill(os, "fsync")
        for name in ("replace", "unlink", "write_bytes", "mkdir"):
            self._kill(Path, name)
        self._kill(shutil, "rmtree")
        self._kill(PlainCodec, "encode")  # between the blocks of a shard

    def _kill(self, owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def wrapped(*arguments: Any, **options: Any) -> Any:
            self.events += 1
            if self.events >= self.last:
                raise Killed
            return original(*arguments, **options)

        self._patch.setattr(owner, name, wrapped)


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
        disk = DyingDisk(patch, last=sys.maxsize)
        write(tmp_path / "counted", MANIFEST, BLOCK)
    assert disk.events > 30
    seen = set()
    for last in range(1, disk.events + 1):
        root = tmp_path / str(last)
        with pytest.MonkeyPatch.context() as patch:
            DyingDisk(patch, last)
            with pytest.raises(Killed):
                write(root, MANIFEST, BLOCK)
        for record in root.glob("shards/0*.json"):  # whatever has a record is whole
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
    process = subprocess.Popen(
        [sys.executable, "-c", WRITE_SLOWLY, str(tmp_path)],
        stdout=subprocess.PIPE,
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])},
        text=True,
    )
    assert process.stdout is not None
    with process, process.stdout:
        try:
            assert process.stdout.readline() == "writing\n"
            assert len(scratch_in(tmp_path)) == 1
            with (
                pytest.raises(ColdstillError, match="another process is writing this store"),
                ShardWriter(tmp_path, MANIFEST),
            ):
                pass
            assert len(scratch_in(tmp_path)) == 1  # the refused one has cleared nothing away
        finally:
            process.send_signal(signal.SIGKILL)
    assert sorted(path.name for path in tmp_path.glob("shards/0*")) == ["00000.arrow", "00000.json"]
    with ShardWriter(tmp_path, MANIFEST) as writer:
        assert scratch_in(tmp_path) == []
        assert writer.missing() == [1, 2]
    write_missing(tmp_path, MANIFEST, BLOCK)
    assert digests(tmp_path) == whole


def test_a_writer_that_needs_the_store_alone_excludes_all_others(tmp_path: Path) -> None:
    for first, second in ((False, False), (False, True), (True, False)):
        with ShardWriter(tmp_path, MANIFEST, shared=first):
            other = ShardWriter(tmp_path, MANIFEST, shared=second)
            with pytest.raises(ColdstillError) as caught, other:
                pass
            wait = f"{tmp_path}: another process is writing this store; wait for it"
            assert str(caught.value) == wait


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
        with pytest.raises(ColdstillError) as caught:
            write_missing(tmp_path, MANIFEST, BLOCK)
    assert str(caught.value).startswith(f"{tmp_path}/{where}: the disk is full")
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
    with pytest.raises(ColdstillError, match="store: a file, where a store's folder should be"):
        write_missing(store, MANIFEST, BLOCK)
    assert store.read_text() == "mine"
    store.unlink()
    write_missing(store, MANIFEST, BLOCK)
    (store / "manifest.json").unlink()
    before = digests(store)
    with pytest.raises(ColdstillError) as caught, ShardWriter(store, MANIFEST):
        pass
    assert str(caught.value) == f"{store}: holds shards but no manifest.json; move it away"
    assert digests(store) == before


def test_the_manifest_of_a_store_is_never_written_again(tmp_path: Path) -> None:
    write_missing(tmp_path, MANIFEST, BLOCK)
    before = (tmp_path / "manifest.json").stat()
    renamed = replace(MANIFEST, teacher=replace(MANIFEST.teacher, name="other"))
    write_missing(tmp_path, renamed, BLOCK)
    after = (tmp_path / "manifest.json").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_the_commit_record_has_the_counts_of_the_shard(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, MANIFEST) as writer:
        part = BLOCK.take(np.array(MANIFEST.shard_rows(1)))
        commit = writer.write(1, part)
    path = tmp_path / "shards" / "00001.arrow"
    assert commit.shard == 1
    assert commit.sequences == 4
    assert commit.documents == sum(len(row) for row in part.sequences.document_ids)
    assert commit.tokens == sum(len(row) for row in part.sequences.tokens)
    assert commit.positions == sum(len(row) for row in part.sequences.positions)
    assert commit.bytes == path.stat().st_size
    assert commit.files == shard_files(path)
    record = json.loads((tmp_path / "shards" / "00001.json").read_text())
    assert set(record) == {f.name for f in fields(commit)} | {"seal"}


class Forgetful(PlainCodec):
    """Returns another id than it was given."""

    def decode(self, columns: Any, capture: Capture) -> Block:
        block = super().decode(columns, capture)
        ids = block.targets.head_ids.copy()
        ids[-1, 0] ^= 1
        return replace(block, targets=replace(block.targets, head_ids=ids))


def test_a_shard_that_decodes_differently_is_never_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CODECS, "plain", Forgetful)
    with pytest.raises(ValueError, match=r"head ids of position .* do not come back"):
        write_missing(tmp_path, MANIFEST, BLOCK)
    assert list(tmp_path.glob("shards/*")) == []
    assert scratch_in(tmp_path) == []


def shared(root: Path, **options: Any) -> ShardWriter:
    return ShardWriter(root, MANIFEST, shared=True, **options)


def part(shard: int) -> Block:
    return BLOCK.take(np.array(MANIFEST.shard_rows(shard)))


def test_several_writers_write_the_same_bytes_as_one(tmp_path: Path, whole: dict[str, str]) -> None:
    with shared(tmp_path) as one, shared(tmp_path) as other:
        with one.claim(1) as mine, other.claim(1) as its, other.claim(0) as another:
            assert (mine, its, another) == (True, False, True)
            other.write(0, part(0))
            one.write(1, part(1))
        assert one.missing() == other.missing() == [2]
        with other.claim(2) as its:
            assert its
            other.write(2, part(2))
    assert digests(tmp_path) == whole
    assert not (tmp_path / "claims").exists()


def test_a_shard_that_another_has_committed_is_not_claimed(tmp_path: Path) -> None:
    with shared(tmp_path) as one, shared(tmp_path) as other:
        assert other.missing() == [0, 1, 2]
        with one.claim(0):
            one.write(0, part(0))
        with other.claim(0) as its:
            assert not its
        (tmp_path / "shards" / "00000.json").unlink()
        with other.claim(0) as its:
            assert its


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
    with (
        ShardWriter(tmp_path, other, shared=True),
        pytest.raises(ColdstillError, match="made differently: shard_sequences"),
        late,
    ):
        pass


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

    threads = [threading.Thread(target=take_part) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
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
            said = r"shard 0 holds \[3, 1\] sequences, got \[|a shard needs at least one block"
            with pytest.raises(ValueError, match=said):
                writer.commit(0, blocks)
        assert writer.missing() == [0, 1, 2]
    assert scratch_in(tmp_path) == []
    assert list(tmp_path.glob("shards/*")) == []


def test_blocks_encoded_by_several_threads_make_the_same_shard(
    tmp_path: Path, whole: dict[str, str]
) -> None:
    rows = MANIFEST.shard_rows(1)
    parts = [BLOCK.take(np.array(rows[:3])), BLOCK.take(np.array(rows[3:]))]
    with shared(tmp_path) as writer, writer.claim(1), ThreadPoolExecutor(2) as threads:
        commit = writer.commit(1, threads.map(writer.encode, parts))
    assert (commit.sequences, commit.bytes) == (4, sum(file.bytes for file in commit.files))
    found = digests(tmp_path)
    assert found == {name: whole[name] for name in found}
    assert {"shards/00001.arrow", "shards/00001.json"} < set(found)


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
    process = subprocess.Popen(
        [sys.executable, "-c", WRITE_SHARED, str(tmp_path)],
        stdout=subprocess.PIPE,
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])},
        text=True,
    )
    assert process.stdout is not None
    with process, process.stdout:
        try:
            assert process.stdout.readline() == "True\n"
            with shared(tmp_path) as writer:
                with writer.claim(0) as its:
                    assert not its
                process.send_signal(signal.SIGKILL)
                process.wait()
                with writer.claim(0) as its:
                    assert its
                    writer.write(0, part(0))
        finally:
            process.kill()
    # The claim of the killed writer stays: its shard is done, so it is never claimed again.
    assert [path.name for path in tmp_path.glob("claims/0*")] == ["00001"]
    write_missing(tmp_path, MANIFEST, BLOCK)
    assert digests(tmp_path) == whole
    assert not (tmp_path / "claims").exists()
