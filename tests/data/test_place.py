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
from coldstill.data.errors import ColdstillError
from coldstill.data.files import SCRATCH_PREFIX
from coldstill.data.places.local import LocalPlace
from coldstill.data.places.objects import Objects
from coldstill.data.places.place import place_at
from coldstill.data.store.commit import Commit, shard_files, total
from coldstill.data.store.layout import CLAIMS, MANIFEST, STARTING, claim_name

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

    def test_written_files_are_read(self, place: Place) -> None:
        place.write("a.json", b"1")
        place.write("deep/er/b.json", b"2")
        place.write("a.json", b"3")
        place.write("empty", b"")
        assert place.read("a.json") == b"3"
        assert place.read("deep/er/b.json") == b"2"
        assert place.read("empty") == b""

    def test_missing_files_are_not_found(self, place: Place) -> None:
        place.write("deep/b.json", b"2")
        for name in ("nothing", "deep/nothing", "nothing/b.json"):
            with pytest.raises(FileNotFoundError):
                place.read(name)
            assert not place.exists(name)

    def test_files_and_folders_exist(self, place: Place) -> None:
        assert not place.exists("deep")
        place.write("deep/b.json", b"2")
        assert place.exists("deep/b.json")
        assert place.exists("deep")
        assert not place.exists("dee")

    def test_names_are_those_directly_inside(self, place: Place) -> None:
        for name in ("a", "deep/b", "deep/er/c", "deeper"):
            place.write(name, b"1")
        assert place.names(".") == {"a", "deep", "deeper"}
        assert place.names("deep") == {"b", "er"}
        assert place.names("nothing") == set()
        assert place.names("a") == set()

    def test_sizes_are_those_of_files_at_any_depth(self, place: Place) -> None:
        for name in ("a", "deep/b", "deep/er/c", "deeper"):
            place.write(name, name.encode())
        assert place.sizes("deep") == {"deep/b": 6, "deep/er/c": 9}
        assert place.sizes("nothing") == {}

    def test_listings_are_never_stale(self, place: Place, another: Place) -> None:
        place.write("deep/a", b"1")
        assert another.names("deep") == {"a"}
        place.write("deep/b", b"1")
        assert another.names("deep") == {"a", "b"}
        assert another.exists("deep/b")
        place.remove("deep/a")
        assert another.names("deep") == {"b"}
        assert not another.exists("deep/a")

    def test_removing_takes_a_file_or_a_folder_and_nothing_else(self, place: Place) -> None:
        for name in ("deep/a", "deep/a2", "deep/er/c", "deeper"):
            place.write(name, b"1")
        place.remove("deep/a")
        assert place.names("deep") == {"a2", "er"}
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

    def test_an_adopted_folder_replaces_another(self, place: Place, tmp_path: Path) -> None:
        place.adopt(make_tree(tmp_path / "1", a="1", deep__b="2", old="3"), "tokenizer")
        place.adopt(make_tree(tmp_path / "2", a="4", deep__b="5", new="6"), "tokenizer")
        assert place.exists("tokenizer")
        found = {name: place.read(name).decode() for name in place.sizes("tokenizer")}
        assert found == {"tokenizer/a": "4", "tokenizer/deep/b": "5", "tokenizer/new": "6"}
        assert place.names(".") == {"tokenizer"}

    def test_scratch_goes_away_even_after_an_error(self, place: Place) -> None:
        with contextlib.suppress(KeyError), place.scratch() as folder:
            (folder / "made").write_text("x")
            raise KeyError
        assert not folder.exists()

    def test_a_folder_is_a_local_one(self, place: Place, tmp_path: Path) -> None:
        place.write(MANIFEST, b"{}")
        assert not place.folder("tokenizer").exists()
        made = make_tree(tmp_path / "1", a="1", deep__b="2")
        place.adopt(made, "tokenizer")
        assert tree(place.folder("tokenizer")) == {"a": "1", "deep/b": "2"}

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

    @pytest.mark.parametrize("change", ["other", "longer than it was", None])
    def test_a_shard_that_is_not_what_was_committed_is_named(
        self, place: Place, tmp_path: Path, change: str | None
    ) -> None:
        place.write(MANIFEST, b"{}")
        commit = commit_of(make_tree(tmp_path / "made", **{"c__0": "whole", "zarr.json": "two"}))
        place.adopt(tmp_path / "made", "shards/00000.x")
        if change is None:
            place.remove("shards/00000.x/c/0")
        else:
            place.write("shards/00000.x/c/0", change.encode())
        with pytest.raises(ColdstillError) as caught:
            place.shard(commit, "shards/00000.x")
        assert str(caught.value).startswith(f"{place.path('shards/00000.x/c/0')}: damaged: ")
        assert "\n" not in str(caught.value)
        assert str(caught.value).endswith("run coldstill store repair, then teacher-logits again")

    def test_reading_ahead_never_disturbs(self, place: Place, tmp_path: Path) -> None:
        place.write(MANIFEST, b"{}")
        commit = commit_of(make_tree(tmp_path / "made", a="1") / "a")
        place.prefetch([(commit, "shards/nothing", 1)])
        place.prefetch([])
        # only a call for the shard itself reports it
        with pytest.raises(ColdstillError, match="shards/nothing: damaged: missing"):
            place.shard(commit, "shards/nothing")
        assert place.read(MANIFEST) == b"{}"

    def test_only_one_writes(self, place: Place, another: Place) -> None:
        with place.lock():
            place.write("a", b"1")
            with pytest.raises(ColdstillError) as caught, another.lock():
                pass
        assert str(caught.value).startswith(f"{place}: another process is writing this store")
        assert "\n" not in str(caught.value)
        with pytest.raises(KeyError), another.lock():
            raise KeyError
        with place.lock():
            pass

    def test_several_write_together(self, place: Place, another: Place) -> None:
        told: list[bool] = []
        with place.join(told.append), another.join(told.append):
            place.write("a", b"1")
            another.write("b", b"2")
        with another.join(told.append):
            pass
        assert told == [True, False, True]
        assert place.names(".") <= {"a", "b", CLAIMS}
        assert place.names(CLAIMS) == set()

    def test_a_lone_writer_is_refused_beside_others(self, place: Place, another: Place) -> None:
        with place.join(lambda alone: None):
            with pytest.raises(ColdstillError) as caught, another.lock():
                pass
            place.write("a", b"1")
        assert str(caught.value).startswith(f"{place}: another process is writing this store")
        assert "\n" not in str(caught.value)
        with another.lock():
            pass

    def test_others_are_refused_beside_a_lone_writer(self, place: Place, another: Place) -> None:
        told: list[bool] = []
        with place.lock():
            with pytest.raises(ColdstillError) as caught, another.join(told.append):
                pass
            place.write("a", b"1")
        assert str(caught.value).startswith(f"{place}: another process is writing this store")
        assert "\n" not in str(caught.value)
        assert (told, place.names(CLAIMS)) == ([], set())
        with another.join(told.append):
            pass
        assert told == [True]

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

    def test_it_can_be_pickled(self, place: Place) -> None:
        place.write("a", b"1")
        copy: Place = pickle.loads(pickle.dumps(place))
        assert copy.read("a") == b"1"
        assert (str(copy), copy.room) == (str(place), place.room)

    def test_names_in_messages_begin_with_the_place(self, place: Place) -> None:
        assert place.path("shards/1") == f"{place}/shards/1"


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


