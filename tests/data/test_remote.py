"""Stores at an address: written, read, killed and resumed, through a network that fails."""

from __future__ import annotations

import importlib
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import coldstill.data.places.remote
import fsspec
import numpy as np
import pytest
from coldstill.data.errors import ColdstillError
from coldstill.data.places.faults import Patience
from coldstill.data.places.objects import Objects
from coldstill.data.places.place import place_at
from coldstill.data.store.reader import StoreReader, open_store
from coldstill.data.store.writer import ShardWriter
from oracles import cached_bytes, digests, manifest_for, random_block, write_missing

if TYPE_CHECKING:
    from coldstill.data.schema import Block
    from distance import Distance

pytest_plugins = ("distance",)

BLOCK = random_block(0, 10)  # three shards, of which the last is short, of two blocks each
MANIFEST = manifest_for(BLOCK)
FEW = BLOCK.take(np.arange(4))
FOLDERS = manifest_for(FEW, store="zarr")
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
    assert np.array_equal(found.targets.tail_ids, wanted.targets.tail_ids)


def refusal(distance: Distance) -> str:
    with pytest.raises(ColdstillError) as caught:
        read_all(distance)
    assert "\n" not in str(caught.value)
    cache = distance.cache.place
    assert not cache.exists() or cached_bytes(cache) == 0  # nothing wrong stays
    return str(caught.value)


def test_a_remote_store_holds_the_same_bytes(far: Distance, local: Path) -> None:
    write(far)
    assert far.digests() == digests(local)
    assert_right(read_all(far))


def test_shards_that_are_folders_hold_the_same_bytes(far: Distance, tmp_path: Path) -> None:
    write_missing(f"{far.url}/store", FOLDERS, FEW)
    write_missing(tmp_path / "local", FOLDERS, FEW)
    assert far.digests() == digests(tmp_path / "local")
    assert_right(read_all(far), FEW)


def test_a_shuffled_epoch_is_the_same(far: Distance, local: Path) -> None:
    send(far, local)
    near = open_store(local)
    for epoch in range(2):
        pairs = zip(
            opened(far).batches(3, seed=4, epoch=epoch),
            near.batches(3, seed=4, epoch=epoch),
            strict=True,
        )
        for one, other in pairs:
            assert_right(one, other)


def test_each_shard_is_fetched_once(s3: Distance, local: Path) -> None:
    send(s3, local)
    store = opened(s3)
    for epoch in range(3):
        list(store.batches(3, seed=0, epoch=epoch))
    list(opened(s3).batches(3, seed=0))
    assert [s3.network.count(f"GET .*0000{i}.arrow") for i in range(3)] == [1, 1, 1]


@pytest.mark.parametrize("kind", ["refused", "cut", "busy", "short", "flipped"])
@pytest.mark.parametrize("what", [DATA, "GET .*manifest", r"GET .*00000\.json"])
def test_reading_survives_network_errors(s3: Distance, kind: Any, what: str, local: Path) -> None:
    send(s3, local)
    s3.network.spoil(kind, what, times=2 if what == DATA else 1)
    assert_right(read_all(s3))
    assert s3.network.faults[0].times == 0


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
    s3.network.spoil(kind, DATA)
    assert refusal(s3).startswith(f"{url}/shards/00000.arrow: damaged: ")
    assert s3.network.count(DATA) == 4


@pytest.mark.parametrize("kind", ["short", "flipped"])
def test_a_permanently_wrong_record_is_named(s3: Distance, kind: Any, local: Path) -> None:
    url = send(s3, local)
    s3.network.spoil(kind, r"GET .*00000\.json")
    assert refusal(s3).startswith(f"{url}/shards/00000.json: ")
    assert s3.network.count(r"GET .*00000\.json") == 2  # alike twice: that is how it is


