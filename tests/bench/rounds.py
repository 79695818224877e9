"""What a round on a student's own text is worth, against as many steps on old text.

For each seed there are three students: one goes on with old text only (`share = 0`), one mixes its
own text in, and one does that with the Jensen-Shannon divergence. Their first trainings are equal.
KL and acceptance are measured on what each student itself writes, after the first training and
after the second. Figures are means over the seeds. Results are kept for each student, so an
interrupted benchmark continues; more seeds add students.

By default the teacher and the texts are those of the demo. `--teacher` takes the folder of another
model, with the texts on the command line.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import coldstill
from coldstill.data.store.reader import open_store
from coldstill.pipeline.quiet import quiet_libraries
from coldstill.pipeline.recipe.reading import BUILT_IN
from coldstill.pipeline.recipe.work import open_work
from coldstill.pipeline.steps.own_text import scored_texts
from coldstill.pipeline.steps.rounds import finish_rounds
from coldstill.stages.evaluate import evaluate_own_text
from coldstill.stages.models.device import describe_machine
from coldstill.stages.models.loading import load_model
from measure import OUTPUT, write_rows
from trials import kept, quality_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from coldstill.pipeline.recipe.work import Work
    from coldstill.stages.report import Report

WAYS = {
    "old text": ("on old text", "kl", "share = 0.0"),
    "own text, kl": ("half own text", "kl", "share = 0.5"),
    "own text, jsd": ("half own text", "jsd", "share = 0.5, objective = { kl = 0.0, jsd = 1.0 }"),
}
"""What the second training reads, its objective, and the settings of `rounds`, by name."""
MEANS = ("own_kl", "own_acceptance", "heldout_kl")
OTHER = """\
name = "NAME"
[corpus]
files = TEXTS
sequence_length = 256
holdout = 0.1
[teacher]
model = "MODEL"
[logits]
head = 16
tail = 16
sequences = 160
[evaluation]
sequences = 64
"""
"""The recipe for another teacher; what is stored is as in the demo."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One way to train, with means over the seeds."""

    trained: str
    objective: str
    own_kl: float
    """KL on what the student itself writes, in nats."""
    seeds: tuple[float, ...]
    """`own_kl` of each seed."""
    own_acceptance: float
    heldout_kl: float
    positions: float
    """Positions of what it wrote."""
    machine: str


def recipe(asked: dict[str, Any], name: str) -> str:
    """The demo, or another teacher, with the students to compare."""
    if asked["teacher"] is None:
        text = (BUILT_IN / "demo.toml").read_text(encoding="utf-8").partition("[students.small]")[0]
        text = text.replace('name = "demo"', f'name = "{name}"')
    else:
        files = [str(Path(each).resolve()) for each in asked["texts"]]
        text = OTHER.replace("TEXTS", str(files)).replace("NAME", name)
        text = text.replace("MODEL", str(Path(asked["teacher"]).resolve()))
    sizes = f"{{ layers = {asked['layers']}, hidden = {asked['hidden']}, heads = 4 }}"
    train = "batch_tokens = 1024, learning_rate = 2e-3, warmup = 0.1"
    for seed in range(asked["seeds"]):
        for way, (_, _, settings) in WAYS.items():
            rounds = f"count = 2, prompts = {asked['prompts']}, heldout = {asked['heldout']}"
            rounds += f", max_new_tokens = {asked['tokens']}, steps = {asked['later']}, {settings}"
            text += f"[students.{name_of(way, seed)}]\narchitecture = {sizes}\n"
            text += f"train = {{ seed = {seed}, {train}, steps = {asked['steps']} }}\n"
            text += f"rounds = {{ {rounds} }}\n"
    return text


def name_of(way: str, seed: int) -> str:
    """The name of a student."""
    return f"{way.replace(', ', '-').replace(' ', '-')}-{seed}"


