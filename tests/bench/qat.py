"""What few bits cost a student: rounded after its training, and rounded while it is trained.

The run is that of a recipe, by default the demo's, whose teacher is trained and captured first. The
student is one of the recipe that starts from an `architecture` or a `model`. A model is not trained
without rounding: it is compared as it is, so that a recipe may name the teacher itself.

Every student has the same steps and order. `exact` is trained without rounding; `afterwards` is the
same student with its weights rounded as an export rounds them. `while distilling` is trained with
`quantize`, from its first step on or after a share of the steps. Loss and KL are those of the
rounded weights on held-out documents. `of the loss` is the share of what rounding afterwards loses
that rounding while distilling still loses. Rows are means over seeds of the student's weights and
of the order. Results are kept, so an interrupted benchmark continues.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import click
from coldstill.data.files import write_json
from coldstill.data.store.reader import open_store
from coldstill.pipeline.recipe.work import open_work
from coldstill.stages.config import QuantizeConfig
from coldstill.stages.evaluate import measure_quality
from coldstill.stages.models.device import describe_machine
from coldstill.stages.models.isolation import student_isolation
from coldstill.stages.models.loading import load_model
from coldstill.stages.models.output_head import connect_head
from coldstill.stages.report import silent
from coldstill.stages.students.few_bits import round_layers
from coldstill.stages.students.job import StudentJob
from coldstill.stages.train_student import train_student
from measure import OUTPUT, write_rows
from trials import trained

if TYPE_CHECKING:
    from pathlib import Path

    from coldstill.pipeline.recipe.tables import StudentTable

EXACT, AFTERWARDS, WHILE = "exact", "afterwards", "while distilling"
CASES = (
    QuantizeConfig(scheme="int8"),
    QuantizeConfig(scheme="int8-row"),
    QuantizeConfig(scheme="int4"),
    QuantizeConfig(scheme="int4", start=0.5),
    QuantizeConfig(scheme="int4", start=0.8),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One way to train and round, with means over the seeds."""

    scheme: str
    way: str
    start: float
    bytes: int
    """Size of the weights in the scheme's export, with its scales."""
    loss: float
    spread: float
    """Standard deviation of the loss over the seeds."""
    kl: float
    of_the_loss: float | None
    """Loss above the exact student's, as a share of that of rounding afterwards."""
    machine: str


def measured(model: Any, heldout: Any, where: str) -> dict[str, Any]:
    """Held-out figures of a model."""
    head = connect_head(model, heldout.manifest.tokenizer.size)
    sums, _ = measure_quality(head, student_isolation(model, heldout, where), heldout)
    return sums.means()


