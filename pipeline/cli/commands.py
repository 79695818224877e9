"""The commands that work on recipes and runs: parse, call one function, print.

Heavy imports are inside the commands.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from ... import __version__
from ...data.errors import ColdstillError
from .group import Group
from .imports import import_
from .launch import launch
from .options import (
    FOLLOWING,
    Number,
    json_option,
    print_next,
    ray_options,
    recipe_options,
    run_options,
    student_option,
    work_of,
)
from .results import export, inspect, report
from .rounds import rounds
from .store import store


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="coldstill")
def main() -> None:
    """Offline distillation: run a teacher model once, store its logits, train students from them.

    RECIPE is the name of a built-in recipe, a TOML file, or a run's folder.
    """


@main.command()
@click.argument("name")
def init(name: str) -> None:
    """Write a new recipe, NAME.toml.

    Example: coldstill init my-run
    """
    from ..recipe.writing import write_starter

    path = write_starter(Path.cwd(), name)
    click.echo(
        f"wrote {path}; name your texts (corpus.files) and your teacher (teacher.model) in it"
    )
    print_next(click.get_current_context())


@main.command("recipe-help")
@click.argument("key", required=False)
def recipe_help(key: str | None) -> None:
    """Explain the tables and keys of a recipe.

    Without KEY it lists all tables. KEY is a table or a key, such as corpus or train.steps.

    Example: coldstill recipe-help students.small.train
    """
    from ..recipe.reference import explained, overview

    click.echo(overview() if key is None else explained(key))


@main.command()
@recipe_options
@json_option()
@click.option(
    "--pilot",
    "count",
    type=click.IntRange(min=1),
    metavar="N",
    help="Run the teacher on N sequences and measure.",
)
@click.option(
    "--budget",
    type=Number(0, 1e9, min_open=True),
    metavar="BYTES",
    help="Most bytes per position, for the recommendation of --pilot.",
)
@click.option("--write", is_flag=True, help="Write the recommendation of --pilot into the recipe.")
def plan(
    recipe: str,
    settings: Any,
    runs: str,
    report: Any,
    as_json: bool,
    count: int | None,
    budget: float | None,
    write: bool,
) -> None:
    """Show what a recipe will do and need.

    It lists all steps, with sizes, memory and disk space. It loads no weights without --pilot.

    Example: coldstill plan demo --pilot 64 --budget 30
    """
    if count is None:
        for option, given in (("--budget", budget is not None), ("--write", write)):
            if given:
                raise click.UsageError(f"{option} needs the measurements of --pilot N; add that.")
        from ..planning.plan import make_plan
        from ..planning.sizes import expect_room
        from ..planning.text import plan_text

        work = work_of(recipe, settings, runs, report, loads_models=False)
        made = make_plan(work)
        click.echo(json.dumps(made.as_json(), indent=2) if as_json else plan_text(made))
        expect_room(made.stores.values())
        return
    if budget is not None and math.isnan(budget):
        raise click.BadParameter("NaN is not a number of bytes.", param_hint="'--budget'")
    from ..planning.sizes import store_sizes
    from ..planning.text import pilot_text, recommendation_text
    from ..recipe.writing import editable_recipe, write_capture
    from ..steps.pilot import run_pilot

    work = work_of(recipe, settings, runs, report)
    path = editable_recipe(recipe, work.loaded, work.run) if write else None
    from ...stages.interruption import Interruption  # torch, after the refusals

    with Interruption().listening():  # its temporary files are deleted
        measured = run_pilot(work, count)
    own = measured.own_row(work.recipe)
    choice = measured.recommended(work.recipe, budget)
    recommendation = recommendation_text(choice, own, measured, budget)
    if as_json:
        row = None if choice is None else asdict(choice)
        click.echo(json.dumps({**asdict(measured), "recommended": row}, indent=2))
    else:
        length = work.recipe.corpus.sequence_length
        shown = pilot_text(measured, own, store_sizes(work)["train"], length)
        click.echo(f"{shown}\n\n{recommendation}")
    if path is None:
        return
    if choice is None:
        raise ColdstillError(f"--write: {recommendation}; raise --budget")
    changed = write_capture(path, choice.head, choice.tail)
    line = f"head = {choice.head}, tail = {choice.tail}"
    work.note("plan", f"{path}: {line}" if changed else f"{path}: has {line} already")


@main.command("train-teacher")
@recipe_options
def train_teacher(recipe: str, **options: Any) -> None:
    """Train the teacher, or correct an existing one.

    A recipe with a teacher architecture trains a new teacher. A recipe with both 'model' and
    'train' corrects that model: a short fine-tuning on the corpus, measured on held-out documents.

    Example: coldstill train-teacher demo
    """
    from ..steps import interface

    interface.train_teacher(recipe, **options)


@main.command("teacher-logits")
@recipe_options
@click.option(
    "--other-engine",
    is_flag=True,
    help="Continue a store that was begun with another teacher.engine.",
)
@ray_options
def teacher_logits(recipe: str, pool: Any, **options: Any) -> None:
    """Run the teacher over the corpus and store its logits.

    This is stage one. Several processes, or workers of a Ray cluster, can share the work.

    Example: coldstill teacher-logits demo
    """
    if pool is None:
        from ..steps import interface

        interface.teacher_logits(recipe, **options)
    else:
        from ..steps.on_ray.capture import teacher_logits as step

        work = work_of(recipe, options["settings"], options["runs"], options["report"])
        step(work, pool, other_engine=options["other_engine"])


@main.command("prune-student")
@recipe_options
@student_option
@json_option()
def prune_student(recipe: str, as_json: bool, **options: Any) -> None:
    """Cut students out of the teacher, without training them.

    It applies to students with 'prune' and shows their sizes and their loss. train-student trains
    them, and cuts them too if this command was not used.

    Example: coldstill prune-student my-run --student small
    """
    from ..steps import interface
    from ..steps.pruning import cuts_text

    cuts = interface.prune_students(recipe, **options)
    records = {name: [cut.record for cut in each] for name, each in cuts.items()}
    click.echo(json.dumps(records, indent=2) if as_json else cuts_text(cuts))


@main.command("train-student")
@recipe_options
@student_option
def train_student(recipe: str, **options: Any) -> None:
    """Train students from the store, without the teacher.

    This is stage two. It trains all students of the recipe, or those named. A NAME that the recipe
    lacks makes a variant of the one student that --set changes. A student with rounds is trained
    as far as its text is scored.

    Example: coldstill train-student demo --student small
    """
    from ..steps import interface

    models = interface.train_students(recipe, **options)
    if not all(model.exists() for model in models.values()):
        click.get_current_context().meta[FOLLOWING] = "rounds next"


@main.command()
@recipe_options
@student_option
@click.option(
    "--tasks",
    "paths",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="Run this lm-eval task file, or all task files in this folder, instead.",
)
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    metavar="N",
    help="Use only the first N examples of each task.",
)
@click.option("--download", is_flag=True, help="Allow tasks to download missing data.")
@json_option("the results of tasks as JSON")
def evaluate(
    recipe: str,
    students: Any,
    paths: tuple[Path, ...],
    limit: int | None,
    download: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure trained students on held-out documents.

    The teacher is not needed. With --tasks, students run lm-eval task files instead; --student
    teacher adds the teacher if its folder is on this machine.

    Example: coldstill evaluate demo --tasks tasks/
    """
    if not paths:
        given = {"--limit": limit is not None, "--download": download, "--json": as_json}
        for option in (name for name, used in given.items() if used):
            raise click.UsageError(f"{option} needs --tasks PATH.")
        from ..steps import interface

        interface.evaluate(recipe, students=students, **options)
        return
    from ..steps.tasks import evaluate_on_tasks, scores_table

    work = work_of(recipe, options["settings"], options["runs"], options["report"])
    rows = evaluate_on_tasks(work, students, paths, limit=limit, download=download)
    if as_json:
        found = [{"name": name, "tasks": [asdict(r) for r in records]} for name, records in rows]
        click.echo(json.dumps(found, indent=2))
    else:
        click.echo(scores_table(rows))


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
@click.option("--dry-run", is_flag=True, help="Only show the points and their settings.")
@ray_options
@json_option("a JSON list")
def sweep(
    recipe: str,
    settings: Any,
    runs: str,
    report: Any,
    grids: tuple[str, ...],
    dry_run: bool,
    pool: Any,
    as_json: bool,
) -> None:
    """Train a student for each point of a grid and compare them.

    Example: coldstill sweep demo --grid students.small.train.steps=250,500
    """
    from ..quiet import quiet
    from ..recipe.reading import read_source
    from ..recipe.work import Work, run_of
    from ..results.figures import json_rows
    from ..results.model_tables import tables
    from ..steps import sweep as step

    planned = step.plan_sweep(read_source(recipe, settings, runs=Path(runs)), grids)
    work = Work(planned.loaded, run_of(recipe, runs, planned.loaded), report)
    listed = step.listed_points(planned, work)
    if dry_run:
        facts = [point.to_json() for point in listed]
        click.echo(json.dumps(facts, indent=2) if as_json else step.points_text(listed))
        return
    with quiet():
        rows, left_out = step.train_sweep(work, listed, pool)
    if rows:
        click.echo(json.dumps(json_rows(rows), indent=2) if as_json else tables(rows))
    if left_out:
        raise step.left_out_error(left_out, len(listed))


