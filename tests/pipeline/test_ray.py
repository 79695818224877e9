"""Stage one and sweeps on a local Ray cluster: workers, lost workers and nodes, a lost driver."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from coldstill.data.errors import ColdstillError
from coldstill.data.places.place import place_at
from coldstill.data.store.layout import claim_name
from coldstill.pipeline.recipe.work import open_work
from oracles import digests

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from coldstill.stages.report import Report
    from desk import Desk

pytest_plugins = ("desk",)
pytestmark = pytest.mark.timeout(900)

SMALL = ("--set", "logits.shard_tokens=64", "--set", "logits.batch_tokens=64")
CAPTURE = ("teacher-logits", "r.toml", *SMALL)


def stores(desk: Desk) -> dict[str, str]:
    """The files of both stores, without measurements."""
    return {
        f"{store}/{name}": digest
        for store in ("logits", "heldout")
        for name, digest in digests(desk.run / store).items()
        if name != "measurements.json"
    }


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory, texts: Path, teacher_folder: Path
) -> dict[str, str]:
    """The stores that one process makes."""
    from desk import RECIPE, Desk

    desk = Desk(tmp_path_factory.mktemp("whole"))
    desk.write("r.toml", RECIPE.format(texts=texts, teacher=f'model = "{teacher_folder}"'))
    desk.done(*CAPTURE)
    return stores(desk)


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Makes a cluster whose first node has that many CPUs; it is ended after the test."""
    utils = pytest.importorskip("ray.cluster_utils")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # workers inherit it
    with contextlib.ExitStack() as ending:

        def made(cpus: int) -> Any:
            small = {"object_store_memory": 80 * 2**20, "include_dashboard": False}
            cluster = utils.Cluster(
                initialize_head=True, head_node_args={"num_cpus": cpus, **small}
            )
            ending.callback(cluster.shutdown)
            return cluster

        yield made