@pytest.mark.parametrize("kind", ["refused", "cut", "busy"])
def test_a_lasting_network_error_is_one_line(s3: Distance, kind: Any, local: Path) -> None:
    url = send(s3, local)
    s3.network.spoil(kind, DATA)
    said = refusal(s3)
    assert said.startswith(url)
    assert "still failing after 6 tries (" in said
    assert said.endswith("run the same command again, what was finished is kept")
    assert 6 <= s3.network.count(DATA) <= 12  # a connection that was open is tried anew below us


@pytest.mark.parametrize("what", ["GET .*manifest", "HEAD", "PUT"])
def test_a_refused_request_is_not_repeated(s3: Distance, what: str, local: Path) -> None:
    url = send(s3, local)
    s3.network.spoil("denied", what)
    with pytest.raises(ColdstillError) as caught:
        opened(s3) if "manifest" in what else write(s3, "other")
    assert str(caught.value).startswith((url, f"{s3.url}/other"))
    assert "access refused (" in str(caught.value)
    assert "check the credentials" in str(caught.value)
    assert s3.network.count(what) == 1


def test_a_missing_bucket_is_named(s3: Distance) -> None:
    for call in (open_store, lambda url: write_missing(url, MANIFEST, BLOCK)):
        with pytest.raises(ColdstillError) as caught:
            call("s3://no-such-bucket/store")
        assert str(caught.value) == (
            "s3://no-such-bucket/store/manifest.json: there is no such bucket; create it, or "
            "correct the address"
        )


def test_missing_credentials_are_reported(
    s3: Distance, monkeypatch: pytest.MonkeyPatch, local: Path
) -> None:
    system = fsspec.get_filesystem_class("s3")
    send(s3, local)
    system.clear_instance_cache()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    assert "check the credentials" in refusal(s3)
    system.clear_instance_cache()


def test_a_missing_remote_store_is_reported_like_a_local_one(far: Distance) -> None:
    assert refusal(far).startswith(f"{far.url}/store: no manifest.json there, so not a store")


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("nonsense://a/b", "nonsense://a/b: no such address: Protocol not known: nonsense"),
        ("s3://", "s3://: names no bucket or folder; give s3://NAME/..."),
        ("memory://", "memory://: names no bucket or folder; give memory://NAME/..."),
    ],
)
def test_an_invalid_address_is_refused(url: str, said: str) -> None:
    with pytest.raises(ColdstillError) as caught:
        open_store(url)
    assert str(caught.value).startswith(said)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    known = importlib.import_module("fsspec.registry")._registry
    monkeypatch.delitem(known, "s3", raising=False)
    with pytest.raises(ColdstillError) as caught:
        open_store("s3://bucket/store")
    assert str(caught.value) == (
        "s3://bucket/store: s3:// needs a package that is not installed; pip install "
        "'coldstill[s3]'"
    )


def test_a_password_is_never_shown() -> None:
    place = place_at("ftp://user:secret@host/store?sig=secret")
    assert str(place) == "ftp://host/store"
    assert place.path("shards/1") == "ftp://host/store/shards/1"


class Killed(BaseException):
    """The process was killed."""


def test_a_store_that_was_killed_at_any_request_can_be_finished(far: Distance, local: Path) -> None:
    whole = digests(local)

    class Dying:
        """Lets requests pass up to the last one, and none of a dead process."""

        def __init__(self, patch: pytest.MonkeyPatch, last: int) -> None:
            self.events, self.last = 0, last
            for name in ("write", "create", "upload", "remove"):
                self._kill(patch, name)

        def _kill(self, patch: pytest.MonkeyPatch, name: str) -> None:
            original = getattr(Objects, name)

            def wrapped(*arguments: Any, **options: Any) -> Any:
                self.events += 1
                if self.events >= self.last:
                    raise Killed
                return original(*arguments, **options)

            patch.setattr(Objects, name, wrapped)

    with pytest.MonkeyPatch.context() as patch:
        counted = Dying(patch, sys.maxsize)
        write(far, "counted")
    assert counted.events >= 9
    seen = set()
    chosen = range(1, counted.events + 1) if far.proxy is None else (6,)
    for last in chosen:
        with pytest.MonkeyPatch.context() as patch:
            Dying(patch, last)
            with pytest.raises(Killed):
                write(far, str(last))
        # the dead process was this one, which the lock takes for alive
        far.place(str(last)).remove(".lock")
        found = far.digests(str(last))
        for record in (name for name in found if name.endswith("0.json")):
            assert found[record.replace(".json", ".arrow")] == whole["shards/00000.arrow"]
        seen.add(sum(name.startswith("shards") and name.endswith("json") for name in found))
        if "manifest.json" in found and "shards/00002.json" not in found:
            with pytest.raises(ColdstillError, match="incomplete, "):
                opened(far, str(last))
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


