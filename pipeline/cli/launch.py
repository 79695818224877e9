"""The `coldstill launch` commands: each writes a script, and starts nothing."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..launch.task import STEPS, open_task
from .group import CommandList
from .options import recipe_options, student_option

if TYPE_CHECKING:
    from collections.abc import Callable


@click.group(cls=CommandList)
def launch() -> None:
    """Write a script that runs a step on a cluster or in a cloud.

    It starts nothing: read the script, change it, and submit it.
    """


def _task_options(ending: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add the options that all scripts share; the command gets a function that opens its task."""

    def decorated(command: Callable[..., None]) -> Callable[..., None]:
        @recipe_options
        @click.option(
            "--step",
            type=click.Choice(STEPS),
            default=STEPS[0],
            show_default=True,
            help="The command that the script runs.",
        )
        @student_option
        @click.option(
            "--nodes", type=click.IntRange(min=1), default=1, show_default=True, help="Nodes."
        )
        @click.option(
            "--output", type=click.Path(path_type=Path), metavar="FILE", help="Name of the script."
        )
        @functools.wraps(command)
        def wrapped(
            recipe: str,
            settings: Any,
            runs: str,
            report: Any,
            step: str,
            students: Any,
            nodes: int,
            output: Path | None,
            **options: Any,
        ) -> None:
            def opened(gpus: int | None) -> Any:
                task = open_task(
                    step, recipe, settings, runs, report, students, nodes=nodes, gpus=gpus
                )
                return replace(task, file=output or Path(f"{task.name}{ending}"))

            command(opened, **options)

        return wrapped

    return decorated


@launch.command()
@_task_options(".slurm")
@click.option(
    "--gpus",
    type=click.IntRange(min=0),
    help="GPUs of each node, a process for each; 0 for one process on CPUs. 1 if not given, or 0 "
    "if a server is the teacher.",
)
@click.option("--cpus", type=click.IntRange(min=1), help="CPUs of each node; 4 for each process.")
@click.option("--partition", metavar="NAME", help="The partition.")
@click.option("--time", metavar="TIME", help="Time limit, such as 4:00:00 or 1-12.")
@click.option(
    "--array",
    is_flag=True,
    help="Make a job of each node, or with --step train-student of each student.",
)
@click.option(
    "--requeues",
    type=click.IntRange(min=0),
    default=20,
    show_default=True,
    help="Most times that a job which ran out of time is queued again.",
)
@click.option(
    "--sbatch", "more", multiple=True, metavar="KEY=VALUE", help="A further option of sbatch."
)
def slurm(opened: Any, gpus: int | None, **options: Any) -> None:
    """Write a script for Slurm.

    A job gets SIGTERM two minutes before its end, and is queued again until its work is done.

    Example: coldstill launch slurm demo --nodes 2 --gpus 8 --time 4:00:00
    """
    from ..launch.slurm import Job, write_slurm

    job = Job(**options)
    task = opened(gpus)
    write_slurm(task, job)
    click.echo(f"wrote {task.file}; read it, then submit it with sbatch {task.file}")


@launch.command()
@_task_options(".sky.yaml")
@click.option(
    "--gpus",
    metavar="NAME:COUNT",
    help="GPUs of each node: A100:8. Required, unless a server is the teacher.",
)
@click.option("--bucket", required=True, metavar="ADDRESS", help="Where results go: s3://BUCKET.")
@click.option("--spot/--no-spot", default=True, help="Whether the cloud can take machines back.")
@click.option(
    "--install", metavar="PACKAGES", help="What pip installs on a machine; this version if unset."
)
def sky(opened: Any, **options: Any) -> None:
    """Write a task file for SkyPilot, which rents machines of a cloud.

    The stores go to the bucket. So do the checkpoints of students, which a new machine continues.

    Example: coldstill launch sky demo --gpus A100:8 --bucket s3://my-bucket
    """
    from ..launch.sky import Machines, gpus_of_a_node, write_sky

    machines = Machines(**options)
    task = opened(machines.gpus and gpus_of_a_node(machines.gpus))
    write_sky(task, machines)
    click.echo(f"wrote {task.file}; read it, then start it with sky jobs launch {task.file}")
