"""When a teacher helps: students of a real teacher by objective, start, length and text.

The teacher is SmolLM2-135M-Instruct and the texts are those on the command line (by default the
sources of Python's library). A student starts from random weights, from every fourth layer of the
teacher, or from the teacher pruned to half its parameters. It trains on text that is new in every
step, or on a small part of it, repeated. Each start and objective first gets its own best learning
rate on fresh text. Every length is a training of its own, with its own schedule.

`cross_entropy` has no teacher. `kl` is the divergence from the teacher alone, `0.9` and `0.5` are
mixtures with that weight of `kl`, `to kl` goes linearly from cross-entropy to `kl`, `to text` the
other way, and `T = 2` is `kl` at temperature 2.

`--corrected` first fits the teacher to the texts with adapters, and measures new students only.

Results are kept, so an interrupted benchmark continues. `--minutes` stops before the next training
once that time is over. `--only` and `--objective` measure some parts of the table, and
`--rate` takes a learning rate as the best one, without a search.
"""

from __future__ import annotations

import statistics
import sys
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import click
import numpy as np
from coldstill.data.store.reader import StoreReader, open_store
from coldstill.pipeline.pages.plots.chart import Axis, Chart, Level, Series
from coldstill.pipeline.pages.plots.drawing import standalone
from coldstill.stages.config import ArchitectureConfig, LayersConfig, TrainConfig
from coldstill.stages.objective_config import ObjectiveConfig, WeightConfig
from coldstill.stages.students.job import StudentJob
from coldstill.stages.students.pruning.config import PruneConfig
from measure import OUTPUT, write_rows
from real_teacher import captured_run, teacher_weights
from trials import trained

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

BATCH = {"random": 1024, "layers": 512, "pruned": 512}
"""Tokens of a step."""
SEQUENCE = 256
RATES = {"random": (2e-3, 4e-3), "layers": (4e-4, 1e-3), "pruned": (1e-3,)}
"""Learning rates that are tried. For new students 1e-3 and 8e-3 were worse with every objective."""
SEARCH = 100
"""Steps of the search for a learning rate, whose trainings the first table has too."""
SEEDS = (0, 1)
REPEATED = 64
"""Sequences of the text that is repeated: 16 steps of a new student see all of it."""
OBJECTIVES = {
    "cross_entropy": ObjectiveConfig(kl=0.0, cross_entropy=1.0),
    "kl": ObjectiveConfig(),
    "0.5": ObjectiveConfig(kl=0.5, cross_entropy=0.5),
    "0.9": ObjectiveConfig(kl=0.9, cross_entropy=0.1),
    "to kl": ObjectiveConfig(
        kl=WeightConfig(weight=1.0, schedule="linear"),
        cross_entropy=WeightConfig(weight=0.0, schedule="linear", start=1.0),
    ),
    "to text": ObjectiveConfig(
        kl=WeightConfig(weight=0.0, schedule="linear", start=1.0),
        cross_entropy=WeightConfig(weight=1.0, schedule="linear"),
    ),
    "T = 2": ObjectiveConfig(temperature=2.0),
}
MIXTURES = ("cross_entropy", "kl", "0.5", "0.9")
Part = tuple[str, str, int, tuple[str, ...]]
"""Start, text, steps and objectives."""
PARTS: tuple[Part, ...] = (
    ("random", "fresh", 100, tuple(OBJECTIVES)[:-1]),
    ("random", "fresh", 200, MIXTURES),
    ("pruned", "fresh", 100, MIXTURES[:3]),
    ("layers", "fresh", 100, MIXTURES[:3]),
    ("random", "repeated", 200, MIXTURES),
    ("random", "fresh", 100, ("T = 2",)),
    ("pruned", "fresh", 200, MIXTURES[:3]),
    ("layers", "fresh", 200, MIXTURES[:3]),
    ("random", "fresh", 300, MIXTURES[:3]),
)
"""The parts of the table, in the order of measurement."""
CORRECTED: tuple[Part, ...] = (("random", "fresh", 100, MIXTURES[:3]),)
"""The parts with a teacher that was fitted to the texts."""
FIGURES = ("loss", "kl", "acceptance")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One training."""

    start: str
    objective: str
    rate: float
    steps: int
    repeated: bool
    seed: int

    @property
    def name(self) -> str:
        kind = "repeated" if self.repeated else "fresh"
        words = (self.start, self.objective, kind, self.steps, self.rate, self.seed)
        return "-".join("".join(c for c in str(word) if c.isalnum() or c in "._") for word in words)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Means over the seeds of one objective, start, text and length, at its best rate."""

    start: str
    text: str
    objective: str
    steps: int
    rate: float
    loss: float
    kl: float
    acceptance: float
    spread: float
    """Largest loss of a seed less the smallest."""


