"""Scripts for Slurm and SkyPilot: what they ask for, and what their commands do on two nodes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from cluster import Cluster
from coldstill.pipeline.launch import sky
from oracles import digests

if TYPE_CHECKING:
    from desk import Desk
    from distance import Distance

pytest_plugins = ("desk", "distance")
pytestmark = pytest.mark.timeout(900)  # a process takes seconds to load torch, and there are many

SLURM = ("launch", "slurm", "r.toml")
SKY = ("launch", "sky", "r.toml", "--gpus", "A100:8", "--bucket", "s3://bucket/folder")
SMALL = ("--set", "logits.shard_tokens=64", "--set", "logits.batch_tokens=64")
ON_CPUS = ("--gpus", "0", "--cpus", "1", "--nodes", "2", *SMALL)


def asked(desk: Desk, *arguments: str) -> tuple[dict[str, str], str]:
    """The options of `sbatch` in a script, and the script."""
    desk.done(*SLURM, "--output", "script", *arguments)
    path = desk.root / "script"
    text = path.read_text(encoding="utf-8")
    path.unlink()
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    lines = re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", text, re.MULTILINE)
    assert len(lines) == len(dict(lines))
    return dict(lines), text


def test_a_script_asks_slurm_for_what_was_asked(desk: Desk) -> None:
    size = ("--nodes", "3", "--gpus", "8", "--partition", "gpu", "--time", "4:00:00")
    found, text = asked(desk, *size, "--sbatch", "account=us", "--sbatch", "exclusive")
    assert found == {
        "job-name": "r-teacher-logits", "nodes": "3", "ntasks-per-node": "1",
        "cpus-per-task": "32", "gpus-per-node": "8", "partition": "gpu", "time": "4:00:00",
        "account": "us", "exclusive": "", "output": "r-teacher-logits-%j.log",
        "open-mode": "append", "signal": "TERM@120", "requeue": "",
    }  # fmt: skip
    assert "--nnodes=3 " in text
    assert "--nproc-per-node=8 " in text
    assert "command=(coldstill teacher-logits r.toml)" in text
    found, text = asked(desk, "--nodes", "3", "--array", "--set", "corpus.files=['a b']")
    assert (found["nodes"], found["array"]) == ("1", "0-2")
    assert found["output"].endswith("-%A_%a.log")
    assert "torchrun --standalone " in text
    assert """--set 'corpus.files=['"'"'a b'"'"']')""" in text
    found, text = asked(desk, "--step", "train-student", "--array", "--nodes", "2")
    assert (found["nodes"], found["array"]) == ("2", "0-1")
    assert "students=(small baseline)" in text
    found, _ = asked(desk, "--gpus", "0")
    assert "gpus-per-node" not in found
    assert found["cpus-per-task"] == "4"


def test_a_script_is_named_after_the_run_and_never_replaced(packed: Desk) -> None:
    for arguments, name in ((SLURM, "r-teacher-logits.slurm"), (SKY, "r-teacher-logits.sky.yaml")):
        assert f"wrote {name}; read it" in packed.done(*arguments).stdout
        line = packed.refused(*arguments)
        assert line == (
            f"error: {name}: exists already; move it away, or give --output another name"
        )
    assert not packed.run.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*SLURM, "--time", "soon"), "--time: 'soon': expected minutes, HOURS:MINUTES:SECONDS or"),
        ((*SLURM, "--time", "2"), "--time: '2': a job is told to stop 120 seconds before its end"),
        ((*SLURM, "--time", "0-0:1:59"), "--time: '0-0:1:59': a job is told to stop 120 seconds"),
        ((*SLURM, "--partition", "a\nb"), r"--partition: 'a\nb': expected the name of a partition"),
        ((*SLURM, "--sbatch", "time=3"), "--sbatch: 'time=3': the script sets time itself"),
        ((*SLURM, "--sbatch", "--time"), "--sbatch: '--time': expected KEY=VALUE, as in account"),
        ((*SLURM, "--array"), "--array: makes a job of each node, and --nodes is 1; ask for more"),
        ((*SLURM, "--student", "small"), "--student: teacher-logits has no students; add --step"),
        (
            (*SLURM, "--array", "--step", "train-student", "--student", "small"),
            "--array: only one student, small; leave the option out",
        ),
        ((*SKY, "--bucket", "bucket"), "--bucket: 'bucket': expected s3://NAME or gs://NAME"),
        ((*SKY, "--gpus", "8"), "--gpus: '8': expected NAME:COUNT, such as A100:8"),
        (
            (*SKY, "--step", "train-student", "--student", "no"),
            "r: no student 'no' (have: small, baseline)",
        ),
    ],
)
def test_what_a_script_cannot_say_is_refused(
    desk: Desk, arguments: tuple[str, ...], message: str
) -> None:
    assert desk.refused(*arguments).startswith(f"error: {message}")


def test_limits_of_time_are_those_of_slurm(desk: Desk) -> None:
    for time in ("3", "2:01", "1:00:00", "1-0", "0-1:0", "1-00:00:01"):
        assert asked(desk, "--time", time)[0]["time"] == time


def test_what_one_process_must_do_first_is_said(desk: Desk) -> None:
    cut = "prune = { feed_forward = 32 }"
    desk.edit("architecture = { layers = 1, hidden = 32, heads = 2 }", cut)
    few = ("--step", "train-student", "--student", "small")
    said = desk.done(*SLURM, *few, "--gpus", "2").stderr
    assert said == (
        "launch: warning: students are cut in one process; first run coldstill prune-student "
        "r.toml --student small\n"
    )
    assert desk.done(*SLURM, *few, "--gpus", "0", "--output", "one").stderr == ""
    desk.edit("[logits]", "train = { steps = 1, batch_tokens = 256 }\n[logits]")
    said = desk.done(*SLURM, "--runs", "a b").stderr
    assert said == (
        "launch: warning: the teacher is not trained yet; first run coldstill train-teacher r.toml "
        "--runs 'a b'\n"
    )


def test_a_server_is_the_teacher_without_gpus(packed: Desk) -> None:
    packed.edit("[logits]", 'engine = "server"\nurl = "http://server:8000"\n[logits]')
    packed.edit("tail = 4", "tail = 0")
    packed.edit("tail = 8", "tail = 0")
    found, _ = asked(packed)
    assert "gpus-per-node" not in found
    found, _ = asked(packed, "--step", "train-student")
    assert found["gpus-per-node"] == "1"
    said = packed.done(*SLURM, "--gpus", "2", "--output", "two").stderr
    assert said == "launch: warning: a server is the teacher, so the GPUs would be idle\n"
    sky = [word for word in SKY if word not in {"--gpus", "A100:8"}]
    assert packed.done(*sky).stderr == ""
    assert "accelerators" not in (packed.root / "r-teacher-logits.sky.yaml").read_text()
    assert packed.refused(*sky, "--step", "train-student") == (
        "error: --gpus: missing; name the GPUs of each node, such as A100:8"
    )


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory, texts: Path, teacher_folder: Path
) -> dict[str, str]:
    """The files of both stores that one process makes, without measurements."""
    from desk import RECIPE, Desk

    desk = Desk(tmp_path_factory.mktemp("whole"))
    desk.write("r.toml", RECIPE.format(texts=texts, teacher=f'model = "{teacher_folder}"'))
    desk.done("teacher-logits", "r.toml", *SMALL)
    return stores(desk)


def stores(desk: Desk) -> dict[str, str]:
    return {
        f"{store}/{name}": digest
        for store in ("logits", "heldout")
        for name, digest in digests(desk.run / store).items()
        if name != "measurements.json"
    }


@pytest.mark.slow
def test_a_job_that_runs_out_of_time_is_continued_by_the_next(
    desk: Desk, whole: dict[str, str]
) -> None:
    desk.done(*SLURM, *ON_CPUS, "--output", "job", "--requeues", "1")
    cluster = Cluster(desk.root)
    job = cluster.start("job", SLURM_RESTART_COUNT="1")
    written = cluster.stopped(job, desk.run / "corpus")
    assert job.returncode == 143, written
    assert cluster.queue == []  # it was queued again as often as was asked
    job = cluster.start("job")
    written = cluster.stopped(job, desk.run / "heldout" / "manifest.json")
    assert job.returncode == 143, written
    assert "stopped as asked; resume with " in written
    assert cluster.queue == [str(cluster.first)]
    assert stores(desk) != whole
    job = cluster.start("job", SLURM_RESTART_COUNT="1")
    written = job.communicate(timeout=240)[0]
    assert job.returncode == 0, written
    progress = [line for line in written.split("\n") if line.startswith("teacher-logits")]
    assert not any("\r" in line for line in progress)
    assert re.search(r"^teacher-logits train: starts( at [\d,]+ of|, 0 of) ", written, re.MULTILINE)
    assert stores(desk) == whole


@pytest.mark.slow
def test_jobs_of_an_array_share_a_store_and_then_train_a_student_each(
    desk: Desk, whole: dict[str, str]
) -> None:
    desk.done(*SLURM, *ON_CPUS, "--array", "--output", "job")
    cluster = Cluster(desk.root)
    jobs = [cluster.start("job", i, SLURM_ARRAY_TASK_ID=str(i)) for i in range(2)]
    for job in jobs:
        written = job.communicate(timeout=240)[0]
        assert job.returncode == 0, written
    assert stores(desk) == whole
    one_each = ("--step", "train-student", "--array", "--output", "students")
    desk.done(*SLURM, *ON_CPUS, "--nodes", "1", *one_each)
    for i, name in enumerate(("small", "baseline")):
        job = cluster.start("students", SLURM_ARRAY_TASK_ID=str(i))
        written = job.communicate(timeout=240)[0]
        assert job.returncode == 0, written
        assert (desk.run / "students" / name / "model").is_dir()
        assert len(list((desk.run / "students").iterdir())) == i + 1


@pytest.mark.slow
def test_a_job_that_fails_says_so(desk: Desk) -> None:
    desk.done(*SLURM, *ON_CPUS, "--output", "job")
    desk.edit("sequence_length = 32", "sequence_length = 100000")
    cluster = Cluster(desk.root)
    job = cluster.start("job")
    written = job.communicate(timeout=240)[0]
    assert job.returncode == 1, written
    assert "error: corpus.sequence_length: 100000 is more than the teacher's context" in written
    assert cluster.queue == []


def written_task(desk: Desk, *arguments: str) -> Any:
    desk.done(*SKY, "--output", "task", *arguments)
    path = desk.root / "task"
    task = yaml.safe_load(path.read_text(encoding="utf-8"))
    path.unlink()
    return task


@pytest.fixture
def packed(desk: Desk) -> Desk:
    """A desk that holds every file of its recipe, as a folder that is uploaded must."""
    text = (desk.root / "r.toml").read_text(encoding="utf-8")
    for key in ('files = ["', 'model = "'):
        found = re.search(rf'{re.escape(key)}([^"]+)"', text)
        assert found is not None
        name = key.split()[0]
        subprocess.run(["cp", "-r", found[1], desk.root / name], check=True)
        desk.edit(found[0], f'{key}{name}"')
    return desk


def test_a_task_of_skypilot_rents_spot_machines_and_keeps_results_in_a_bucket(packed: Desk) -> None:
    task = written_task(packed, "--nodes", "2")
    assert task.pop("setup") == "pip install 'coldstill[s3]==0.2.0'\n"
    run = task.pop("run")
    assert task == {
        "name": "r-teacher-logits",
        "workdir": ".",
        "num_nodes": 2,
        "resources": {"accelerators": "A100:8", "use_spot": True},
    }
    assert "--nproc-per-node=8 " in run
    assert "--set logits.path=s3://bucket/folder/r/logits" in run
    assert "--set evaluation.path=s3://bucket/folder/r/heldout" in run
    task = written_task(packed, "--step", "train-student", "--no-spot", "--install", "-e '.[s3]'")
    assert task["setup"] == "pip install -e '.[s3]'\n"
    assert task["resources"] == {"accelerators": "A100:8"}
    assert task["file_mounts"] == {
        "/coldstill": {"source": "s3://bucket/folder", "mode": "MOUNT_CACHED"}
    }
    assert task["run"].rstrip().endswith("--runs /coldstill/runs")
    task = written_task(packed, "--set", "logits.path=gs://other/logits")
    assert task["run"].count("logits.path=") == 1  # the recipe has an address of its own


def test_files_that_would_not_be_uploaded_are_refused(desk: Desk, packed: Desk) -> None:
    line = packed.refused(*SKY, "--set", "corpus.files=['/etc/hosts']")
    assert line == (
        f"error: /etc/hosts: outside the folder {packed.root}, which is what SkyPilot uploads; "
        "change into a folder that holds it"
    )
    packed.edit('model = "model"', 'model = "../model"')
    assert "/model: outside the folder " in packed.refused(*SKY)
    packed.edit('model = "../model"', 'model = "model"')
    packed.done("teacher-logits", "r.toml")
    line = packed.refused("launch", "sky", "runs/r", *SKY[3:])
    assert line.startswith("error: runs/r: a run's folder names the files of this machine; ")


@pytest.mark.slow
def test_machines_of_a_cloud_share_a_store_in_a_bucket(
    packed: Desk, whole: dict[str, str], s3: Distance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sky, "MOUNTED", str(packed.root / "mounted"))
    few = ("--gpus", "A100", "--nodes", "2", "--bucket", s3.url, *SMALL)
    task = written_task(packed, *few)
    nodes = {"SKYPILOT_NODE_IPS": "127.0.0.1\n127.0.0.1"}
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for step, setting in (("teacher-logits", ()), ("train-student", ("--student", "small"))):
        task = written_task(packed, *few, "--step", step, *setting)
        machines = [
            subprocess.Popen(
                ["bash", "-c", task["run"]],
                cwd=packed.root,
                env=os.environ
                | nodes
                | {"SKYPILOT_NODE_RANK": str(i), "OMP_NUM_THREADS": "1"}
                | {"PYTHONPATH": os.pathsep.join(sys.path), "PATH": programs},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for i in range(2)
        ]
        for machine in machines:
            written = machine.communicate(timeout=240)[0]
            assert machine.returncode == 0, written
    found = {
        f"{store}/{name}": digest
        for store in ("logits", "heldout")
        for name, digest in s3.digests(f"r/{store}").items()
        if name != "measurements.json"
    }
    assert found == whole
    assert (packed.root / "mounted/runs/r/students/small/model").is_dir()
    assert not (packed.run / "logits").exists()