def size(record: dict[str, Any]) -> int:
    """Bytes of rounded weights with their scales (fp16 for blocks of 32), the rest in fp32."""
    bits: float = sum(
        each["parameters"] * (each["bits"] + (0 if each["block"] is None else 16 / each["block"]))
        for each in record["grids"]
    )
    exact: int = record["exact"]["parameters"]
    return round(bits / 8 + 4 * exact)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    run: Path
    student: StudentTable
    model: str | None
    """The model that the student starts from, if it is not new."""
    cases: tuple[QuantizeConfig, ...]
    seeds: tuple[int, ...]

    def rows(self) -> list[Row]:
        """A row for the exact student, and two for each scheme."""
        found = [self._of(seed) for seed in self.seeds]
        exact = statistics.fmean(one[EXACT]["loss"] for one in found)
        rows = []
        for case in found[0]:
            losses = [one[case]["loss"] for one in found]
            scheme, _, rest = case.partition(" ")
            way, _, start = rest.partition("/")
            lost = None
            if way == WHILE:
                after = statistics.fmean(one[f"{scheme} {AFTERWARDS}"]["loss"] for one in found)
                lost = (statistics.fmean(losses) - exact) / (after - exact)
            rows.append(
                Row(
                    scheme=scheme,
                    way=way,
                    start=float(start or 0),
                    bytes=found[0][case]["bytes"],
                    loss=statistics.fmean(losses),
                    spread=statistics.stdev(losses) if len(losses) > 1 else 0.0,
                    kl=statistics.fmean(one[case]["kl"] for one in found),
                    of_the_loss=lost,
                    machine=describe_machine(),
                )
            )
        return rows

    def _of(self, seed: int) -> dict[str, dict[str, Any]]:
        """Figures of every case, by scheme, way and start."""
        store, heldout = open_store(self.run / "logits"), open_store(self.run / "heldout")
        folder = self.run / "qat"
        job = StudentJob(
            name=EXACT,
            architecture=self.student.architecture,
            model=self.model,
            objective=self.student.objective,
            config=self.student.train,
            seed=seed,
            folder=folder / f"{EXACT}-{seed}",
        )
        found = self._exact(job, store, heldout)
        for case in self.cases:
            name = f"{case.scheme}/{case.start}".replace("/", "-")
            own = replace(job, name=name, quantize=case, folder=folder / f"{name}-{seed}")
            figures = trained(own, store, heldout)
            key = f"{case.scheme} {WHILE}/{case.start}"
            found[key] = {**figures, "bytes": found[f"{case.scheme} {AFTERWARDS}"]["bytes"]}
            print(f"{key}, seed {seed}: loss {figures['loss']:.4f}", flush=True)
        return found

    def _exact(self, job: StudentJob, store: Any, heldout: Any) -> dict[str, dict[str, Any]]:
        """The student without rounding, and rounded afterwards by each scheme."""
        record = job.folder / "result.json"
        if not record.exists():
            shutil.rmtree(job.folder, ignore_errors=True)
            job.folder.mkdir(parents=True)
            if job.model is None:
                train_student(job, store)
            start = job.model or str(job.model_folder)
            found: dict[str, dict[str, Any]] = {}
            for case in (None, *dict.fromkeys(replace(case, start=0.0) for case in self.cases)):
                model = load_model(start, EXACT, precision="fp32")
                name, size_of = EXACT, 4 * model.num_parameters()
                if case is not None:
                    name = f"{case.scheme} {AFTERWARDS}"
                    size_of = size(round_layers(model, case, 1, EXACT).finish())
                found[name] = {**measured(model, heldout, EXACT), "bytes": size_of}
                print(f"{name}, seed {job.seed}: loss {found[name]['loss']:.4f}", flush=True)
            write_json(record, found)
        figures: dict[str, dict[str, Any]] = json.loads(record.read_text())
        return figures


def table(rows: list[Row]) -> str:
    """The Markdown table of `tests/README.md`."""
    lines = [
        "| scheme | rounded | size | loss | KL | of the loss |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        way = f"{row.way}, after {row.start:.0%} of the steps" if row.start else row.way
        lost = "" if row.of_the_loss is None else f"{row.of_the_loss:.0%}"
        lines.append(
            f"| {row.scheme} | {way} | {row.bytes / 1e6:.2f} MB | {row.loss:.4f} ± "
            f"{row.spread:.4f} | {row.kl:.4f} | {lost} |"
        )
    return "\n".join(lines) + "\n"


@click.command(help=__doc__)
@click.argument("recipe", default="demo")
@click.option("--student", default=None, help="A student of the recipe; by default its first.")
@click.option("--scheme", multiple=True, help="Only these schemes.")
@click.option("--seeds", default=3, help="Number of seeds.")
def main(recipe: str, student: str | None, scheme: tuple[str, ...], seeds: int) -> None:
    """Measure every case without a result and print the table."""
    command = [sys.executable, "-m", "coldstill.pipeline.cli", "teacher-logits", recipe]
    subprocess.run([*command, "--runs", str(OUTPUT)], check=True)
    work = open_work(recipe, (), OUTPUT, silent)
    chosen = work.recipe.student(student or next(iter(work.recipe.students)))
    if chosen.architecture is None and chosen.model is None:
        raise click.UsageError("the student must start from an architecture or a model")
    bench = Bench(
        run=work.run.root,
        student=chosen,
        model=None if chosen.model is None else work.local(chosen.model),
        cases=tuple(case for case in CASES if not scheme or case.scheme in scheme),
        seeds=tuple(range(seeds)),
    )
    rows = bench.rows()
    name = f"qat-{work.recipe.name}"
    write_rows(name, rows)
    (OUTPUT / f"{name}.md").write_text(table(rows))
    print(table(rows), end="")


if __name__ == "__main__":
    main()
