"""What a script runs: one command of coldstill, on every node, under `torchrun`."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...data.errors import ColdstillError
from ...data.files import whole_file
from ..recipe.work import open_work
from ..steps.students import first_training

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ...stages.report import Reporter
    from ..recipe.work import Work

STEPS = ("teacher-logits", "train-student")
"""The commands that work in several processes, on any number of nodes."""
WARNING_SECONDS = 120
"""Seconds before the end of a job at which its processes get SIGTERM."""
_SHUTDOWN_SECONDS = 100
"""Seconds until `torchrun` kills processes that got SIGTERM: a little before the job is killed."""
_TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One step of a recipe in many processes."""

    step: str
    """One of `STEPS`."""
    recipe: str
    """The recipe, as it was given on the command line."""
    work: Work
    students: tuple[str, ...] = ()
    """The students to train, all of the recipe if empty; only for `train-student`."""
    settings: tuple[str, ...] = ()
    runs: str = "runs"
    nodes: int = 1
    gpus: int = 1
    """GPUs of each node, with a process for each; 0 for one process without."""
    file: Path = field(default=Path())
    """The script."""

    @property
    def processes(self) -> int:
        """Processes of each node."""
        return max(1, self.gpus)

    @property
    def name(self) -> str:
        """A name for the job: `my-run-teacher-logits`."""
        return f"{self.work.run.root.name}-{self.step}"

    def command(self, *more: str, students: Sequence[str] | None = None) -> list[str]:
        """The command of one process; `more` follows its other options."""
        words = ["coldstill", self.step, self.recipe]
        for setting in self.settings:
            words += ["--set", setting]
        for student in self.students if students is None else students:
            words += ["--student", student]
        if self.runs != "runs":
            words += ["--runs", self.runs]
        return [*words, *more]


def open_task(
    step: str,
    recipe: str,
    settings: tuple[str, ...],
    runs: str,
    report: Reporter,
    students: tuple[str, ...],
    nodes: int,
    gpus: int | None,
) -> Task:
    """Read the recipe, and report what has to be done before the script is started.

    gpus  GPUs of each node; None for one, or for none where a server is the teacher

    Raises
        ColdstillError: the recipe cannot be read, lacks a student, or has none to train
    """
    variant = students[0] if len(students) == 1 else None
    work = open_work(recipe, settings, runs, report, variant)
    if students and step != "train-student":
        raise ColdstillError(f"--student: {step} has no students; add --step train-student")
    chosen = students or tuple(work.recipe.students) if step == "train-student" else ()
    if step == "train-student" and not chosen:
        raise ColdstillError(f"{work.recipe.name}: the recipe has no students")
    tables = {name: work.recipe.student(name) for name in chosen}
    given = f" --runs {shlex.quote(runs)}" if runs != "runs" else ""
    untrained = work.recipe.teacher.is_trained_here and not work.run.teacher_model.exists()
    if untrained and step == "teacher-logits":
        first = f"coldstill train-teacher {shlex.quote(recipe)}{given}"
        work.note("launch", f"the teacher is not trained yet; first run {first}", warning=True)
    cut = [
        name
        for name, table in tables.items()
        if table.prune and not first_training(work.run.student(name), table).is_begun(1)
    ]
    served = step == "teacher-logits" and work.recipe.teacher.url is not None
    if served and gpus:
        work.note("launch", "a server is the teacher, so the GPUs would be idle", warning=True)
    gpus = (0 if served else 1) if gpus is None else gpus
    if cut and nodes * max(1, gpus) > 1:
        named = " ".join(f"--student {name}" for name in cut)
        first = f"coldstill prune-student {shlex.quote(recipe)} {named}{given}"
        work.note("launch", f"students are cut in one process; first run {first}", warning=True)
    return Task(
        step=step,
        recipe=recipe,
        work=work,
        students=students,
        settings=settings,
        runs=runs,
        nodes=nodes,
        gpus=gpus,
    )


def torchrun(task: Task, rank: str, address: str, port: str) -> str:
    """The start of a `torchrun` command, as shell text; rank, address and port are shell words.

    The rendezvous is static: a node whose processes have ended does not end those of the others,
    which is what happens to `c10d` when the node that holds its store leaves.
    """
    if task.nodes == 1:
        where = "--standalone"
    else:
        where = (
            f"--nnodes={task.nodes} --node-rank={rank} --master-addr={address} --master-port={port}"
        )
    return (
        f"torchrun {where} --nproc-per-node={task.processes} "
        f"--shutdown-timeout={_SHUTDOWN_SECONDS} --no-python"
    )


def rendered(template: str, **values: Any) -> str:
    """The text of a template in `templates/`.

    Raises
        jinja2.UndefinedError: the template uses a value that was not given
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    jinja = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    jinja.filters |= {"shell": shlex.quote, "words": shlex.join}
    return jinja.get_template(template).render(warning=WARNING_SECONDS, **values)


def write_script(path: Path, text: str) -> None:
    """Write a script; an existing file is never replaced.

    Raises
        ColdstillError: the file exists, or the folder cannot be written
    """
    if path.exists():
        raise ColdstillError(f"{path}: exists already; move it away, or give --output another name")
    with whole_file(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


def expect_one_line(option: str, value: str, pattern: str, expected: str) -> None:
    """Refuse a value that would become something else in a script."""
    if not re.fullmatch(pattern, value):
        raise ColdstillError(f"{option}: {value!r}: expected {expected}")
