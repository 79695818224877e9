"""Reading a distant store through a small cache: the same batches, in the space and with the
fetches that the order allows."""

from __future__ import annotations

import functools
import threading
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from children import together
from coldstill.data.errors import ColdstillError
from coldstill.data.order import WINDOW, epoch_order
from coldstill.data.places.cache import CacheSettings
from coldstill.data.places.objects import Objects
from coldstill.data.store.reader import StoreReader, open_store
from oracles import cached_bytes, draws, manifest_for, random_block, write_missing
from refusals import refusal

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from coldstill.data.schema import Block
    from distance import Distance

pytest_plugins = ("distance",)

SHARDS, EACH = 12, 6
BLOCK = random_block(3, SHARDS * EACH)
MANIFEST = manifest_for(BLOCK, shard_sequences=EACH, block_sequences=2)


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch, memory: Distance) -> Counter[str]:
    """How often each shard was fetched, without those of a reader that an earlier test left."""
    counts: Counter[str] = Counter()
    download = Objects.download

    def counted(self: Objects, files: dict[str, Path]) -> None:
        if str(self).startswith(memory.url):
            counts.update({name.split("/")[1] for name in files})
        download(self, files)

    monkeypatch.setattr(Objects, "download", counted)
    return counts


@pytest.fixture
def near(tmp_path: Path) -> StoreReader:
    """The same store on this disk."""
    write_missing(tmp_path / "near", MANIFEST, BLOCK)
    return open_store(tmp_path / "near")


def largest(store: StoreReader) -> int:
    return max(commit.bytes for commit in store.commits())


def opened(distance: Distance, limit: float) -> StoreReader:
    """The store with a cache of this size in bytes."""
    cache = CacheSettings(folder=distance.cache.place, bytes=round(limit))
    return open_store(f"{distance.url}/store", cache=cache)


def write(distance: Distance, manifest: Any = MANIFEST) -> None:
    write_missing(f"{distance.url}/store", manifest, BLOCK)


def assert_same(one: Block, other: Block) -> None:
    assert np.array_equal(one.sequences.ids, other.sequences.ids)
    assert np.array_equal(one.targets.head_logprobs, other.targets.head_logprobs)
    assert np.array_equal(draws(one.targets.tail), draws(other.targets.tail))


def settled(condition: Callable[[], bool]) -> bool:
    """Whether a condition becomes true within seconds."""
    end = time.monotonic() + 10
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def windowed(store: StoreReader, epoch: int, window: int) -> Any:
    """An epoch's order in which at most this many shards are mixed."""
    return epoch_order(5, epoch, len(store), EACH, 2, window=window)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "shards"), [("arrow", 2.5), ("arrow", 4.2), ("zarr", 4.2)])
def test_an_epoch_through_a_small_cache_is_the_same_and_fetches_each_shard_once(
    memory: Distance, near: StoreReader, fetched: Counter[str], kind: str, shards: float
) -> None:
    write(memory, manifest_for(BLOCK, shard_sequences=EACH, block_sequences=2, store=kind))
    limit = shards * largest(opened(memory, 10**9))
    store = opened(memory, limit)
    for epoch in range(2):
        fetched.clear()
        order = windowed(store, epoch, 2)
        store.will_read([order])
        for start in range(0, len(order), 5):
            rows = order[start : start + 5]
            assert_same(store.read(rows), near.read(rows))
            assert cached_bytes(memory.cache.place) <= limit
        # what was left from before need not be fetched at all
        assert set(fetched.values()) == {1}
        assert len(fetched) >= SHARDS - int(shards) if epoch else len(fetched) == SHARDS


@pytest.mark.slow
def test_reading_ahead_works_over_s3(s3: Distance, near: StoreReader) -> None:
    write(s3)
    limit = 8.5 * largest(near)
    store = opened(s3, limit)
    store.expect_room()
    s3.network.log.clear()
    s3.network.spoil("flipped", r"GET .*0\.arrow", times=2)
    s3.network.spoil("cut", r"GET .*1\.arrow", times=2)
    s3.network.spoil("slow", r"GET .*\.arrow", times=5, seconds=0.05)
    pairs = zip(store.batches(7, seed=1), near.batches(7, seed=1), strict=True)
    for one, other in pairs:
        assert_same(one, other)
        assert cached_bytes(s3.cache.place) <= limit
    assert SHARDS + 4 <= s3.network.count(r"GET .*\.arrow") <= SHARDS + 6
    assert not any(fault.times for fault in s3.network.faults)


