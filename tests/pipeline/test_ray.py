"""Stage one and sweeps on a local Ray cluster: workers, lost workers and nodes, a lost driver."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from unittest import mock

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
    from distance import Distance

pytest_plugins = ("desk", "distance")
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


def workers(kind: str = "ray::Worker") -> list[psutil.Process]:
    """The processes of this test's clusters that hold a teacher, or another kind of them."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if process.cmdline()[:1] and process.cmdline()[0].startswith(kind):
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
        # one that captures: Ray starts others again, without a word, that are still being made
        busy = workers("ray::Worker.turn")
        if report.stage == "teacher-logits train" and busy and not killed:
            killed.append(busy[0].pid)
            busy[0].kill()

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
            time.sleep(3.0)  # the driver hears of it before the other node has done the rest
        elif len(added) == 2:  # nothing is captured while the other node starts and loads
            until = time.monotonic() + 120
            while time.monotonic() < until and (
                len(workers()) < 2 or workers("ray::Worker.load") or workers("ray::Worker.place")
            ):
                time.sleep(0.2)
            time.sleep(0.5)

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
    done = desk.done(*CAPTURE, "--ray", "--workers", "1")
    assert "complete: " in done.stderr  # no cluster is needed for that


@pytest.mark.slow
def test_points_of_a_sweep_are_trained_side_by_side(
    finished: Desk, nodes: Callable[..., Any]
) -> None:
    address = nodes(2).address
    grid = ("--grid", "students.small.train.seed=1,2", "--grid", "students.small.train.steps=2,3")
    names = [f"small-seed-{seed}-steps-{steps}" for seed in (1, 2) for steps in (2, 3)]
    killed: list[psutil.Process] = []

    def kill_one() -> None:
        while not killed:
            time.sleep(0.05)
            for process in workers("ray::_train")[:1]:
                process.kill()
                killed.append(process)

    killer = threading.Thread(target=kill_one, daemon=True)
    killer.start()
    done = finished.done("sweep", "r.toml", *grid, "--ray", address, "--workers", "2")
    assert killed
    assert [name for name in names if name in done.stdout] == names
    for name in names:
        assert f"train-student {name}: kl " in done.stderr
    together = {name: digests(finished.run / "students" / name / "model") for name in names}
    one = "small-seed-2-steps-3"
    (finished.run / "students" / one).rename(finished.root / one)
    alone = finished.done("sweep", "r.toml", *grid)
    assert alone.stderr.count("already trained: ") == 3
    assert digests(finished.run / "students" / one / "model") == together[one]
    again = finished.done("sweep", "r.toml", *grid, "--ray", "--workers", "2")
    assert again.stderr.count("already trained: ") == 4


