"""What every place must do, on a disk, in memory and in an object store."""

from __future__ import annotations

import contextlib
import errno
import pickle
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import coldstill.data.places.claims
import coldstill.data.places.lease
import pytest
from children import Killed, together
from coldstill.data.files import SCRATCH_PREFIX
from coldstill.data.places.local import LocalPlace
from coldstill.data.places.objects import Objects
from coldstill.data.places.place import place_at
from coldstill.data.store.commit import Commit, shard_files, total
from coldstill.data.store.layout import CLAIMS, MANIFEST, STARTING, claim_name
from refusals import refusal

if TYPE_CHECKING:
    from collections.abc import Callable

    from coldstill.data.places.place import Place
    from distance import Distance

pytest_plugins = ("distance",)

NOTHING = total(())


def commit_of(made: Path) -> Commit:
    """A commit record with only files."""
    counts: dict[str, Any] = dict.fromkeys(("shard", "sequences", "documents"), 0)
    return Commit(**counts, tokens=0, positions=0, files=shard_files(made), statistics=NOTHING)


def make_tree(root: Path, **files: str) -> Path:
    """A folder of files; `__` in a name is a slash."""
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def tree(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): path.read_text() for path in root.rglob("*") if path.is_file()
    }


class AnyPlace:
    """The contract; each class below tests one kind of place."""

    def test_files_and_folders_are_read_and_listed(self, place: Place, another: Place) -> None:
        """Names are those directly inside, sizes those at any depth; neither is stale."""
        for name in ("a", "deep/b", "deep/er/c", "deeper"):
            assert not another.exists(name)
            place.write(name, name.encode())
            assert another.read(name) == name.encode()
            assert another.exists(name)
        assert (place.names("."), place.names("deep")) == ({"a", "deep", "deeper"}, {"b", "er"})
        assert place.sizes("deep") == {"deep/b": 6, "deep/er/c": 9}
        assert another.exists("deep")
        assert not place.exists("dee")
        for name in ("nothing", "deep/nothing", "nothing/b.json"):
            with pytest.raises(FileNotFoundError):
                place.read(name)
            assert not place.exists(name)
        assert place.names("nothing") == place.names("a") == set()
        assert place.sizes("nothing") == {}
        place.write("a", b"")
        assert place.read("a") == b""
        assert place.path("shards/1") == f"{place}/shards/1"
        copy: Place = pickle.loads(pickle.dumps(place))
        assert copy.read("deep/b") == b"deep/b"
        assert (str(copy), copy.room) == (str(place), place.room)

    def test_removing_takes_a_file_or_a_folder_and_nothing_else(
        self, place: Place, another: Place
    ) -> None:
        for name in ("deep/a", "deep/a2", "deep/er/c", "deeper"):
            place.write(name, b"1")
        place.remove("deep/a")
        assert another.names("deep") == {"a2", "er"}
        assert not another.exists("deep/a")
        place.remove("deep")
        assert not place.exists("deep/er/c")
        assert place.exists("deeper")
        place.remove("deep")

    def test_an_adopted_file_replaces_another(self, place: Place, tmp_path: Path) -> None:
        for text in ("old and longer", "new"):
            with place.scratch() as folder:
                (folder / "made").write_text(text)
                place.adopt(folder / "made", "shards/1.arrow")
            assert not folder.exists()
            assert place.read("shards/1.arrow") == text.encode()
        with contextlib.suppress(KeyError), place.scratch() as folder:
            raise KeyError
        assert not folder.exists()

    def test_an_adopted_folder_replaces_another(self, place: Place, tmp_path: Path) -> None:
        place.write(MANIFEST, b"{}")
        assert not place.folder("tokenizer").exists()
        place.adopt(make_tree(tmp_path / "1", a="1", deep__b="2", old="3"), "tokenizer")
        place.adopt(make_tree(tmp_path / "2", a="4", deep__b="5", new="6"), "tokenizer")
        assert place.exists("tokenizer")
        found = {name: place.read(name).decode() for name in place.sizes("tokenizer")}
        assert found == {"tokenizer/a": "4", "tokenizer/deep/b": "5", "tokenizer/new": "6"}
        assert place.names(".") == {"tokenizer", MANIFEST}
        assert tree(place.folder("tokenizer")) == {"a": "4", "deep/b": "5", "new": "6"}

    @pytest.mark.parametrize("is_folder", [False, True], ids=["file", "folder"])
    def test_a_shard_is_a_local_copy(self, place: Place, tmp_path: Path, is_folder: bool) -> None:
        place.write(MANIFEST, b"{}")
        made = make_tree(tmp_path / "made", **{"c__0": "one", "zarr.json": "two"})
        source = made if is_folder else made / "zarr.json"
        commit, before = commit_of(source), tree(made)
        place.adopt(source, "shards/00000.x")
        found = place.shard(commit, "shards/00000.x")
        assert found.name == "00000.x"
        assert tree(found) == before if is_folder else found.read_text() == "two"
        with place.reading(commit, "shards/00000.x") as is_there:
            assert is_there

    def test_a_shard_that_is_not_what_was_committed_is_named(
        self, place: Place, tmp_path: Path
    ) -> None:
        place.write(MANIFEST, b"{}")
        commit = commit_of(make_tree(tmp_path / "made", **{"c__0": "whole", "zarr.json": "two"}))
        place.adopt(tmp_path / "made", "shards/00000.x")
        for content in (b"other", b"longer than it was", None):
            if content is None:
                place.remove("shards/00000.x/c/0")
            else:
                place.write("shards/00000.x/c/0", content)
            message = refusal(place.shard, commit, "shards/00000.x")
            assert message.startswith(f"{place.path('shards/00000.x/c/0')}: damaged: ")
            assert message.endswith("run coldstill store repair, then teacher-logits again")
        # reading ahead never fails: only a call for the shard itself reports it
        place.prefetch([(commit, "shards/nothing", 1)])
        place.prefetch([])
        message = refusal(place.shard, commit, "shards/nothing")
        assert "shards/nothing/c/0: damaged: missing" in message

    def test_one_writes_alone_or_several_together(self, place: Place, another: Place) -> None:
        alone: list[bool] = []
        entering: list[Callable[[], Any]] = [another.lock, lambda: another.join(alone.append)]
        with place.lock():
            place.write("a", b"1")
            messages = [refusal(enter().__enter__) for enter in entering]
            assert (alone, place.names(CLAIMS)) == ([], set())
        with place.join(alone.append):
            messages.append(refusal(another.lock().__enter__))
            with another.join(alone.append):
                another.write("b", b"2")
        for message in messages:
            assert message.startswith(f"{place}: another process is writing this store")
        with another.join(alone.append):
            pass
        assert alone == [True, False, True]
        for enter in entering:  # an error releases it
            with pytest.raises(KeyError), enter():
                raise KeyError
        with place.lock():
            pass
        assert place.names(".") <= {"a", "b", CLAIMS}
        assert place.names(CLAIMS) == set()

    def test_a_piece_of_work_is_claimed_by_one_process(self, place: Place, another: Place) -> None:
        with place.join(lambda alone: None), another.join(lambda alone: None):
            with place.claim(claim_name(0)) as mine:
                for asking in (another, place):
                    with asking.claim(claim_name(0)) as its:
                        assert not its
                with another.claim(claim_name(1)) as its:
                    assert its
                assert mine
            with another.claim(claim_name(0)) as its:
                assert its
            with pytest.raises(KeyError), place.claim(claim_name(0)):
                raise KeyError
            with another.claim(claim_name(0)) as its:
                assert its
        assert place.names(CLAIMS) == set()

    def test_clearing_deletes_claims_of_dead_processes(self, place: Place) -> None:
        for name in (claim_name(7), STARTING):  # left by a killed process, or copied with the store
            place.write(name, b"")
        with place.lock():
            place.clear()
        assert place.names(CLAIMS) == set()
        with place.join(lambda alone: place.clear()), place.claim(claim_name(7)) as mine:
            place.clear()
            assert mine
            assert claim_name(7).rpartition("/")[2] in place.names(CLAIMS)

    def test_clearing_deletes_leftovers_of_interrupted_writes(
        self, place: Place, interrupted: Callable[[], None]
    ) -> None:
        place.write("shards/00000.json", b"kept")
        interrupted()
        left = {name for name in place.names(".") | place.names("shards") if name[0] == "."}
        assert any(name.startswith(SCRATCH_PREFIX) for name in left)
        with place.lock():
            place.clear()
        assert place.names("shards") == {"00000.json"}
        assert place.names(".") == {"shards"}


