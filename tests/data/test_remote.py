"""Stores at an address: written, read, killed and resumed, through a network that fails."""

from __future__ import annotations

import importlib
import os
import pickle
import sys
from typing import TYPE_CHECKING, Any

import coldstill.data.places.remote
import fsspec
import numpy as np
import pytest
from children import Dying, Killed, running
from coldstill.data.places.faults import Patience
from coldstill.data.places.objects import Objects
from coldstill.data.places.place import place_at
from coldstill.data.store.reader import StoreReader, open_store
from coldstill.data.store.writer import ShardWriter
from oracles import cached_bytes, digests, draws, manifest_for, random_block, write_missing
from refusals import refusal

if TYPE_CHECKING:
    from pathlib import Path

    from coldstill.data.schema import Block
    from distance import Distance

pytest_plugins = ("distance",)

BLOCK = random_block(0, 10)  # three shards, of which the last is short, of two blocks each
MANIFEST = manifest_for(BLOCK)
FEW = BLOCK.take(np.arange(4))
DATA = r"GET .*\d+\.arrow"


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same store on this disk."""
    root = tmp_path_factory.mktemp("local")
    write_missing(root, MANIFEST, BLOCK)
    return root


def write(distance: Distance, name: str = "store") -> str:
    """Write a complete store; returns its address."""
    url = f"{distance.url}/{name}"
    write_missing(url, MANIFEST, BLOCK)
    return url


def send(distance: Distance, local: Path, name: str = "store") -> str:
    """Upload a copy of a store; returns its address."""
    distance.place(name)._objects.upload({file: local / file for file in digests(local)})
    if distance.proxy is not None:
        distance.proxy.log.clear()
    return f"{distance.url}/{name}"


def opened(distance: Distance, name: str = "store", **options: Any) -> StoreReader:
    return open_store(f"{distance.url}/{name}", cache=distance.cache, **options)


def read_all(distance: Distance) -> Block:
    store = opened(distance)
    return store.read(np.arange(len(store)))


def assert_right(found: Block, wanted: Block = BLOCK) -> None:
    assert np.array_equal(found.sequences.tokens.values, wanted.sequences.tokens.values)
    assert np.array_equal(found.targets.head_ids, wanted.targets.head_ids)
    assert np.array_equal(found.targets.head_logprobs, wanted.targets.head_logprobs)
    assert np.array_equal(draws(found.targets.tail), draws(wanted.targets.tail))


def read_refusal(distance: Distance) -> str:
    message = refusal(read_all, distance)
    cache = distance.cache.place
    assert not cache.exists() or cached_bytes(cache) == 0  # nothing wrong stays
    return message


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["arrow", "zarr"])
def test_a_remote_store_holds_the_same_bytes(far: Distance, tmp_path: Path, kind: str) -> None:
    block = BLOCK if kind == "arrow" else FEW
    manifest = manifest_for(block, store=kind)
    for root in (f"{far.url}/store", tmp_path / "local"):
        write_missing(root, manifest, block)
    assert far.digests() == digests(tmp_path / "local")
    assert_right(read_all(far), block)


def test_shuffled_epochs_are_the_same_and_fetch_each_shard_once(s3: Distance, local: Path) -> None:
    send(s3, local)
    store, near = opened(s3), open_store(local)
    for reader, epoch in ((store, 0), (store, 1), (store, 2), (opened(s3), 0)):
        found, wanted = (r.batches(3, seed=4, epoch=epoch) for r in (reader, near))
        for one, other in zip(found, wanted, strict=True):
            assert_right(one, other)
    assert [s3.network.count(f"GET .*0000{i}.arrow") for i in range(3)] == [1, 1, 1]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["refused", "cut", "busy", "short", "flipped"])
@pytest.mark.parametrize("what", [DATA, "GET .*manifest", r"GET .*00000\.json"])
def test_reading_survives_network_errors(s3: Distance, kind: Any, what: str, local: Path) -> None:
    send(s3, local)
    s3.network.spoil(kind, what, times=2 if what == DATA else 1)
    assert_right(read_all(s3))
    assert s3.network.faults[0].times == 0


@pytest.mark.slow
def test_slow_answers_are_awaited_and_too_slow_ones_requested_again(
    s3: Distance, monkeypatch: pytest.MonkeyPatch, local: Path
) -> None:
    send(s3, local)
    s3.network.spoil("slow", DATA, times=1, seconds=0.3)
    assert_right(read_all(s3))
    assert s3.network.count(DATA) == 3
    options = {"config_kwargs": {"read_timeout": 0.2, "retries": {"total_max_attempts": 1}}}
    monkeypatch.setitem(coldstill.data.places.objects._OWN_OPTIONS, "s3", options)
    s3.network.spoil("slow", r"GET .*manifest", times=1, seconds=0.6)
    assert opened(s3).manifest.sequences == len(BLOCK)
    assert s3.network.count("GET .*manifest") == 3


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["refused", "lost", "busy"])
@pytest.mark.parametrize("what", ["PUT", "HEAD", r"GET .*list-type"])
def test_writing_survives_network_errors(s3: Distance, local: Path, kind: Any, what: str) -> None:
    s3.network.spoil(kind, what, times=3)
    write(s3)
    assert s3.network.faults[0].times == 0
    s3.network.faults.clear()
    assert s3.digests() == digests(local)
    assert s3.place().names(".") == {"manifest.json", "shards"}


@pytest.mark.parametrize("kind", ["short", "flipped"])
def test_permanently_wrong_bytes_never_reach_a_reader(s3: Distance, kind: Any, local: Path) -> None:
    url = send(s3, local)
    record = r"GET .*00000\.json"
    s3.network.spoil(kind, DATA)
    assert read_refusal(s3).startswith(f"{url}/shards/00000.arrow: damaged: ")
    assert (s3.network.count(DATA), s3.network.count(record)) == (4, 1)
    s3.network.faults.clear()
    s3.network.spoil(kind, record)
    assert read_refusal(s3).startswith(f"{url}/shards/00000.json: ")
    assert s3.network.count(record) == 3  # alike twice: that is how it is


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["refused", "cut", "busy"])
def test_a_lasting_network_error_is_one_line(s3: Distance, kind: Any, local: Path) -> None:
    url = send(s3, local)
    s3.network.spoil(kind, DATA)
    message = read_refusal(s3)
    assert message.startswith(url)
    assert "still failing after 6 tries (" in message
    assert message.endswith("run the same command again, what was finished is kept")
    assert 6 <= s3.network.count(DATA) <= 12  # a connection that was open is tried anew below us


@pytest.mark.parametrize("what", ["GET .*manifest", "HEAD", "PUT"])
def test_a_refused_request_is_not_repeated(s3: Distance, what: str, local: Path) -> None:
    url = send(s3, local)
    s3.network.spoil("denied", what)
    is_read = "manifest" in what
    message = refusal(opened, s3) if is_read else refusal(write, s3, "other")
    assert message.startswith(url if is_read else f"{s3.url}/other")
    assert "access refused (" in message
    assert "check the credentials" in message
    assert s3.network.count(what) == 1


def test_a_missing_bucket_or_credential_is_named(
    s3: Distance, monkeypatch: pytest.MonkeyPatch, local: Path
) -> None:
    for call in (open_store, lambda url: write_missing(url, MANIFEST, BLOCK)):
        assert refusal(call, "s3://no-such-bucket/store") == (
            "s3://no-such-bucket/store/manifest.json: there is no such bucket; create it, or "
            "correct the address"
        )
    system = fsspec.get_filesystem_class("s3")
    send(s3, local)
    system.clear_instance_cache()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    assert "check the credentials" in read_refusal(s3)
    system.clear_instance_cache()


def test_an_address_that_cannot_be_opened_is_refused(
    memory: Distance, monkeypatch: pytest.MonkeyPatch
) -> None:
    for url, message in {
        "nonsense://a/b": "nonsense://a/b: no such address: Protocol not known: nonsense",
        "s3://": "s3://: names no bucket or folder; give s3://NAME/...",
        "memory://": "memory://: names no bucket or folder; give memory://NAME/...",
        f"{memory.url}/x": f"{memory.url}/x: no manifest.json there, so not a store",
    }.items():
        assert refusal(open_store, url).startswith(message)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    known = importlib.import_module("fsspec.registry")._registry
    monkeypatch.delitem(known, "s3", raising=False)
    assert refusal(open_store, "s3://bucket/store") == (
        "s3://bucket/store: s3:// needs a package that is not installed; pip install "
        "'coldstill[s3]'"
    )
    place = place_at("ftp://user:secret@host/store?sig=secret")  # a password is never shown
    assert str(place) == "ftp://host/store"
    assert place.path("shards/1") == "ftp://host/store/shards/1"


@pytest.mark.slow
def test_a_store_that_was_killed_at_any_request_can_be_finished(far: Distance, local: Path) -> None:
    whole = digests(local)
    changes = [(Objects, name) for name in ("write", "create", "upload", "remove")]
    with pytest.MonkeyPatch.context() as patch:
        counted = Dying(patch, sys.maxsize, changes)
        write(far, "counted")
    assert counted.calls >= 9
    seen = set()
    for last in range(1, counted.calls + 1) if far.proxy is None else (6,):
        with pytest.MonkeyPatch.context() as patch:
            Dying(patch, last, changes)
            with pytest.raises(Killed):
                write(far, str(last))
        # the dead process was this one, which the lock takes for alive
        far.place(str(last)).remove(".lock")
        found = far.digests(str(last))
        for record in (name for name in found if name.endswith("0.json")):
            assert found[record.replace(".json", ".arrow")] == whole["shards/00000.arrow"]
        seen.add(sum(name.startswith("shards") and name.endswith("json") for name in found))
        if "manifest.json" in found and "shards/00002.json" not in found:
            assert "incomplete, " in refusal(opened, far, str(last))
        write(far, str(last))
        assert far.digests(str(last)) == whole
    assert seen == ({0, 1, 2, 3} if far.proxy is None else {1})


WRITE_SLOWLY = """
import sys, time
from coldstill.data.places.objects import Objects
from oracles import manifest_for, random_block, write_missing