class Killed(BaseException):
    """The process was killed."""


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
    tmp_path: Path, memory: Distance, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    at_once: list[int] = []
    inside, told, all_in = [0], [], threading.Barrier(5)
    one_at_a_time, original = threading.RLock(), Objects._call

    def call(self: Objects, *arguments: Any) -> Any:
        with one_at_a_time:  # requests are atomic in object stores, not in `memory://`
            return original(self, *arguments)

    monkeypatch.setattr(Objects, "_call", call)
    monkeypatch.setattr(coldstill.data.places.lease, "_PAUSE", 0.005)

    def begin(alone: bool) -> None:
        inside[0] += 1
        time.sleep(0.02)
        at_once.append(inside[0])
        told.append(alone)
        inside[0] -= 1

    def write() -> None:
        place = place_at(tmp_path / "s") if kind == "local" else memory.place()
        with place.join(begin):
            assert len(place.names(CLAIMS)) >= 1
            all_in.wait(20)

    threads = [threading.Thread(target=write) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert at_once == [1] * 5
    assert told == [True, False, False, False, False]
    place = place_at(tmp_path / "s") if kind == "local" else memory.place()
    assert place.names(CLAIMS) == set()


@pytest.mark.parametrize("in_the_way", ["claims", "claims/starting"])
def test_an_obstacle_to_joining_is_an_error_of_one_line(tmp_path: Path, in_the_way: str) -> None:
    place = place_at(tmp_path)
    if in_the_way == "claims":
        place.write(in_the_way, b"mine")
    else:
        (tmp_path / in_the_way).mkdir(parents=True)
    with pytest.raises(ColdstillError) as caught, place.join(lambda alone: None):
        pass
    assert str(caught.value).startswith(f"{tmp_path}/claims/starting: ")
    assert "\n" not in str(caught.value)
    assert place.exists(in_the_way)
    with place.lock():  # nothing stays locked
        pass


def test_a_disk_without_locks_is_not_another_writer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    place = place_at(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(coldstill.data.places.claims, "lock_descriptor", fail)
        for enter in (place.lock, lambda: place.join(lambda alone: None)):
            with pytest.raises(ColdstillError, match="cannot be locked: No locks available"):
                enter().__enter__()


@pytest.mark.parametrize("form", ["{}", "file://{}"])
def test_a_folder_has_several_names(tmp_path: Path, form: str) -> None:
    place = place_at(form.format(tmp_path))
    assert isinstance(place, LocalPlace)
    assert place.root == tmp_path


@pytest.mark.parametrize("address", ["s3://bucket/a/b", "memory://a", "gs://bucket/store/"])
def test_an_address_may_be_given_as_a_path(address: str) -> None:
    wanted = address.rstrip("/")
    assert str(place_at(address)) == wanted
    assert str(place_at(Path(address))) == wanted


def test_a_drive_and_an_odd_name_are_folders() -> None:
    for path in ("c:/store", "runs/s3:/x", "s3", "a:b"):
        assert isinstance(place_at(path), LocalPlace)
