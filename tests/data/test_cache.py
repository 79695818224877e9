"""The local cache of distant shards: bounded, shared, and never wrong."""

from __future__ import annotations

import errno
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import coldstill.data.places.cache
import pytest
from children import outputs
from coldstill.data.errors import ColdstillError
from coldstill.data.places.cache import CacheSettings, Entry, ShardCache, byte_count
from coldstill.data.store.commit import shard_files
from oracles import cached_bytes
from refusals import refusal

if TYPE_CHECKING:
    from collections.abc import Callable

SIZE = 100


class Source:
    """Shards that can be fetched, and how often each was."""

    def __init__(self, folder: Path, count: int = 12) -> None:
        self.folder, self.fetched = folder, [0] * count
        self.entries = []
        folder.mkdir()
        for i in range(count):
            path = folder / f"{i:05d}.arrow"
            path.write_bytes(bytes([i]) * SIZE)
            self.entries.append(
                Entry(key=f"{i:04x}", address=f"s3://b/{i}", name="x", files=shard_files(path))
            )

    def download(self, index: int) -> Callable[[Path], None]:
        def bring(target: Path) -> None:
            self.fetched[index] += 1
            shutil.copyfile(self.folder / f"{index:05d}.arrow", target)

        return bring


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return Source(tmp_path / "source")


def cache_of(tmp_path: Path, shards: float = 3) -> ShardCache:
    return ShardCache(tmp_path / "cache", round(shards * SIZE))


def get(cache: ShardCache, source: Source, index: int, *, ahead: int | None = None) -> bytes:
    path = cache.get(source.entries[index], source.download(index), ahead=ahead)
    return path.read_bytes()


def kept(cache: ShardCache) -> set[int]:
    """Which entries are whole."""
    return {int(path.parent.name.split("-")[0], 16) for path in cache.folder.glob("*/x")}


def test_a_cached_entry_is_not_fetched_again(tmp_path: Path, source: Source) -> None:
    for _ in range(3):
        assert get(cache_of(tmp_path), source, 4) == bytes([4]) * SIZE
    assert sum(source.fetched) == 1
    caches = [cache_of(tmp_path, 12) for _ in range(4)]
    with ThreadPoolExecutor(8) as pool:
        wanted = [(cache, source, index) for index in range(12) for cache in caches]
        found = list(pool.map(lambda arguments: get(*arguments), wanted))
    assert found == [bytes([index]) * SIZE for index in range(12) for _ in caches]
    assert source.fetched == [1] * 12


def test_the_least_recently_used_entry_is_evicted(tmp_path: Path, source: Source) -> None:
    cache = cache_of(tmp_path, 3.9)
    for index in (0, 1, 2):
        get(cache, source, index)
    get(cache_of(tmp_path, 3.9), source, 0)  # another process
    get(cache, source, 3)
    assert kept(cache) == {0, 2, 3}
    with cache.reading(source.entries[2]) as is_there:
        assert is_there
    get(cache, source, 4)
    assert kept(cache) == {2, 3, 4}


def test_a_smaller_limit_applies_at_the_next_fetch(tmp_path: Path, source: Source) -> None:
    for index in range(5):
        get(cache_of(tmp_path, 5), source, index)
    smaller, tiny = cache_of(tmp_path, 2), cache_of(tmp_path, 0.5)
    get(smaller, source, 6)
    assert kept(smaller) == {4, 6}
    assert refusal(get, tiny, source, 0) == (
        f"s3://b/0: 100 bytes, the cache in {tiny.folder} may hold 50; set logits.cache (or "
        "cache= of open_store) to more"
    )
    assert kept(smaller) == {4, 6}


def test_an_entry_fetched_ahead_is_evicted_last(tmp_path: Path, source: Source) -> None:
    cache = cache_of(tmp_path)
    get(cache, source, 0, ahead=time.time_ns())
    for index in (1, 2, 3, 4):
        get(cache, source, index)
    assert kept(cache) == {0, 3, 4}
    get(cache, source, 0)
    for index in (5, 6, 7):
        get(cache, source, index)
    assert kept(cache) == {5, 6, 7}