write = Objects.write

def slowly(self, name, content, *checks, **options):
    if name == "shards/00001.json":
        print("writing", flush=True)
        time.sleep(60)
    return write(self, name, content, *checks, **options)

Objects.write = slowly
block = random_block(0, 10)
write_missing(sys.argv[1], manifest_for(block), block)
"""


@pytest.mark.slow
def test_a_process_killed_before_the_commit_record_loses_the_shard(
    s3: Distance, local: Path
) -> None:
    url = f"{s3.url}/store"
    with running(WRITE_SLOWLY, url, line="writing") as process:
        message = refusal(ShardWriter(url, MANIFEST).__enter__)
        assert f"is writing this store: process {process.pid} on " in message
    names = s3.place().names("shards")
    assert names == {"00000.arrow", "00000.json", "00001.arrow"}
    assert opened(s3, incomplete=True).done == [0]
    write(s3)  # at once: on this machine a dead process is known to be dead
    assert s3.digests() == digests(local)


@pytest.mark.slow
def test_a_replaced_store_is_never_read_from_old_copies(far: Distance, local: Path) -> None:
    send(far, local)
    assert_right(read_all(far))
    far.place().remove("shards")
    far.place().remove("manifest.json")
    other = random_block(9, 10)
    write_missing(f"{far.url}/store", manifest_for(other), other)
    assert_right(read_all(far), other)


@pytest.mark.slow
def test_a_reader_works_after_a_fork_and_in_a_new_process(
    s3: Distance, tmp_path: Path, local: Path
) -> None:
    send(s3, local)
    store = opened(s3)
    assert_right(store.read(np.arange(4)), BLOCK.take(np.arange(4)))  # connected, with a thread
    (tmp_path / "store").write_bytes(pickle.dumps(store))
    child = os.fork()
    if child == 0:  # no assertion may leave this block
        try:
            assert_right(store.read(np.arange(10)))
            os._exit(0)
        except BaseException:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    assert s3.network.count(DATA) == 3
    code = (
        "import pickle, sys, numpy as np\n"
        "store = pickle.load(open(sys.argv[1], 'rb'))\n"
        "print(store.read(np.arange(10)).sequences.tokens.values.tolist())"
    )
    with running(code, tmp_path / "store", line=str(BLOCK.sequences.tokens.values.tolist())):
        pass


def test_commit_records_are_read_concurrently(s3: Distance, local: Path) -> None:
    send(s3, local)
    s3.network.spoil("slow", r"GET .*\d+\.json", seconds=0.3)
    store = opened(s3)
    assert store.positions == len(BLOCK.targets)
    sizes = [commit.bytes for commit in store.commits()]
    assert sizes == [s3.place().sizes("shards")[f"shards/0000{i}.arrow"] for i in range(3)]


def test_the_time_between_attempts_grows_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)
    for attempt, expected in enumerate([1, 2, 4, 5, 5, 5]):
        Patience(delay=1.0, longest=5.0).wait(attempt)
        assert 0.5 * expected <= waits[-1] <= 1.5 * expected


def test_other_objects_beside_a_store_are_not_changed(s3: Distance, local: Path) -> None:
    system = fsspec.filesystem("s3", use_listings_cache=False)
    bucket = s3.url.removeprefix("s3://")
    system.pipe_file(f"{bucket}/store2/manifest.json", b"not ours")
    system.pipe_file(f"{bucket}/store/notes.txt", b"a person's")
    send(s3, local)
    place = s3.place()
    place.remove("shards")
    assert system.cat_file(f"{bucket}/store2/manifest.json") == b"not ours"
    assert place.read("notes.txt") == b"a person's"
