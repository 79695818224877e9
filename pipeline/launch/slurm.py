"""Writes a script for Slurm: one job, or an array of jobs."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ...data.errors import ColdstillError
from .task import WARNING_SECONDS, expect_one_line, rendered, torchrun, write_script

if TYPE_CHECKING:
    from .task import Task

CPUS = 4
"""CPUs of each process if none are asked for: the model's, one that reads, two that encode."""
_OWN = (
    "array", "cpus-per-task", "gpus-per-node", "job-name", "nodes", "ntasks-per-node", "open-mode",
    "output", "partition", "requeue", "signal", "time",
)  # fmt: skip
"""Options of `sbatch` that the script sets."""
_DAYS = r"(?P<d>\d+)-(?P<dh>\d+)(?::(?P<dm>\d+)(?::(?P<ds>\d+))?)?"
_HOURS = r"(?:(?P<h>\d+):)?(?P<m>\d+):(?P<s>\d+)|(?P<min>\d+)"
_TIME = rf"{_DAYS}|{_HOURS}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a job asks Slurm for, beside its nodes."""

    cpus: int | None = None
    """CPUs of each node; `CPUS` for each process if None."""
    partition: str | None = None
    time: str | None = None
    """Time limit, as `sbatch` takes it."""
    array: bool = False
    """For the teacher: each node is a job. For students: each student is a job."""
    requeues: int = 20
    """Most times that a job which ran out of time goes back into the queue."""
    more: tuple[str, ...] = ()
    """Further options of `sbatch`, such as `account=NAME`."""


def write_slurm(task: Task, job: Job) -> None:
    """Write the script.

    Raises
        ColdstillError: a value is not what Slurm takes, an option is set twice, or the file exists
    """
    _expect_sound(job)
    students = task.students or tuple(task.work.recipe.students)
    split = job.array and task.step == "train-student"
    if job.array and len(students) < 2 and split:
        raise ColdstillError(f"--array: only one student, {students[0]}; leave the option out")
    if job.array and not split and task.nodes < 2:
        raise ColdstillError("--array: makes a job of each node, and --nodes is 1; ask for more")
    count = len(students) if split else task.nodes
    cpus = job.cpus or CPUS * task.processes
    task = replace(task, nodes=1) if job.array and not split else task
    text = rendered(
        "slurm.sh",
        task=task,
        job=job,
        jobs=count if job.array else 0,
        cpus=cpus,
        threads=max(1, cpus // task.processes),
        students=students if split else (),
        command=task.command(students=() if split else None),
        folder=str(Path.cwd()),
        programs=str(Path(sys.executable).parent),
        torchrun=torchrun(task, '"$SLURM_NODEID"', '"$HEAD"', '"$PORT"'),
    )
    write_script(task.file, text)


def _expect_sound(job: Job) -> None:
    if job.partition is not None:
        expect_one_line("--partition", job.partition, r"[\w.,+-]+", "the name of a partition")
    for option in job.more:
        found = re.fullmatch(r"([a-z][a-z-]*)(=[^\n]+)?", option)
        if found is None:
            raise ColdstillError(f"--sbatch: {option!r}: expected KEY=VALUE, as in account=NAME")
        if found[1] in _OWN:
            raise ColdstillError(f"--sbatch: {option!r}: the script sets {found[1]} itself")
    if job.time is None:
        return
    found = re.fullmatch(_TIME, job.time)
    if found is None:
        raise ColdstillError(
            f"--time: {job.time!r}: expected minutes, HOURS:MINUTES:SECONDS or DAYS-HOURS"
        )
    part = {name: int(value or 0) for name, value in found.groupdict().items()}
    hours = 24 * part["d"] + part["dh"] + part["h"]
    minutes = 60 * hours + part["dm"] + part["m"] + part["min"]
    if 60 * minutes + part["ds"] + part["s"] <= WARNING_SECONDS:
        raise ColdstillError(
            f"--time: {job.time!r}: a job is told to stop {WARNING_SECONDS} seconds before its "
            "end, so it needs more time than that"
        )