class Bench:
    """The stores, and the trainings that were made from them."""

    def __init__(
        self, texts: list[str], seconds: float, rates: dict[str, float], *, corrected: bool
    ) -> None:
        name, teacher = ("objectives-corrected", FIT) if corrected else ("objectives", "")
        run = captured_run(name, texts, RECIPE, teacher)
        self._rates = rates
        self._folder = OUTPUT / f"{name}-trials"
        self.fresh, self._heldout = open_store(run / "logits"), open_store(run / "heldout")
        self._repeated = _First(self.fresh, REPEATED)
        self._end = time.monotonic() + seconds

    def figures(self, case: Case) -> dict[str, float]:
        """The held-out figures of a case. It is trained unless its result is already on disk."""
        folder = self._folder / case.name
        if not (folder / "result.json").exists() and time.monotonic() > self._end:
            raise TimeoutError
        store = self._repeated if case.repeated else self.fresh
        found = trained(_job(case, folder), store, self._heldout)
        print(f"{case.name}: " + ", ".join(f"{n} {found[n]:.4f}" for n in FIGURES), flush=True)
        return found

    def best_rate(self, start: str, objective: str) -> float:
        """The learning rate of the lowest held-out loss after `SEARCH` steps on fresh text."""
        if objective in self._rates:
            return self._rates[objective]
        case = Case(
            start=start, objective=objective, rate=0.0, steps=SEARCH, repeated=False, seed=0
        )

        def loss(rate: float) -> float:
            """The mean over all seeds: that of one may be low by chance."""
            cases = [replace(case, rate=rate, seed=seed) for seed in SEEDS]
            return statistics.fmean(self.figures(each)["loss"] for each in cases)

        return min(RATES[start], key=loss)


class _First(StoreReader):
    """The first sequences of a store."""

    def __init__(self, store: StoreReader, count: int) -> None:
        vars(self).update(vars(store))
        self._count = count

    def __len__(self) -> int:
        return self._count

    def windows(self, seed: int, epoch: int, seen: int = 0) -> Iterator[NDArray[np.int64]]:
        yield np.random.default_rng([seed, epoch]).permutation(self._count)[seen:]


FIT = """\
train = { steps = 24, batch_tokens = 1024, learning_rate = 5e-4, warmup = 0.1 }
lora = { rank = 16 }
"""
RECIPE = f"""\
[corpus]
sequence_length = {SEQUENCE}
holdout = 0.08
[logits]
temperatures = [2.0]
sequences = 1200
shard_tokens = 16384
[evaluation]
sequences = 64
"""


def _job(case: Case, folder: Any) -> StudentJob:
    origin: dict[str, Any] = {"architecture": None, "model": None, "teacher": teacher_weights()}
    if case.start == "random":
        origin["architecture"] = ArchitectureConfig(layers=2, hidden=128, heads=4)
    elif case.start == "layers":
        origin["layers"] = LayersConfig(every=4)
    else:
        origin["prune"] = (PruneConfig(parameters="50%", sequences=32),)
    config = TrainConfig(
        steps=case.steps,
        batch_tokens=BATCH[case.start],
        learning_rate=case.rate,
        warmup=0.1,
        log_every=10,
    )
    return StudentJob(
        name=case.name, objective=OBJECTIVES[case.objective], config=config, seed=case.seed,
        folder=folder, **origin,
    )  # fmt: skip


def _rows(bench: Bench, parts: list[Part]) -> list[Row]:
    """All rows; ends early when the time is over."""
    rows: list[Row] = []
    try:
        for start, text, steps, objectives in parts:
            if text == "fresh" and steps * BATCH[start] > len(bench.fresh) * SEQUENCE:
                print(f"{start}, {steps} steps: the texts are too few to be fresh")
                continue
            rows.extend(_row(bench, start, objective, steps, text) for objective in objectives)
    except TimeoutError:
        print("the time is over; the same command continues", file=sys.stderr)
    return rows