@pytest.mark.slow
def test_an_error_of_a_worker_is_the_error_of_the_command(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_ADDRESS", "local")  # a new cluster, and not one of the user
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    done = desk.coldstill(*CAPTURE, "--set", "teacher.attention=none", "--ray", "--workers", "1")
    assert done.exit_code == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: teacher.model: cannot load ")
    assert workers() == []


@pytest.mark.slow
def test_workers_fill_stores_in_a_bucket(
    desk: Desk, whole: dict[str, str], s3: Distance, nodes: Callable[..., Any]
) -> None:
    places = {"logits.path": "logits", "evaluation.path": "heldout"}
    remote = [f"--set={key}={s3.url}/{name}" for key, name in places.items()]
    desk.done(*CAPTURE, *remote, "--ray", nodes(2).address, "--workers", "2")
    found = {
        f"{store}/{name}": digest
        for store in ("logits", "heldout")
        for name, digest in s3.digests(store).items()
        if name != "measurements.json"
    }
    assert found == whole


def test_a_worker_captures_what_it_is_given(
    desk: Desk, whole: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from coldstill.pipeline.steps.capture import capture_base
    from coldstill.pipeline.steps.on_ray.worker import Worker

    with contextlib.chdir(desk.root):
        work = open_work("r.toml", SMALL[1::2], "runs", lambda report: None)
        checked = capture_base(work).checked
        worker = Worker(work, str(desk.root), checked, 1)
        assert worker.load().isolation == "positions"
        committed = worker.turn("train", [5, 2], "").committed
        while len(committed) < 2:
            turn = worker.turn("train", [], "")
            committed += turn.committed
            assert not turn.ended
        assert sorted(committed) == [2, 5]
        while not worker.turn("train", [], "stop").ended:
            pass
        shards = {n: d for n, d in stores(desk).items() if n.startswith("logits/shards/")}
        assert len(shards) == 4
        assert shards.items() <= whole.items()
        assert not (desk.run / "logits" / "measurements.json").exists()

        def fails(*arguments: Any, **options: Any) -> None:
            raise ColdstillError("the disk is full")

        monkeypatch.setattr("coldstill.stages.teacher_logits.capture_split", fails)
        with pytest.raises(ColdstillError, match="the disk is full"):
            worker.turn("heldout", [], "")
        other = dataclasses.replace(checked, context=1)
        with pytest.raises(ColdstillError, match="another teacher on "):
            Worker(work, str(desk.root), other, 1).load()
        with pytest.raises(ColdstillError, match="/nowhere: not on "):
            Worker(work, "/nowhere", checked, 1).load()


class NoRay:
    """Stands for the module `ray` of a cluster on which no worker lives long."""

    def __init__(self, *, places: bool) -> None:
        lost = type("RayError", (Exception,), {})
        task = type("RayTaskError", (lost,), {})
        self.exceptions = mock.Mock(RayError=lost, RayTaskError=task)
        self.places, self.asked, self.killed = places, 0, 0

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 8.0, "GPU": 2.0}

    def remote(self, made: type) -> Any:
        return self

    def options(self, **options: Any) -> Any:
        assert options["num_gpus"] == 1
        return mock.Mock()

    def wait(self, calls: list[Any], timeout: float) -> tuple[list[Any], list[Any]]:
        self.asked += 1
        if self.asked == 50:
            os.kill(os.getpid(), signal.SIGTERM)
        return (calls[:1] if self.places else []), calls

    def get(self, call: Any) -> Any:
        raise self.exceptions.RayError("the node is gone")

    def kill(self, actor: Any) -> None:
        self.killed += 1


@pytest.mark.parametrize("places", [True, False])
def test_a_cluster_without_a_place_for_workers_is_reported(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, places: bool
) -> None:
    from coldstill.pipeline.steps.on_ray import capture as step

    ray = NoRay(places=places)
    monkeypatch.setattr(step, "connected", lambda pool: contextlib.nullcontext(ray))
    monkeypatch.setattr(step, "expect_reachable", lambda pool: None)
    monkeypatch.setattr(step, "_PATIENCE", -1.0)
    done = desk.coldstill(*CAPTURE, "--ray", "--workers", "2")
    lines = done.stderr.splitlines()
    assert ray.killed == 2
    assert not (desk.run / "logits").exists()
    if places:
        assert done.exit_code == 1
        assert lines[-1].startswith(
            "error: --ray: 7 workers lost since the last shard: the node is"
        )
    else:
        assert done.exit_code == 143
        assert (
            "teacher-logits: warning: waiting for the cluster: no place for a worker with 1 CPU, 1 "
            "GPU; add nodes, or ask for less"
        ) in lines


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
    if importlib.util.find_spec("ray") is not None:
        for address, message in (
            ("127.0.0.1:1", "nothing answers there ([Errno 111] Connection refused); start a "),
            ("ray://127.0.0.1:99999", "nothing answers there ("),
            ("nowhere", "expected HOST:PORT, the address of a Ray cluster"),
        ):
            line = desk.refused(*CAPTURE, "--ray", address, "--workers", "2")
            assert line.startswith(f"error: --ray {address}: {message}")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert desk.refused(*CAPTURE, "--ray", "--workers", "2") == (
        "error: --ray: needs the package ray; install it with pip install 'coldstill[ray]'"
    )


def test_a_point_trains_on_one_gpu(finished: Desk) -> None:
    grid = ("--grid", "students.small.train.seed=1,2", "--gpus-per-worker", "2")
    line = finished.refused("sweep", "r.toml", *grid, "--ray", "auto", "--workers", "2")
    assert line.startswith("error: --gpus-per-worker: 2, and a point of a sweep trains on one GPU")


@pytest.mark.slow
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
