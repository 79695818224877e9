"""Writes a task file for SkyPilot, which rents machines of a cloud and replaces lost ones."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ... import __version__
from ...data.errors import ColdstillError
from ...data.packaged import packaged
from ..recipe.reading import run_folder
from .task import expect_one_line, rendered, torchrun, write_script

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .task import Task

MOUNTED = "/coldstill"
"""Where the bucket is mounted, for the checkpoints of students."""
_EXTRAS = {"s3": "coldstill[s3]", "gs": "coldstill gcsfs"}
"""What `pip` installs for each kind of bucket, if nothing is named."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machines:
    """What is rented, and where results go."""

    bucket: str
    """Folder of an existing bucket, such as `s3://bucket/folder`."""
    gpus: str | None = None
    """GPUs of each node, `NAME` or `NAME:COUNT`; None for machines without."""
    spot: bool = True
    """Whether machines are cheaper ones that the cloud can take back at any time."""
    install: str | None = None
    """What `pip install` installs on each machine; this version of coldstill if None."""


def gpus_of_a_node(gpus: str) -> int:
    """The number in `NAME:COUNT`, 1 without; raises ColdstillError for anything else."""
    expect_one_line("--gpus", gpus, r"[A-Za-z][\w.-]*(:[1-9]\d?)?", "NAME:COUNT, such as A100:8")
    return int(gpus.partition(":")[2] or 1)


def write_sky(task: Task, machines: Machines) -> None:
    """Write the task file.

    Raises
        ColdstillError: the bucket is not an address, no GPUs are named for work that needs them, a
            file of the recipe would not be uploaded, or the file exists
    """
    if machines.gpus is None and task.gpus:
        raise ColdstillError("--gpus: missing; name the GPUs of each node, such as A100:8")
    scheme = machines.bucket.partition("://")[0]
    folder = r"[a-z0-9][a-z0-9._-]+(/[\w.=-]+)*/?"
    expect_one_line("--bucket", machines.bucket, rf"(s3|gs)://{folder}", "s3://NAME or gs://NAME")
    if run_folder(task.recipe, Path(task.runs)) is not None:
        raise ColdstillError(
            f"{task.recipe}: a run's folder names the files of this machine; name its recipe file"
        )
    if outside := next(_outside(task), None):
        raise ColdstillError(
            f"{outside}: outside the folder {Path.cwd()}, which is what SkyPilot uploads; change "
            "into a folder that holds it"
        )
    where = f"{machines.bucket.rstrip('/')}/{task.work.recipe.name}"
    recipe = task.work.recipe
    stores = {"logits": recipe.logits.path, "evaluation": recipe.evaluation.path}
    folders = {"logits": "logits", "evaluation": "heldout"}
    for table, path in stores.items():
        if path is None or "://" not in path:
            added = f"{table}.path={where}/{folders[table]}"
            task = replace(task, settings=(*task.settings, added))
    trains = task.step == "train-student"
    if trains:  # a lost machine loses its disk, so checkpoints go to the bucket
        task = replace(task, runs=f"{MOUNTED}/runs")
    text = rendered(
        "sky.yaml",
        task=task,
        machines=machines,
        mounted=MOUNTED if trains else "",
        install=shlex.split(machines.install or _install(scheme)),
        command=task.command(),
        torchrun=torchrun(
            task, '"$SKYPILOT_NODE_RANK"', '"$(echo "$SKYPILOT_NODE_IPS" | head -n 1)"', "20000"
        ),
        quoted=json.dumps,
    )
    write_script(task.file, text)


def _install(scheme: str) -> str:
    first, *others = _EXTRAS[scheme].split()
    return shlex.join([f"{first}=={__version__}", *others])


def _outside(task: Task) -> Iterator[Path]:
    """Files of the recipe that are outside this folder."""
    base, recipe, here = task.work.loaded.base, task.work.recipe, Path.cwd().resolve()
    named = [*recipe.corpus.files]
    if recipe.teacher.model is not None:
        named.append(recipe.teacher.model)
    named += [table.model for table in recipe.students.values() if table.model is not None]
    written = next(
        (p for p in (Path(task.recipe), Path(f"{task.recipe}.toml")) if p.is_file()), None
    )
    paths = [] if written is None else [written.resolve()]
    for name in named:
        if ":" in name or packaged(name, name) is not None:
            continue
        path = base / Path(name).expanduser()
        absolute = Path(name).expanduser().is_absolute() or name.startswith((".", "~"))
        if absolute or path.exists():
            paths.append(path.resolve())
    yield from (path for path in paths if not path.is_relative_to(here))