def workers() -> list[psutil.Process]:
    """The processes of this test's clusters that hold a teacher."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::Worker"):
                found.append(process)
    return found


def expect_tidy(desk: Desk) -> None:
    assert not list(desk.run.rglob("claims"))
    assert not list(desk.run.rglob(".scratch*"))


@pytest.mark.slow
def test_any_number_of_workers_makes_the_store_of_one_process(
    desk: Desk, whole: dict[str, str], nodes: Callable[..., Any]
) -> None:
    address = nodes(3).address
    for count in ("1", "2", "3"):
        named = ("--set", f"name=r{count}")
        done = desk.done(*CAPTURE, *named, "--ray", address, "--workers", count)
        assert len(re.findall("^teacher-logits train: starts", done.stderr, re.MULTILINE)) == 1
        assert len(re.findall("^teacher-logits train: 28 shards", done.stderr, re.MULTILINE)) == 1
        (desk.root / "runs" / f"r{count}").rename(desk.run)
        assert stores(desk) == whole
        assert {"machine", "forward"} <= desk.json("logits", "measurements.json").keys()
        expect_tidy(desk)
        (desk.run).rename(desk.root / f"done{count}")
    assert workers() == []


@dataclass(slots=True)
class Watcher:
    """Calls a function with each report that counts."""

    act: Callable[[Report], None]
    notes: list[str] = field(default_factory=list)
    stages: list[str] = field(default_factory=list)
    done: list[int] = field(default_factory=list)

    def __call__(self, report: Report) -> None:
        if report.note:
            self.notes.append(report.note)
        elif report.done and report.unit == "tokens":
            self.stages.append(report.stage)
            self.done.append(report.done)
            self.act(report)


def capture(desk: Desk, address: str, workers: int, report: Any) -> None:
    """Run stage one in this process with a watcher."""
    from coldstill.pipeline.steps.on_ray.capture import teacher_logits
    from coldstill.pipeline.steps.on_ray.cluster import Pool

    with contextlib.chdir(desk.root):
        work = open_work("r.toml", SMALL[1::2], "runs", report)
        teacher_logits(work, Pool(address=address, workers=workers))


@pytest.mark.slow
def test_the_shards_of_a_killed_worker_go_to_others(
    desk: Desk, whole: dict[str, str], nodes: Callable[..., Any]
) -> None:
    killed: list[int] = []

    def act(report: Report) -> None:
        if report.stage == "teacher-logits train" and not killed:
            victim = workers()[0]
            killed.append(victim.pid)
            victim.kill()

    watcher = Watcher(act)
    capture(desk, nodes(2).address, 2, watcher)
    assert killed
    lost = [note for note in watcher.notes if re.match(r"worker \d on \S+ lost", note)]
    assert len(lost) == 1
    assert stores(desk) == whole
    expect_tidy(desk)
    train = [d for d, s in zip(watcher.done, watcher.stages, strict=True) if s.endswith("train")]
    assert train == sorted(train)
    assert train[-1] == 56 * 32  # as many tokens as there are, and not more


@pytest.mark.slow
def test_the_pool_grows_and_shrinks_with_the_nodes(
    desk: Desk, whole: dict[str, str], nodes: Callable[..., Any]
) -> None:
    cluster = nodes(0)
    added: list[Any] = [cluster.add_node(num_cpus=1)]
    most: list[float] = []

    def act(report: Report) -> None:
        most.append(report.figures["workers"])
        if len(added) == 1:
            added.append(cluster.add_node(num_cpus=1))
        if len(added) == 2 and max(most) == 2:
            added.append(None)
            cluster.remove_node(added[0], allow_graceful=False)
        elif len(added) == 2:
            time.sleep(1.5)  # the other node needs time to start

    watcher = Watcher(act)
    capture(desk, cluster.address, 2, watcher)
    assert max(most) == 2
    assert most[0] == 1
    assert most[-1] == 1
    assert any(" lost" in note for note in watcher.notes)
    assert stores(desk) == whole
    expect_tidy(desk)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_driver_that_ends_is_started_again(
    desk: Desk, whole: dict[str, str], nodes: Callable[..., Any], how: signal.Signals
) -> None:
    on_ray = ("--ray", nodes(2).address, "--workers", "2")
    driver = subprocess.Popen(
        [sys.executable, "-m", "coldstill.pipeline.cli", *CAPTURE, *on_ray],
        cwd=desk.root,
        stderr=subprocess.PIPE,
        text=True,
    )
    first = desk.run / "heldout" / "shards" / "00000.json"
    while not first.exists() and driver.poll() is None:
        time.sleep(0.01)
    driver.send_signal(how)
    written = driver.communicate(timeout=120)[1]
    if how == signal.SIGTERM:
        assert driver.returncode == 143, written
        assert "stopped as asked; resume with coldstill teacher-logits" in written
    before = first.stat().st_mtime_ns
    assert stores(desk) != whole
    desk.done(*CAPTURE, *on_ray)
    assert first.stat().st_mtime_ns == before
    assert stores(desk) == whole
    expect_tidy(desk)


@pytest.mark.slow
def test_a_shard_that_another_command_has_claimed_is_left_to_it(
    desk: Desk, whole: dict[str, str], nodes: Callable[..., Any]
) -> None:
    address = nodes(1).address
    place = place_at(desk.run / "logits")
    with place.claim(claim_name(3)) as mine:
        assert mine
        done = desk.done(*CAPTURE, "--ray", address, "--workers", "1")
        assert "27 of 28 shards in " in done.stderr
        assert not (desk.run / "logits" / "shards" / "00003.json").exists()
    desk.done(*CAPTURE, "--ray", address, "--workers", "1")
    assert stores(desk) == whole
    done = desk.done(*CAPTURE, "--ray", "no-address", "--workers", "1")
    assert "complete: " in done.stderr  # no cluster is needed for that


@pytest.mark.slow
def test_points_of_a_sweep_are_trained_side_by_side(
    finished: Desk, nodes: Callable[..., Any]
) -> None:
    address = nodes(2).address
    grid = ("--grid", "students.small.train.seed=1,2", "--grid", "students.small.train.steps=2,3")
    names = [f"small-seed-{seed}-steps-{steps}" for seed in (1, 2) for steps in (2, 3)]
    done = finished.done("sweep", "r.toml", *grid, "--ray", address, "--workers", "2")
    assert [name for name in names if name in done.stdout] == names
    for name in names:
        assert f"train-student {name}: kl " in done.stderr
    together = {name: digests(finished.run / "students" / name / "model") for name in names}
    one = "small-seed-2-steps-3"
    (finished.run / "students" / one).rename(finished.root / one)
    alone = finished.done("sweep", "r.toml", *grid)
    assert alone.stderr.count("already trained: ") == 3
    assert digests(finished.run / "students" / one / "model") == together[one]
    again = finished.done("sweep", "r.toml", *grid, "--ray", "no-address", "--workers", "2")
    assert again.stderr.count("already trained: ") == 4


def test_an_error_of_a_worker_is_the_error_of_the_command(
    desk: Desk, nodes: Callable[..., Any]
) -> None:
    address = nodes(1).address
    desk.done(*CAPTURE, "--ray", address, "--workers", "1")
    for path in (desk.run / "logits" / "shards").iterdir():
        path.unlink()
    (desk.run / "logits" / "manifest.json").unlink()
    (desk.run / "logits" / "manifest.json").mkdir()
    line = desk.refused(*CAPTURE, "--ray", address, "--workers", "1")
    assert "manifest.json" in line


def test_options_of_ray_need_it_and_one_another(desk: Desk) -> None:
    for options, message in (
        (("--workers", "2"), "--workers needs --ray."),
        (("--gpus-per-worker", "0"), "--gpus-per-worker needs --ray."),
        (("--cpus-per-worker", "2"), "--cpus-per-worker needs --ray."),
        (("--ray", "auto"), "--ray needs --workers N."),
    ):
        for command in (CAPTURE, ("sweep", "r.toml", "--grid", "students.small.train.seed=1,2")):
            result = desk.coldstill(*command, *options)
            assert result.exit_code == 2
            assert message in result.stderr


def test_what_ray_cannot_do_is_refused(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    on_ray = ("--ray", "auto", "--workers", "2")
    line = desk.refused(*CAPTURE, "--set", "teacher.tensor_parallel=true", *on_ray)
    assert line.startswith("error: teacher.tensor_parallel: its processes start together, which ")
    from coldstill.pipeline.steps.on_ray.cluster import Pool, connected

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ColdstillError) as caught, connected(Pool(workers=1)):
        pass
    assert str(caught.value) == (
        "--ray: needs the package ray; install it with pip install 'coldstill[ray]'"
    )


def test_a_point_trains_on_one_gpu(finished: Desk) -> None:
    grid = ("--grid", "students.small.train.seed=1,2", "--gpus-per-worker", "2")
    line = finished.refused("sweep", "r.toml", *grid, "--ray", "auto", "--workers", "2")
    assert line.startswith("error: --gpus-per-worker: 2, and a point of a sweep trains on one GPU")


def test_plain_commands_do_not_import_ray(desk: Desk) -> None:
    code = (
        "import sys\n"
        "from coldstill.pipeline.cli.commands import main\n"
        "for command in ('teacher-logits', 'train-student', 'sweep'):\n"
        "    more = ['--grid', 'students.small.train.seed=1,2'] if command == 'sweep' else []\n"
        "    main([command, 'r.toml', *more])\n"
        "print(sorted({'ray', 'vllm'} & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=desk.root,
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.stdout.splitlines()[-1] == "[]"