def measured(work: Work, name: str) -> dict[str, dict[str, float]]:
    """Figures of both models of a student, by round, on their own text and on the held-out store.

    The run refuses a student of other settings, so its figures need no settings of their own.
    """
    heldout = open_store(work.run.heldout)

    def measure() -> dict[str, Any]:
        found = {}
        for number, (model, own) in scored_texts(work.run.student(name)).items():
            figures = evaluate_own_text(name, model, open_store(own))
            loaded = load_model(str(model), name, precision="fp32")
            found[str(number)] = {
                "positions": figures.positions,
                "own_kl": figures.kl,
                "own_acceptance": figures.acceptance,
                "heldout_kl": quality_of(loaded, heldout, name)["kl"],
            }
        return found

    return kept(work.run.student(name).root / "bench.json", {}, measure)


def rows_of(found: Mapping[str, Sequence[dict[str, dict[str, float]]]]) -> list[Row]:
    """What each way ends with, after the first training of all of them."""

    def row(way: str, number: str, trained: str, objective: str) -> Row:
        each = [figures[number] for figures in found[way]]
        return Row(
            trained=trained,
            objective=objective,
            seeds=tuple(one["own_kl"] for one in each),
            machine=describe_machine(),
            **{key: statistics.fmean(one[key] for one in each) for key in (*MEANS, "positions")},
        )

    later = [
        row(way, "2", f"once more, {text}", objective) for way, (text, objective, _) in WAYS.items()
    ]
    return [row("old text", "1", "once", "kl"), *later]


def table(rows: list[Row]) -> str:
    """The Markdown table of `tests/README.md`."""
    lines = [
        "| trained | objective | own-text KL | each seed | own-text acceptance | held-out KL |",
        "|---|---|---:|---|---:|---:|",
    ]
    lines += [
        f"| {row.trained} | `{row.objective}` | {row.own_kl:.3f} | "
        f"{', '.join(f'{one:.3f}' for one in row.seeds)} | {row.own_acceptance:.1%} | "
        f"{row.heldout_kl:.3f} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def show(report: Report) -> None:
    """Print remarks of the steps."""
    if report.note:
        print(f"{report.stage}: {report.note}", flush=True)


@click.command(help=__doc__)
@click.argument("texts", nargs=-1)
@click.option("--teacher", metavar="FOLDER", help="Another teacher than the demo's.")
@click.option("--name", default="rounds", help="Name of the run.")
@click.option("--seeds", default=3, help="Number of seeds.")
@click.option("--layers", default=2, help="Layers of the students.")
@click.option("--hidden", default=128, help="Width of the students.")
@click.option("--steps", default=450, help="Steps of the first training.")
@click.option("--later", default=225, help="Steps of the second training.")
@click.option("--prompts", default=640, help="Training documents whose prompts are answered.")
@click.option("--heldout", default=64, help="Held-out documents whose prompts are answered.")
@click.option("--tokens", default=128, help="Most tokens of an answer.")
def main(name: str, **asked: Any) -> None:
    """Train, write, score and measure every student without a result and print the table."""
    if bool(asked["texts"]) != (asked["teacher"] is not None):
        raise click.UsageError("texts and --teacher need each other")
    quiet_libraries()
    OUTPUT.mkdir(parents=True, exist_ok=True)
    path = OUTPUT / f"{name}.toml"
    path.write_text(recipe(asked, name), encoding="utf-8")
    coldstill.teacher_logits(path, runs=OUTPUT, report=show)
    work = open_work(path, (), OUTPUT, show)
    finish_rounds(work)
    names = {way: [name_of(way, seed) for seed in range(asked["seeds"])] for way in WAYS}
    found = {way: [measured(work, one) for one in ones] for way, ones in names.items()}
    rows = rows_of(found)
    write_rows(name, rows)
    (OUTPUT / f"{name}.md").write_text(table(rows))
    print(table(rows), end="")


if __name__ == "__main__":
    main()