def _row(bench: Bench, start: str, objective: str, steps: int, text: str) -> Row:
    rate = bench.best_rate(start, objective)
    repeated = text == "repeated"
    case = Case(start=start, objective=objective, rate=rate, steps=steps, repeated=repeated, seed=0)
    found = [bench.figures(replace(case, seed=seed)) for seed in SEEDS]
    means = {name: statistics.fmean(one[name] for one in found) for name in FIGURES}
    losses = [one["loss"] for one in found]
    return Row(
        start=start,
        text=text,
        objective=objective,
        steps=steps,
        rate=rate,
        spread=max(losses) - min(losses),
        **means,
    )


def table(rows: list[Row]) -> str:
    """A Markdown table."""
    lines = [
        "| start | text | steps | objective | rate | loss | KL | acceptance |",
        "|---|---|---:|---|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {row.start} | {row.text} | {row.steps} | {row.objective} | {row.rate:g} | "
        f"{row.loss:.3f} | {row.kl:.3f} | {row.acceptance:.1%} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def figure(rows: list[Row], start: str) -> str:
    """An SVG: held-out loss of each objective less that of cross-entropy, against tokens seen."""
    own = [row for row in rows if row.start == start and row.text == "fresh"]
    alone = {row.steps: row.loss for row in own if row.objective == "cross_entropy"}
    # the name of a line stands beside its end, for which there is room at the longest length only
    longest = {row.objective for row in own if row.steps == max(alone)}
    series = [
        Series(
            name=objective,
            points=tuple(
                (row.steps * BATCH[start], row.loss - alone[row.steps])
                for row in own
                if row.objective == objective and row.steps in alone
            ),
            look=number,
            line=True,
        )
        for number, objective in enumerate(OBJECTIVES)
        if objective in longest - {"cross_entropy"}
    ]
    return standalone(
        Chart(
            label=f"Held-out loss less that of cross-entropy, students from {start}",
            x=Axis("tokens seen", scale="auto", form="short"),
            y=Axis("loss less that of cross-entropy, nats"),
            series=tuple(each for each in series if each.points),
            levels=(Level("cross_entropy", 0.0),),
        )
    )


@click.command(help=__doc__)
@click.argument("texts", nargs=-1)
@click.option("--minutes", default=24 * 60.0, help="Start no training after this many minutes.")
@click.option("--corrected", is_flag=True, help="Fit the teacher to the texts first.")
@click.option("--only", multiple=True, metavar="START,TEXT,STEPS", help="Such parts alone.")
@click.option("--objective", "objectives", multiple=True, type=click.Choice(tuple(OBJECTIVES)))
@click.option("--rate", "rates", multiple=True, type=(str, float), metavar="OBJECTIVE RATE")
def main(
    texts: tuple[str, ...],
    minutes: float,
    only: tuple[str, ...],
    objectives: tuple[str, ...],
    rates: tuple[tuple[str, float], ...],
    *,
    corrected: bool,
) -> None:
    """Measure what is missing, and print the table."""
    if unknown := {name for name, _ in rates} - set(OBJECTIVES):
        raise click.UsageError(f"--rate: {min(unknown)}: none of {', '.join(OBJECTIVES)}")
    all_parts = CORRECTED if corrected else PARTS
    named = {f"{start},{text},{steps}" for start, text, steps, _ in all_parts}
    if unknown := set(only) - named:
        raise click.UsageError(f"--only: {min(unknown)}: none of {'; '.join(sorted(named))}")
    bench = Bench(list(texts), 60 * minutes, dict(rates), corrected=corrected)
    parts = [
        (*part[:3], tuple(each for each in part[3] if not objectives or each in objectives))
        for part in all_parts
        if not only or f"{part[0]},{part[1]},{part[2]}" in only
    ]
    rows = _rows(bench, parts)
    name = "objectives-corrected" if corrected else "objectives"
    write_rows(name, rows)
    (OUTPUT / f"{name}.md").write_text(table(rows))
    for start in {row.start for row in rows}:
        (OUTPUT / f"{name}-{start}.svg").write_text(figure(rows, start))
    print(table(rows), end="")


if __name__ == "__main__":
    main()