def test_a_process_killed_before_the_commit_record_loses_the_shard(
    s3: Distance, local: Path
) -> None:
    url = f"{s3.url}/store"
    process = subprocess.Popen(
        [sys.executable, "-c", WRITE_SLOWLY, url],
        stdout=subprocess.PIPE,
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])},
        text=True,
    )
    assert process.stdout is not None
    with process, process.stdout:
        try:
            assert process.stdout.readline() == "writing\n"
            with pytest.raises(ColdstillError) as caught, ShardWriter(url, MANIFEST):
                pass
            assert f"is writing this store: process {process.pid} on " in str(caught.value)
        finally:
            process.send_signal(signal.SIGKILL)
    names = s3.place().names("shards")
    assert names == {"00000.arrow", "00000.json", "00001.arrow"}
    assert opened(s3, incomplete=True).done == [0]
    write(s3)  # at once: on this machine a dead process is known to be dead
    assert s3.digests() == digests(local)


def test_a_replaced_store_is_never_read_from_old_copies(far: Distance, local: Path) -> None:
    send(far, local)
    assert_right(read_all(far))
    far.place().remove("shards")
    far.place().remove("manifest.json")
    other = random_block(9, 10)
    write_missing(f"{far.url}/store", manifest_for(other), other)
    assert_right(read_all(far), other)


def test_a_reader_works_after_a_fork(s3: Distance, local: Path) -> None:
    send(s3, local)
    store = opened(s3)
    assert_right(store.read(np.arange(4)), BLOCK.take(np.arange(4)))  # connected, with a thread
    child = os.fork()
    if child == 0:  # no assertion may leave this block
        try:
            assert_right(store.read(np.arange(10)))
            os._exit(0)
        except BaseException:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    assert s3.network.count(DATA) == 3


def test_a_reader_can_be_sent_to_a_new_process(s3: Distance, tmp_path: Path, local: Path) -> None:
    send(s3, local)
    store = opened(s3)
    store.read(np.arange(4))
    (tmp_path / "store").write_bytes(pickle.dumps(store))
    code = (
        "import pickle, sys, numpy as np\n"
        "store = pickle.load(open(sys.argv[1], 'rb'))\n"
        "print(store.read(np.arange(10)).sequences.tokens.values.tolist())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "store")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == str(BLOCK.sequences.tokens.values.tolist())


def test_commit_records_are_read_concurrently(s3: Distance, local: Path) -> None:
    send(s3, local)
    s3.network.spoil("slow", r"GET .*\d+\.json", seconds=0.3)
    store = opened(s3)
    assert store.positions == len(BLOCK.targets)
    sizes = [commit.bytes for commit in store.commits()]
    assert sizes == [s3.place().sizes("shards")[f"shards/0000{i}.arrow"] for i in range(3)]


def test_the_time_between_attempts_grows_up_to_a_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)
    patience = Patience(delay=1.0, longest=5.0)
    for attempt in range(6):
        patience.wait(attempt)
    for expected, waited in zip([1, 2, 4, 5, 5, 5], waits, strict=True):
        assert 0.5 * expected <= waited <= 1.5 * expected


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
