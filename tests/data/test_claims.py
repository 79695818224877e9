"""Files that say that somebody is at it: never two at once, and none in the way of the living."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from coldstill.data.errors import ColdstillError
from coldstill.data.places.claims import claimed, let_go, lock_file

if TYPE_CHECKING:
    from collections.abc import Iterator

HOLD = """
import sys, time
from pathlib import Path
from coldstill.data.places.claims import claimed

with claimed(Path(sys.argv[1])) as mine:
    print(mine, flush=True)
    time.sleep(60)
"""

CLAIM_AND_LET_GO = """
import os, sys, time
from pathlib import Path
from coldstill.data.places.local import LocalPlace

folder = Path(sys.argv[1])
place = LocalPlace(folder)
print("ready", flush=True)
sys.stdin.readline()
until = time.time() + 1.0
count = turns = 0
while time.time() < until:
    turns += 1
    name = "ab"[turns % 2]
    with place._claimed(f"claims/{name}", wait=turns % 3 == 0) as mine:
        if mine:
            os.close(os.open(folder / name, os.O_CREAT | os.O_EXCL))
            os.unlink(folder / name)
            count += 1
print(count)
"""


def child(code: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@contextlib.contextmanager
def another_process_holding(path: Path) -> Iterator[subprocess.Popen[str]]:
    process = child(HOLD, path)
    assert process.stdout is not None
    with process:
        try:
            assert process.stdout.readline() == "True\n"
            yield process
        finally:
            process.kill()


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_the_file_is_there_only_while_it_is_held(tmp_path: Path) -> None:
    with claimed(tmp_path / "deep" / "claims" / "a") as mine:
        assert mine
        assert (tmp_path / "deep" / "claims" / "a").is_file()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_was_there_stays(tmp_path: Path) -> None:
    (tmp_path / "claims").mkdir()
    with claimed(tmp_path / "claims" / "a"):
        pass
    assert list(tmp_path.rglob("*")) == [tmp_path / "claims"]


def test_a_folder_where_others_hold_something_stays(tmp_path: Path) -> None:
    with contextlib.ExitStack() as other:
        with claimed(tmp_path / "claims" / "a"):
            assert other.enter_context(claimed(tmp_path / "claims" / "b"))
        assert list(tmp_path.rglob("*")) == [tmp_path / "claims", tmp_path / "claims" / "b"]


def test_a_claim_is_exclusive_within_a_process(tmp_path: Path) -> None:
    seen = []

    def look() -> None:
        with claimed(tmp_path / "a") as mine:
            seen.append(mine)

    with claimed(tmp_path / "a"):
        look()
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
        assert (tmp_path / "a").exists()  # those who were refused have not taken it away
    look()
    assert seen == [False, False, True]


def test_a_claim_is_exclusive_between_processes_and_ends_with_its_owner(tmp_path: Path) -> None:
    path = tmp_path / "claims" / "a"
    with another_process_holding(path) as process:
        with claimed(path) as mine:
            assert not mine
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert path.exists()  # what it left behind
        with claimed(path) as mine:
            assert mine
    assert not path.exists()


def test_waiting_ends_when_the_owner_lets_go(tmp_path: Path) -> None:
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


def test_waiting_ends_when_the_owner_is_killed(tmp_path: Path) -> None:
    with another_process_holding(tmp_path / "a") as process:
        threading.Timer(0.1, process.kill).start()
        with claimed(tmp_path / "a", wait=True) as mine:
            assert mine


def test_names_that_come_and_go_are_never_held_twice(tmp_path: Path) -> None:
    """Claims delete their file, and its folder, under those who are just opening it."""
    processes = [child(CLAIM_AND_LET_GO, tmp_path) for _ in range(4)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    counts = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * 4
    assert sum(map(int, counts)) > 100
    assert list(tmp_path.iterdir()) == []


def test_an_error_in_the_work_is_told_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space") as caught, claimed(tmp_path / "a"):
        raise OSError(errno.ENOSPC, "No space left on device", "elsewhere")
    assert caught.value.filename == "elsewhere"
    assert list(tmp_path.iterdir()) == []


def failing(number: int) -> Any:
    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize(
    ("owner", "name", "number", "said"),
    [
        (os, "open", errno.EACCES, "cannot be written: Permission denied"),
        (os, "open", errno.EROFS, "cannot be written: Read-only file system"),
        (Path, "mkdir", errno.EACCES, "cannot be written: Permission denied"),
        (os, "open", errno.ENOSPC, "the disk is full"),
        (fcntl, "flock", errno.ENOLCK, "cannot be locked: No locks available; choose a folder on"),
    ],
)
def test_where_nothing_can_be_claimed_is_told_in_a_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    name: str,
    number: int,
    said: str,
) -> None:
    before = descriptors()
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing(number))
        with pytest.raises(ColdstillError) as caught, claimed(tmp_path / "claims" / "a"):
            pass
    assert str(caught.value).startswith(f"{tmp_path}/claims/a: {said}")
    assert "\n" not in str(caught.value)
    assert descriptors() == before


def test_what_stands_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ColdstillError, match=r"file/a: cannot be written: Not a directory"):
        claimed(tmp_path / "file" / "a").__enter__()
    with pytest.raises(ColdstillError, match=r"folder: a folder, where a file should be"):
        claimed(tmp_path / "folder").__enter__()
    assert (tmp_path / "file").read_text() == "mine"


def test_no_descriptor_stays_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = descriptors()
    with claimed(tmp_path / "a"), claimed(tmp_path / "a") as second:
        assert not second
    with pytest.raises(KeyError), claimed(tmp_path / "a"):
        raise KeyError
    with claimed(tmp_path / "a"), monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", failing(errno.EACCES))
        with claimed(tmp_path / "b"):
            pass
    assert descriptors() == before
    with claimed(tmp_path / "b") as mine:  # the file that could not be deleted is nobody's
        assert mine
    assert list(tmp_path.iterdir()) == []


def test_a_child_that_was_forked_meanwhile_keeps_nothing_locked(tmp_path: Path) -> None:
    path = tmp_path / "a"
    descriptor, other = (os.open(path, os.O_RDWR | os.O_CREAT) for _ in range(2))
    exclusive = fcntl.LOCK_EX | fcntl.LOCK_NB
    assert lock_file(descriptor, exclusive, path)
    assert not lock_file(other, exclusive, path)
    inherited = os.dup(descriptor)
    let_go(descriptor)
    assert lock_file(other, exclusive, path)
    os.close(inherited)
    let_go(other)