def test_an_entry_that_is_read_is_not_evicted(tmp_path: Path, source: Source) -> None:
    cache = cache_of(tmp_path, 2)
    get(cache, source, 0)
    with cache.reading(source.entries[0]) as is_there:
        assert is_there
        for index in (1, 2, 3):
            get(cache, source, index)
        assert kept(cache) == {0, 3}
    get(cache, source, 4)
    assert kept(cache) == {3, 4}
    with cache.reading(source.entries[0]) as is_there:
        assert not is_there


def test_a_cache_that_is_fully_in_use_waits_then_fails(
    tmp_path: Path, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = cache_of(tmp_path, 1)
    get(cache, source, 0)
    with ThreadPoolExecutor(1) as pool:
        with cache.reading(source.entries[0]):
            with monkeypatch.context() as patch:
                patch.setattr(coldstill.data.places.cache, "_PATIENCE", 0.0)
                with pytest.raises(ColdstillError, match="no room for s3://b/1, all of it is in"):
                    get(cache, source, 1)
            waiting = pool.submit(get, cache, source, 1)
            time.sleep(0.1)
            assert not waiting.done()
        assert waiting.result() == bytes([1]) * SIZE
    assert kept(cache) == {1}


def test_the_cache_never_exceeds_its_limit_while_many_threads_fetch(
    tmp_path: Path, source: Source
) -> None:
    cache, seen = cache_of(tmp_path, 3.5), []

    def read(index: int) -> bytes:
        """As a reader does: ask, hold, and ask again if it is gone."""

        def bring(target: Path) -> None:
            source.download(index)(target)
            seen.append(cached_bytes(cache.folder))

        while True:
            path = cache.get(source.entries[index], bring)
            seen.append(cached_bytes(cache.folder))
            with cache.reading(source.entries[index]) as is_there:
                if is_there:
                    return path.read_bytes()

    wanted = [index % 12 for index in range(60)]
    assert [read(index) for index in wanted[:24]] == [bytes([i]) * SIZE for i in wanted[:24]]
    assert source.fetched == [2] * 12
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(read, wanted)) == [bytes([i]) * SIZE for i in wanted]
    assert max(seen) == 3 * SIZE


FETCH = """
import sys, time
from pathlib import Path
from coldstill.data.places.cache import Entry, ShardCache
from coldstill.data.store.commit import shard_files

source, folder, log = map(Path, sys.argv[1:])
cache = ShardCache(folder, 10**6)
print("ready", flush=True)
sys.stdin.readline()
for path in sorted(source.iterdir()):
    def download(target):
        with log.open("a") as stream:
            stream.write(path.name + "\\n")
        time.sleep(0.02)
        target.write_bytes(path.read_bytes())
    entry = Entry(key=path.stem, address=path.name, name="x", files=shard_files(path))
    assert cache.get(entry, download).read_bytes() == path.read_bytes()
print("done")
"""


@pytest.mark.slow
def test_two_processes_share_it_and_fetch_each_shard_once(tmp_path: Path, source: Source) -> None:
    log = tmp_path / "log"
    assert outputs(FETCH, source.folder, tmp_path / "c", log, count=2) == ["done\n"] * 2
    assert sorted(log.read_text().split()) == [f"{i:05d}.arrow" for i in range(12)]


def test_leftovers_of_a_killed_process_are_deleted(tmp_path: Path, source: Source) -> None:
    cache = cache_of(tmp_path, 2)
    half = cache.folder / source.entries[0].label
    half.mkdir(parents=True)
    (half / ".unfinished-x").write_bytes(b"half")
    doomed = cache.folder / ".unfinished-0123"
    doomed.mkdir()
    (doomed / "x").write_bytes(b"whole once")
    assert get(cache, source, 1) == bytes([1]) * SIZE
    assert not doomed.exists()
    assert get(cache, source, 0) == bytes([0]) * SIZE
    assert get(cache, source, 2) == bytes([2]) * SIZE
    assert cached_bytes(cache.folder) == 2 * SIZE


