"""Any number of processes, killed at any moment, write the same store as one process."""

from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from capture_child import PROCESSES, Task, finish, start
from coldstill.data.files import SCRATCH_PREFIX
from coldstill.data.schema import Capture
from coldstill.stages.teacher_logits import is_captured
from small_runs import LENGTH, SmallCorpus, capture_store, plan_capture

if TYPE_CHECKING:
    from coldstill.data.store.reader import StoreReader

pytestmark = pytest.mark.slow


CAPTURE = Capture(head=6, tail=5, seed=3)
SIZES: dict[str, Any] = {"shard_tokens": LENGTH * 2, "batch_tokens": LENGTH, "codec": "compact"}


@pytest.fixture(scope="module")
def whole(
    corpus: SmallCorpus, saved_teacher: Path, tmp_path_factory: pytest.TempPathFactory
) -> StoreReader:
    """The store of one process without interruption."""
    folder = tmp_path_factory.mktemp("whole") / "logits"
    return capture_store(corpus, saved_teacher, folder, CAPTURE, **SIZES)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a store, except measurements and what a killed process leaves: empty claims and
    scratch files."""
    files = {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*")) if p.is_file()}
    ignored = ("claims/", "measurements.json")
    return {
        name: path.read_bytes()
        for name, path in files.items()
        if not name.startswith(ignored) and SCRATCH_PREFIX not in name
    }


def task_for(corpus: SmallCorpus, saved_teacher: Path, folder: Path, pause: float = 0.0) -> Task:
    return Task(
        corpus=corpus,
        teacher=saved_teacher,
        folder=folder,
        capture=CAPTURE,
        changes=SIZES,
        pause=pause,
    )


def done(folder: Path) -> set[str]:
    return {path.stem for path in (folder / "shards").glob("0*.json")}


def wait_for(condition: Any, seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_any_number_of_processes_writes_the_same_store(
    world: int, corpus: SmallCorpus, saved_teacher: Path, whole: StoreReader, tmp_path: Path
) -> None:
    assert whole.manifest.shards >= 10
    folder = tmp_path / "logits"
    ready = PROCESSES.Barrier(world)
    task = task_for(corpus, saved_teacher, folder, pause=0.03)
    children = [start(task, rank, world, ready) for rank in range(world)]
    for child in children:
        finish(child)
    assert contents(folder) == contents(Path(str(whole.place)))
    assert not (folder / "claims").exists()


def test_the_shards_of_a_killed_process_are_taken_over(
    corpus: SmallCorpus, saved_teacher: Path, whole: StoreReader, tmp_path: Path
) -> None:
    folder = tmp_path / "logits"
    ready = PROCESSES.Barrier(3)
    task = task_for(corpus, saved_teacher, folder, pause=0.15)
    children = [start(task, rank, 3, ready) for rank in range(3)]
    wait_for(lambda: len(done(folder)) >= 1)
    children[1].kill()
    children[1].join()
    assert children[1].exitcode == -signal.SIGKILL
    for child in (children[0], children[2]):
        finish(child)
    assert len(done(folder)) == whole.manifest.shards  # no shard is left for another run
    finish(start(task))
    assert contents(folder) == contents(Path(str(whole.place)))


def test_no_shard_is_captured_twice(
    corpus: SmallCorpus, saved_teacher: Path, whole: StoreReader, tmp_path: Path
) -> None:
    """A second process captures only shards that the first one has not claimed."""
    folder = tmp_path / "logits"
    first = start(task_for(corpus, saved_teacher, folder, pause=0.2))
    wait_for(lambda: len(done(folder)) >= 1)
    times = {name: (folder / "shards" / f"{name}.json").stat().st_mtime_ns for name in done(folder)}
    finish(start(task_for(corpus, saved_teacher, folder)))
    left = {f"{i:05d}" for i in range(whole.manifest.shards)} - done(folder)
    finish(first)
    assert len(left) <= 4  # claimed by the first: in work, and ahead
    for name, before in times.items():
        assert (folder / "shards" / f"{name}.json").stat().st_mtime_ns == before
    assert contents(folder) == contents(Path(str(whole.place)))


def test_fifty_kills_change_no_byte(
    corpus: SmallCorpus, saved_teacher: Path, whole: StoreReader, tmp_path: Path
) -> None:
    """Killed at random moments of the capture; every restart continues."""
    task = task_for(corpus, saved_teacher, tmp_path / "timed")
    ready = PROCESSES.Barrier(2)
    child = start(task, 0, 1, ready)
    ready.wait(60)
    started = time.monotonic()
    finish(child)
    longest = time.monotonic() - started  # on this machine, with its load
    chance = random.Random(7)
    kills, store = 0, 0
    committed: list[int] = []
    while kills < 50:
        folder = tmp_path / f"logits-{store}"
        before = len(done(folder))
        ready = PROCESSES.Barrier(2)
        child = start(task_for(corpus, saved_teacher, folder), 0, 1, ready)
        ready.wait(60)
        time.sleep(chance.uniform(0.0, longest))
        child.kill()
        child.join()
        kills += child.exitcode == -signal.SIGKILL
        committed.append(len(done(folder)) - before)
        plan = plan_capture(corpus, saved_teacher, folder, CAPTURE, **SIZES)
        if (folder / "manifest.json").exists() and is_captured(plan):
            assert contents(folder) == contents(Path(str(whole.place)))
            store += 1
    assert sum(committed) > 5  # some were killed while capturing
    for number in range(store + 1):
        folder = tmp_path / f"logits-{number}"
        if folder.exists():
            finish(start(task_for(corpus, saved_teacher, folder)))
            assert contents(folder) == contents(Path(str(whole.place)))
            records = [json.loads(p.read_text()) for p in (folder / "shards").glob("*.json")]
            assert sum(r["sequences"] for r in records) == whole.manifest.sequences