@main.command()
@click.argument("named", metavar="RUN...", nargs=-1, required=True)
@run_options
@json_option("a JSON list")
@click.option(
    "--html",
    "page",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write the page with plots to this file.",
)
def compare(
    named: tuple[str, ...],
    settings: Any,
    runs: str,
    progress: Any,
    as_json: bool,
    page: Path | None,
) -> None:
    """Compare the models of one run or of several.

    It prints a table and writes a page with plots. RUN is a run's folder or name, or a recipe. The
    comparison of a single run is also written into its folder: comparison.json, comparison.md and
    comparison.html, a page for a browser.

    Example: coldstill compare demo
    """
    if settings and len(named) > 1:
        raise click.UsageError("--set changes one recipe; name a single RUN with it.")
    from ..quiet import quiet_imports
    from ..results.figures import json_rows
    from ..results.model_tables import tables
    from ..steps import interface

    quiet_imports()
    rows = interface.compare(*named, page=page, settings=settings, runs=runs, report=progress)
    click.echo(json.dumps(json_rows(rows), indent=2) if as_json else tables(rows))


@main.command()
@recipe_options
def run(recipe: str, **options: Any) -> None:
    """Run all steps of both stages.

    These are teacher, logits, students, evaluation and comparison. Finished steps are kept.

    Example: coldstill run demo
    """
    from ..results.model_tables import tables
    from ..steps import interface

    click.echo(tables(interface.run(recipe, **options)))


main.add_command(export)
main.add_command(import_)
main.add_command(inspect)
main.add_command(launch)
main.add_command(report)
main.add_command(rounds)
main.add_command(store)