def test_a_damaged_copy_is_fetched_again(tmp_path: Path, source: Source) -> None:
    path = cache_of(tmp_path).get(source.entries[0], source.download(0))
    for content in (b"x" * SIZE, bytes(SIZE - 1), b"", "missing", "a folder"):
        path.unlink()
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content == "a folder":
            path.mkdir()
        assert get(cache_of(tmp_path), source, 0) == bytes([0]) * SIZE  # another process
    assert source.fetched[0] == 6


def test_a_damaged_arrival_is_fetched_again_up_to_three_times(
    tmp_path: Path, source: Source
) -> None:
    def spoiled(target: Path) -> None:
        source.download(0)(target)
        if source.fetched[0] <= 3:
            target.write_bytes(b"wrong")

    cache = cache_of(tmp_path)
    assert cache.get(source.entries[0], spoiled).read_bytes() == bytes(SIZE)
    assert source.fetched[0] == 4
    message = refusal(cache.get, source.entries[2], source.download(1))
    assert message.startswith("s3://b/2: damaged: its checksum is not the one it was")
    assert (source.fetched[1], kept(cache)) == (4, {0})
    assert get(cache, source, 2) == bytes([2]) * SIZE


@pytest.mark.parametrize(
    "error",
    [KeyboardInterrupt(), ColdstillError("no"), OSError("odd"), OSError(errno.ENOSPC, "full")],
    ids=repr,
)
def test_a_fetch_that_fails_leaves_nothing(
    tmp_path: Path, source: Source, error: BaseException
) -> None:
    def fails(target: Path) -> None:
        target.write_bytes(b"half")
        raise error

    cache = cache_of(tmp_path)
    with pytest.raises((type(error), ColdstillError)) as caught:
        cache.get(source.entries[0], fails)
    if getattr(error, "errno", None):
        assert str(caught.value).startswith(f"{cache.folder}: the disk is full; ")
    assert cached_bytes(cache.folder) == 0
    assert get(cache, source, 0) == bytes(SIZE)
    shutil.rmtree(cache.folder)  # as the user may
    with cache.reading(source.entries[0]) as is_there:
        assert not is_there
    assert get(cache, source, 0) == bytes(SIZE)


def test_a_shard_of_many_files_is_complete_or_missing(tmp_path: Path) -> None:
    made = tmp_path / "made"
    (made / "c" / "0").mkdir(parents=True)
    (made / "c" / "0" / "1").write_bytes(b"12345")
    (made / "zarr.json").write_bytes(b"{}")
    entry = Entry(key="ab", address="s3://b/z", name="z.zarr", files=shard_files(made))

    def bring(target: Path) -> None:
        for file in entry.files:
            shutil.copyfile(made / file.name, target / file.name)

    path = cache_of(tmp_path).get(entry, bring)
    assert path == tmp_path / "cache" / "ab-7" / "z.zarr"
    (path / "c" / "0" / "1").unlink()
    path = cache_of(tmp_path).get(entry, bring)
    assert (path / "c" / "0" / "1").read_bytes() == b"12345"


def test_the_folder_of_the_cache_follows_the_settings_and_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLDSTILL_CACHE", str(tmp_path / "named"))
    assert CacheSettings().place == tmp_path / "named"
    assert CacheSettings(folder=tmp_path).place == tmp_path
    monkeypatch.delenv("COLDSTILL_CACHE")
    assert CacheSettings().place == Path(os.path.expanduser("~/.cache/coldstill"))
    assert CacheSettings().bytes == 20 * 10**9


def test_sizes_are_read_with_their_units() -> None:
    for text, count in {
        "20 GB": 20 * 10**9,
        "1.5gib": 3 * 2**29,
        "512": 512,
        7: 7,
        " 1 kB ": 1000,
        2.5e3: 2500,
    }.items():
        assert byte_count(text) == count
    for wrong in ("", "GB", "20 potatoes", "-1 GB", "0", 0, -5, True, None):
        with pytest.raises(ValueError, match="is not a size; write a number and a unit, such as"):
            byte_count(wrong)