def test_a_cache_smaller_than_the_window_gives_the_same_epoch(
    memory: Distance, near: StoreReader, fetched: Counter[str]
) -> None:
    write(memory)
    limit = 1.5 * largest(near)
    store = opened(memory, limit)
    for one, other in zip(store.batches(9, seed=0), near.batches(9, seed=0), strict=True):
        assert_same(one, other)
        assert cached_bytes(memory.cache.place) <= limit
    assert fetched.total() > SHARDS


def test_training_through_a_cache_smaller_than_the_window_is_refused(
    memory: Distance, near: StoreReader
) -> None:
    write(memory)
    needed = sum(sorted(commit.bytes for commit in near.commits())[-WINDOW:])
    opened(memory, needed).expect_room()
    near.expect_room()
    assert refusal(opened(memory, needed - 1).expect_room) == (
        f"{memory.url}/store: logits.cache: {needed - 1:,} bytes are too few: training shuffles 8 "
        f"shards together; set it to at least {needed:,}, twice that to fetch ahead"
    )


def test_shards_are_fetched_before_they_are_read(
    memory: Distance, fetched: Counter[str], near: StoreReader
) -> None:
    write(memory)
    store = opened(memory, 10 * largest(near))
    store.will_read([np.arange(len(store))])
    assert settled(lambda: fetched.total() == 5)  # half of the cache, and no more
    time.sleep(0.2)
    assert list(fetched.elements()) == [f"{i:05d}.arrow" for i in range(5)]
    store.read(np.arange(2 * EACH))
    assert fetched["00001.arrow"] == 1
    assert settled(lambda: fetched.total() == 7)
    store.will_read([np.arange(len(store))[::-1]])  # replaces the old order
    assert settled(lambda: "00011.arrow" in fetched)


def test_entries_in_use_are_not_evicted_by_reading_ahead(
    memory: Distance, fetched: Counter[str], near: StoreReader
) -> None:
    write(memory)
    store = opened(memory, 3 * largest(near))
    order = windowed(store, 0, 3)
    store.will_read([order])
    store.read(order[: 3 * EACH])  # the first window, all of which may still be in use
    time.sleep(0.3)
    assert fetched.total() == 3
    store.read(order[3 * EACH : 3 * EACH + 1])
    assert settled(lambda: fetched.total() >= 5)


def test_reading_ahead_follows_other_processes(
    memory: Distance, fetched: Counter[str], near: StoreReader
) -> None:
    write(memory)
    limit = 4 * largest(near)
    sampler, worker = opened(memory, limit), opened(memory, limit)
    sampler.will_read([np.arange(len(sampler))])
    for shard in range(SHARDS):
        assert settled(lambda: fetched.total() >= min(shard + 2, SHARDS))  # noqa: B023
        worker.read(np.arange(EACH) + shard * EACH)
    assert set(fetched.values()) == {1}


def test_an_error_while_reading_ahead_is_raised_when_the_shard_is_read(
    memory: Distance, near: StoreReader
) -> None:
    write(memory)
    memory.place().write("shards/00002.arrow", b"damaged")
    store = opened(memory, 10**9)
    store.will_read([np.arange(len(store))])
    assert_same(store.read(np.arange(2 * EACH)), near.read(np.arange(2 * EACH)))
    with pytest.raises(ColdstillError, match=r"shards/00002\.arrow: damaged: 7 bytes, expected"):
        store.read(np.array([2 * EACH]))
    row = np.array([3 * EACH])
    assert_same(store.read(row), near.read(row))


def test_the_thread_ends_when_all_entries_are_used(memory: Distance, near: StoreReader) -> None:
    def ours() -> int:
        return sum(thread.name == "coldstill read-ahead" for thread in threading.enumerate())

    write(memory)
    before = ours()
    store = opened(memory, 10**9)
    for _ in range(3):
        list(store.batches(5))
    assert settled(lambda: ours() <= before)


@pytest.mark.slow
def test_readers_in_threads_share_a_small_cache(
    memory: Distance, near: StoreReader, fetched: Counter[str]
) -> None:
    write(memory)
    limit = 3.5 * largest(near)

    def read(seed: int) -> None:
        store, own = opened(memory, limit), open_store(str(near.place))
        for one, other in zip(store.batches(5, seed=seed), own.batches(5, seed=seed), strict=True):
            assert_same(one, other)

    together(*(functools.partial(read, seed) for seed in range(3)))