class TestLocalPlace(AnyPlace):
    @pytest.fixture
    def place(self, tmp_path: Path) -> Place:
        return place_at(tmp_path / "store")

    @pytest.fixture
    def another(self, tmp_path: Path) -> Place:
        return place_at(str(tmp_path / "store"))

    @pytest.fixture
    def interrupted(self, tmp_path: Path) -> Callable[[], None]:
        def leave() -> None:
            make_tree(tmp_path / "store" / "shards" / f"{SCRATCH_PREFIX}0-x", a="1")
            make_tree(tmp_path / "store" / f"{SCRATCH_PREFIX}1-y", a="1")

        return leave


class RemoteContract(AnyPlace):
    @pytest.fixture
    def distance(self) -> Distance:
        raise NotImplementedError

    @pytest.fixture
    def place(self, distance: Distance) -> Place:
        return distance.place()

    @pytest.fixture
    def another(self, distance: Distance) -> Place:
        return distance.place()

    @pytest.fixture
    def interrupted(
        self, distance: Distance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> Callable[[], None]:
        """Upload one file of each folder, then stop."""
        upload = Objects.upload

        def dying(objects: Any, files: dict[str, Path], before: Any) -> None:
            first = next(iter(files))
            upload(objects, {first: files[first]})
            raise Killed

        def leave() -> None:
            made = make_tree(tmp_path / "made", a="1", b="2")
            with monkeypatch.context() as patch:
                patch.setattr(Objects, "upload", dying)
                for name in ("tokenizer", "shards/00001.zarr"):
                    with contextlib.suppress(Killed):
                        distance.place().adopt(made, name)

        return leave

    def test_a_folder_exists_only_when_it_is_complete(
        self, place: Place, interrupted: Callable[[], None]
    ) -> None:
        interrupted()
        assert place.names("tokenizer") == {"a"}
        assert not place.exists("tokenizer")


class TestMemoryPlace(RemoteContract):
    @pytest.fixture
    def distance(self, memory: Distance) -> Distance:
        return memory


class TestS3Place(RemoteContract):
    @pytest.fixture
    def distance(self, s3: Distance) -> Distance:
        return s3


@pytest.mark.parametrize("kind", ["local", "memory"])
def test_processes_begin_in_turn_and_only_the_first_is_alone(
    tmp_path: Path,
    memory: Distance,
    conditions: None,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    at_once: list[int] = []
    inside, alone_N, all_in = [0], [], threading.Barrier(5)
    monkeypatch.setattr(coldstill.data.places.lease, "_PAUSE", 0.005)

    def begin(alone: bool) -> None:
        inside[0] += 1
        time.sleep(0.02)
        at_once.append(inside[0])
        alone_N.append(alone)
        inside[0] -= 1

    def write() -> None:
        place = place_at(tmp_path / "s") if kind == "local" else memory.place()
        with place.join(begin):
            assert len(place.names(CLAIMS)) >= 1
            all_in.wait(20)

    together(*[write] * 5)
    assert at_once == [1] * 5
    assert alone_N == [True, False, False, False, False]
    place = place_at(tmp_path / "s") if kind == "local" else memory.place()
    assert place.names(CLAIMS) == set()


@pytest.mark.parametrize("in_the_way", ["claims", "claims/starting"])
def test_an_obstacle_to_joining_is_an_error_of_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_the_way: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    place = place_at(tmp_path)
    if in_the_way == "claims":
        place.write(in_the_way, b"mine")
    else:
        (tmp_path / in_the_way).mkdir(parents=True)
    message = refusal(place.join(lambda alone: None).__enter__)
    assert message.startswith(f"{tmp_path}/claims/starting: ")
    assert place.exists(in_the_way)
    with place.lock():  # nothing stays locked
        pass
    other = place_at(tmp_path / "other")
    monkeypatch.setattr(coldstill.data.places.claims, "lock_descriptor", fail)
    for enter in (other.lock, lambda: other.join(lambda alone: None)):
        assert "cannot be locked: No locks available" in refusal(enter().__enter__)


def test_a_place_has_several_names(tmp_path: Path) -> None:
    for name in (str(tmp_path), f"file://{tmp_path}"):
        place = place_at(name)
        assert isinstance(place, LocalPlace)
        assert place.root == tmp_path
    for address in ("s3://bucket/a/b", "memory://a", "gs://bucket/store/"):
        assert str(place_at(address)) == str(place_at(Path(address))) == address.rstrip("/")
    for path in ("c:/store", "runs/s3:/x", "s3", "a:b"):
        assert isinstance(place_at(path), LocalPlace)
