"""Lock files: never two exclusive holders, and no lock that outlives its process."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import threading
from pathlib import Path
from typing import Any

import coldstill.data.places.claims
import pytest
from children import outputs, running, together
from coldstill.data.places.claims import claimed
from refusals import refusal

HOLD = """
import sys, time
from pathlib import Path
from coldstill.data.places.claims import claimed

with claimed(Path(sys.argv[1])) as mine:
    print(mine, flush=True)
    time.sleep(60)
"""

CLAIM_AND_RELEASE = """
import contextlib, os, sys, time
from pathlib import Path
from coldstill.data.places.claims import claimed

folder = Path(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
until = time.time() + 0.7
count = turns = 0
while time.time() < until:
    turns += 1
    name = "ab"[turns % 2]
    with claimed(folder / "claims" / name, wait=turns % 3 == 0) as mine:
        if mine:
            os.close(os.open(folder / name, os.O_CREAT | os.O_EXCL))
            os.unlink(folder / name)
            count += 1
    with contextlib.suppress(OSError):
        (folder / "claims").rmdir()
assert count
"""


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_lock_file_and_the_folders_made_for_it_exist_only_while_it_is_locked(
    tmp_path: Path,
) -> None:
    with claimed(tmp_path / "deep" / "claims" / "a") as mine:
        assert mine
        assert (tmp_path / "deep" / "claims" / "a").is_file()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "claims").mkdir()
    with contextlib.ExitStack() as other:
        with claimed(tmp_path / "claims" / "a"):
            assert other.enter_context(claimed(tmp_path / "claims" / "b"))
        assert list(tmp_path.rglob("*")) == [tmp_path / "claims", tmp_path / "claims" / "b"]
    assert list(tmp_path.rglob("*")) == [tmp_path / "claims"]


def test_a_lock_is_exclusive_within_a_process(tmp_path: Path) -> None:
    seen = []

    def look() -> None:
        with claimed(tmp_path / "a") as mine:
            seen.append(mine)

    with claimed(tmp_path / "a"):
        look()
        together(look)
        assert (tmp_path / "a").exists()  # a refused caller does not delete it
    look()
    assert seen == [False, False, True]


@pytest.mark.parametrize("has_fcntl", [True, False])
def test_shared_locks_exclude_exclusive_ones_and_only_the_last_deletes_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_fcntl: bool
) -> None:
    if not has_fcntl:  # as on other platforms, where a shared lock is an exclusive one
        monkeypatch.setattr(coldstill.data.places.claims, "fcntl", None)
    path = tmp_path / "a"

    def is_free() -> bool:
        with claimed(path) as mine:
            return mine

    with claimed(path, shared=True):
        if has_fcntl:
            with claimed(path, shared=True):
                assert not is_free()
        assert path.exists()
        assert not is_free()
    with claimed(path) as mine:
        assert mine
    assert not path.exists() or not has_fcntl


@pytest.mark.slow
def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    path = tmp_path / "claims" / "a"
    with running(HOLD, path, line="True") as process:
        with claimed(path) as mine:
            assert not mine
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert path.exists()
        with claimed(path) as mine:
            assert mine
    assert not path.exists()
    with running(HOLD, path, line="True") as process:
        threading.Timer(0.1, process.kill).start()
        with claimed(path, wait=True) as mine:
            assert mine


def test_waiting_ends_when_the_holder_releases_the_lock(tmp_path: Path) -> None:
    got = threading.Event()

    def wait() -> None:
        with claimed(tmp_path / "a", wait=True) as mine:
            assert mine
            assert (tmp_path / "a").exists()
            got.set()

    with claimed(tmp_path / "a"):
        threads = [threading.Thread(target=wait) for _ in range(3)]
        for thread in threads:
            thread.start()
        assert not got.wait(0.1)
    for thread in threads:
        thread.join(10)
    assert got.is_set()
    assert not (tmp_path / "a").exists()


@pytest.mark.slow
def test_files_that_come_and_go_are_never_locked_twice(tmp_path: Path) -> None:
    """Holders delete the file, and its folder, while other processes open it."""
    assert outputs(CLAIM_AND_RELEASE, tmp_path, count=4) == [""] * 4
    assert list(tmp_path.iterdir()) == []


def failing(number: int) -> Any:
    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return fail


CLAIMS = coldstill.data.places.claims


@pytest.mark.parametrize(
    ("owner", "name", "number", "message"),
    [
        (os, "open", errno.EACCES, "cannot be written: Permission denied"),
        (os, "open", errno.EROFS, "cannot be written: Read-only file system"),
        (Path, "mkdir", errno.EACCES, "cannot be written: Permission denied"),
        (os, "open", errno.ENOSPC, "the disk is full"),
        (CLAIMS, "lock_descriptor", errno.ENOLCK, "cannot be locked: No locks available; choose a"),
    ],
)
def test_a_file_that_cannot_be_locked_is_an_error_of_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    name: str,
    number: int,
    message: str,
) -> None:
    before = descriptors()
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing(number))
        found = refusal(claimed(tmp_path / "claims" / "a").__enter__)
    assert found.startswith(f"{tmp_path}/claims/a: {message}")
    assert descriptors() == before


def test_an_obstacle_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    for name, message in (
        ("file/a", "file/a: cannot be written: Not a directory"),
        ("folder", "folder: is a folder, expected a file"),
    ):
        assert message in refusal(claimed(tmp_path / name).__enter__)
    assert (tmp_path / "file").read_text() == "mine"


def test_an_error_inside_is_passed_on_and_no_descriptor_stays_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = descriptors()
    with claimed(tmp_path / "a"), claimed(tmp_path / "a") as second:
        assert not second
    with pytest.raises(OSError, match="No space") as caught, claimed(tmp_path / "a"):
        raise OSError(errno.ENOSPC, "No space left on device", "elsewhere")
    assert caught.value.filename == "elsewhere"
    with claimed(tmp_path / "a"), monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", failing(errno.EACCES))
        with claimed(tmp_path / "b"):
            pass
    assert descriptors() == before
    with claimed(tmp_path / "b") as mine:  # a file that could not be deleted is not locked
        assert mine
    assert list(tmp_path.iterdir()) == []


def test_a_child_that_was_forked_meanwhile_keeps_nothing_locked(tmp_path: Path) -> None:
    with claimed(tmp_path / "a"):
        inherited = [os.dup(int(name)) for name in os.listdir("/proc/self/fd") if is_open(name)]
    with claimed(tmp_path / "a") as mine:
        assert mine
    for descriptor in inherited:
        os.close(descriptor)


def is_open(name: str) -> bool:
    """Whether a descriptor is that of the lock file."""
    with contextlib.suppress(OSError):
        return os.readlink(f"/proc/self/fd/{name}").endswith("/a")
    return False
