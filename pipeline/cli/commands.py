"""The command line: parse, call one function, print. Heavy imports live inside the commands."""

from __future__ import annotations

import errno
import json
import math
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import click

from ... import __version__
from ...data.errors import ColdstillError, StoppedError
from ...stages.libraries import first_line
from ...stages.ranks import rank, world_size
from .export import export
from .inspect import inspect
from .options import recipe_options, run_options, student_option, work_on
from .options import work_of as _work
from .report import report
from .store import store
from .task_options import TaskOptions, task_options

TRACEBACK = "COLDSTILL_TRACEBACK"
"""Environment variable: where it is set, every error shows its whole traceback."""


class _Group(click.Group):
    """Turns our errors into one line and the promised exit status."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ColdstillError as error:
            if os.environ.get(TRACEBACK):
                raise
            _fail(str(error))
        except OSError as error:
            if error.errno == errno.EPIPE:  # whoever reads our output has seen enough
                raise
            _fail(_system_error(error))
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except StoppedError:
            if rank() == 0:
                started = "" if world_size() == 1 else "torchrun as before, "
                command = shlex.join(["coldstill", *sys.argv[1:]])
                click.echo(f"stopped as asked; resume with {started}{command}", err=True)
            sys.exit(0)
        except KeyboardInterrupt:
            # caught before click sees it, which would add an empty line of its own
            start = "\n" if sys.stderr.isatty() else ""  # after the terminal's ^C
            click.echo(f"{start}interrupted; run the same command again to go on", err=True)
            sys.exit(130)
        except Exception as error:  # a fault of ours, or an unexpected one of a library
            if os.environ.get(TRACEBACK):
                raise
            _fail(_out_of_memory(error) or _fault(error))

    def main(self, *args: Any, **options: Any) -> Any:
        try:
            return super().main(*args, **{**options, "standalone_mode": False})
        except click.ClickException as error:
            error.show()
            sys.exit(error.exit_code)
        except click.Abort:
            sys.exit(130)


def _out_of_memory(error: Exception) -> str | None:
    """A machine that is too small is not a fault; torch has no error of its own for it on a CPU."""
    text = str(error)
    if isinstance(error, MemoryError) or "out of memory" in text or "t allocate memory" in text:
        return (
            f"not enough memory ({first_line(error)}); lower train.micro_batch_tokens or "
            "logits.batch_tokens, or corpus.sequence_length"
        )
    return None


def _fault(error: Exception) -> str:
    """What went wrong where nothing was meant to, as one line."""
    context = click.get_current_context(silent=True)
    words = [] if context is None else [word for word in (context.invoked_subcommand,) if word]
    return (
        f"unexpected {type(error).__name__} in {' '.join(['coldstill', *words])}: "
        f"{first_line(error)}; this is a fault in coldstill, not in what you asked for; run it "
        f"again with {TRACEBACK}=1 to see where, and report that"
    )


def _fail(message: str) -> None:
    click.echo(f"error: {' '.join(message.splitlines())}", err=True)
    sys.exit(1)


def _system_error(error: OSError) -> str:
    """What the system refused, as one line."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"{error.filename or 'disk'}: the disk is full; what was finished is kept, free some "
            "space and run the same command again"
        )
    reason = error.strerror or str(error) or type(error).__name__
    return f"{error.filename}: {reason}" if error.filename else reason


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="coldstill")
def main() -> None:
    """Offline distillation: run the teacher once, train students from what it said.

    RECIPE is the name of a built-in recipe, a TOML file, or a run's folder.
    """


@main.command()
@click.argument("name")
def init(name: str) -> None:
    """Write a recipe to start from, NAME.toml.

    Example: coldstill init my-run
    """
    from ..recipe.starter import write_starter

    click.echo(f"wrote {write_starter(Path.cwd(), name)}; next: coldstill plan {name}")


@main.command()
@recipe_options
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
@click.option(
    "--pilot",
    "count",
    type=click.IntRange(min=1),
    metavar="N",
    help="Run the teacher over N sequences and measure.",
)
@click.option(
    "--budget",
    type=click.FloatRange(0, 1e9, min_open=True),
    metavar="BYTES",
    help="Bytes a position may take, for the pilot's recommendation.",
)
@click.option("--write", is_flag=True, help="Write what the pilot recommends into the recipe.")
def plan(
    recipe: str,
    settings: Any,
    runs: str,
    progress: Any,
    as_json: bool,
    count: int | None,
    budget: float | None,
    write: bool,
) -> None:
    """Tell what a recipe will do, take and need; loads no weights unless --pilot asks to.

    Example: coldstill plan demo --pilot 64 --budget 30
    """
    if count is None:
        for option, given in (("--budget", budget is not None), ("--write", write)):
            if given:
                raise click.UsageError(f"{option} is about what --pilot N measures; give that too.")
        from ..planning.plan import make_plan
        from ..planning.room import expect_room
        from ..planning.text import plan_text

        work = _work(recipe, settings, runs, progress, loads_models=False)
        made = make_plan(work)
        click.echo(json.dumps(made.as_json(), indent=2) if as_json else plan_text(made))
        expect_room(made.stores.values())
        return
    if budget is not None and math.isnan(budget):
        raise click.BadParameter("is no number of bytes.", param_hint="'--budget'")
    from ..steps.pilot import pilot

    work = _work(recipe, settings, runs, progress)
    pilot(work, count, budget, recipe if write else None, as_json=as_json)


@main.command("train-teacher")
@recipe_options
def train_teacher(recipe: str, settings: Any, runs: str, progress: Any) -> None:
    """Train the teacher, where the recipe makes it here; correct one that exists, where the recipe
    has both 'model' and 'train': a short fine-tuning on the corpus, measured on held-out documents.

    Example: coldstill train-teacher demo
    """
    from ..steps.teacher import train_teacher as step

    step(_work(recipe, settings, runs, progress))


@main.command("teacher-logits")
@recipe_options
def teacher_logits(recipe: str, settings: Any, runs: str, progress: Any) -> None:
    """Stage one: run the teacher once over the corpus and store what it believes.

    Example: coldstill teacher-logits demo
    """
    from ..steps.capture import teacher_logits as step

    step(_work(recipe, settings, runs, progress))


@main.command("train-student")
@recipe_options
@student_option
def train_student(
    recipe: str, settings: Any, runs: str, progress: Any, students: tuple[str, ...]
) -> None:
    """Stage two: train students from the store, without the teacher.

    All of the recipe, or those named. A NAME that the recipe lacks makes a variant of the one
    student that --set changes.

    Example: coldstill train-student demo --student small
    """
    from ..steps.students import train_students

    new = next((name for name in students), None) if len(students) == 1 else None
    train_students(_work(recipe, settings, runs, progress, new), students)


@main.command("prune-student")
@recipe_options
@student_option
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
def prune_student(
    recipe: str,
    settings: Any,
    runs: str,
    progress: Any,
    students: tuple[str, ...],
    as_json: bool,
) -> None:
    """Cut students out of the teacher, where the recipe prunes them, and show what is left; they
    are trained by train-student, which else does both.

    Example: coldstill prune-student my-run --student small
    """
    from ..steps.pruning import prune_students, text

    new = students[0] if len(students) == 1 else None
    cuts = prune_students(_work(recipe, settings, runs, progress, new), students)
    click.echo(json.dumps(cuts, indent=2) if as_json else text(cuts))


@main.command()
@recipe_options
@student_option
@task_options
def evaluate(
    recipe: str,
    settings: Any,
    runs: str,
    progress: Any,
    students: tuple[str, ...],
    tasks: TaskOptions | None,
) -> None:
    """Measure trained students on held-out documents, without the teacher.

    With --tasks, in lm-eval on task files instead: all students, those named, or the teacher too
    with --student teacher where its folder is on this machine.

    Example: coldstill evaluate demo --tasks tasks/
    """
    work = _work(recipe, settings, runs, progress)
    if tasks is None:
        from ..steps.evaluation import evaluate as step

        step(work, students)
    else:
        from ..steps.tasks.evaluate import evaluate_on_tasks

        evaluate_on_tasks(work, students, tasks)


@main.command()
@recipe_options
@click.option(
    "--grid",
    "grids",
    multiple=True,
    required=True,
    metavar="KEY=V1,V2",
    help="Values of a student's key; several grids make their product.",
)
@click.option("--dry-run", is_flag=True, help="Only tell the points and their settings.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list.")
def sweep(
    recipe: str,
    settings: Any,
    runs: str,
    progress: Any,
    grids: tuple[str, ...],
    dry_run: bool,
    as_json: bool,
) -> None:
    """Train a student for each point of a grid, measure all and print them side by side.

    Example: coldstill sweep demo --grid students.small.train.steps=250,500
    """
    from ..recipe.reading import read_source
    from ..results.table import tables
    from ..steps.sweep import left_out_error, listed, plan_sweep, told, train_sweep

    planned = plan_sweep(read_source(recipe, settings, runs=Path(runs)), grids)
    work = work_on(planned.loaded, recipe, runs, progress, loads_models=not dry_run)
    if dry_run:
        facts = told(planned, work)
        click.echo(json.dumps(facts, indent=2) if as_json else listed(planned, facts))
        return
    rows, left_out = train_sweep(work, planned)
    if rows:
        click.echo(json.dumps(rows, indent=2) if as_json else tables(rows))
    if left_out:
        raise left_out_error(left_out, len(planned.points))


@main.command()
@click.argument("named", metavar="RUN...", nargs=-1, required=True)
@run_options
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list.")
@click.option(
    "--html",
    "file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write the page with plots here; of one run there is also one beside it.",
)
def compare(
    named: tuple[str, ...],
    settings: Any,
    runs: str,
    progress: Any,
    as_json: bool,
    file: Path | None,
) -> None:
    """Print all models of a run side by side, or of several: a table, and a page with plots.

    RUN is a run's folder or name, or a recipe. Of one run the comparison is also written beside it:
    comparison.json, comparison.md and comparison.html, the page to open in a browser.

    Example: coldstill compare demo
    """
    if settings and len(named) > 1:
        raise click.UsageError("--set is about one recipe; name one RUN with it.")
    from ..results.table import tables
    from ..steps.comparison import compare_runs

    works = [_work(one, settings, runs, progress, loads_models=False) for one in named]
    rows = compare_runs([work.run for work in works], file, works[0].report)
    click.echo(json.dumps(rows, indent=2) if as_json else tables(rows))


@main.command()
@recipe_options
def run(recipe: str, settings: Any, runs: str, progress: Any) -> None:
    """Carry out a whole recipe: teacher, logits, students, evaluation, comparison.

    Example: coldstill run demo
    """
    from ..planning.loadable import expect_packable_students, expect_usable_students
    from ..results.table import tables
    from ..steps import capture, evaluation, students
    from ..steps import teacher as ground
    from ..steps.comparison import compare_runs
    from ..steps.trainable import expect_trainable

    work = _work(recipe, settings, runs, progress)
    expect_trainable(work.recipe, work.recipe.students, teacher=True)  # before any step
    expect_packable_students(work)
    expect_usable_students(work)
    ground.train_teacher(work)
    capture.teacher_logits(work)
    students.train_students(work, ())
    evaluation.evaluate(work, ())
    click.echo(tables(compare_runs([work.run], None, work.report)))


main.add_command(export)
main.add_command(inspect)
main.add_command(report)
main.add_command(store)
