"""What few bits cost a student: rounded after its training, and rounded while it is trained.

The run is that of a recipe, by default the demo's, whose teacher is trained and captured first. The
student is one of the recipe that starts from an `architecture` or a `model`. A model is not trained
without rounding: it is compared as it is, so that a recipe may name the teacher itself.

Every student has the same steps and order. `exact` is trained without rounding; `afterwards` is the
same student with its weights rounded as an export rounds them. `while distilling` is trained with
`quantize`, from its first step on or after a share of the steps. Loss and KL are those of the
rounded weights on held-out documents. `of the loss` is the share of what rounding afterwards loses
that rounding while distilling still loses. Rows are means over seeds of the student's weights and
of the order. Results are kept for each case and seed, so an interrupted benchmark continues.

Latency is that of a token after a prompt, in milliseconds, in the runtimes of the scheme's exports;
they run in turn in one process, and the median of the rounds counts. It does not depend on how the
weights were rounded. A runtime that is not installed has none.
"""

from __future__ import annotations

import contextlib
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from coldstill.data.errors import ColdstillError
from coldstill.data.store.reader import open_store
from coldstill.pipeline.quiet import quiet_libraries
from coldstill.pipeline.recipe.work import open_work
from coldstill.stages.config import QuantizeConfig
from coldstill.stages.export import FORMATS
from coldstill.stages.export.checks import writing_speed
from coldstill.stages.export.reference import load_reference
from coldstill.stages.models.device import describe_machine
from coldstill.stages.models.grids import SCHEMES
from coldstill.stages.models.loading import load_model
from coldstill.stages.report import silent
from coldstill.stages.students.few_bits import round_layers
from coldstill.stages.students.job import StudentJob
from coldstill.stages.train_student import train_student
from measure import OUTPUT, write_rows
from trials import kept, quality_of, settings_of, spread, trained

if TYPE_CHECKING:
    from coldstill.data.store.reader import StoreReader
    from coldstill.pipeline.recipe.tables import StudentTable
    from coldstill.stages.export.contract import Runtime

EXACT, AFTERWARDS, WHILE = "exact", "afterwards", "while distilling"
FULL = ("PyTorch", "onnx")
"""Runtimes of the exact student."""
TURNS = 5
"""How often the latency of every runtime is measured."""
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
    """Loss above the exact student's, as a share of that of rounding afterwards. None if that is
    less than the seeds differ."""
    seeds: tuple[float, ...]
    """Loss of each seed."""
    latency: dict[str, float]
    """Milliseconds a token, by runtime."""
    machine: str


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
    name: str
    """The student's name in the recipe."""
    student: StudentTable
    model: str | None
    """The model that the student starts from, if it is not new."""
    cases: tuple[QuantizeConfig, ...]
    seeds: tuple[int, ...]

    def rows(self) -> list[Row]:
        """A row for the exact student, and two for each scheme."""
        found: list[dict[str, Any]] = []
        for seed in self.seeds:
            found.append(self._of(seed))
            rows = self._rows(found, {})
            print(f"{seed + 1} of {len(self.seeds)} seeds\n{table(rows)}", flush=True)
        return self._rows(found, self._latencies())

    def _rows(self, found: list[dict[str, Any]], latencies: dict[str, float]) -> list[Row]:
        alone = [one[EXACT]["loss"] for one in found]
        exact, noise = statistics.fmean(alone), spread(alone)
        rows = []
        for case in found[0]:
            losses = [one[case]["loss"] for one in found]
            scheme, _, rest = case.partition(" ")
            way, _, start = rest.partition("/")
            lost = None
            if way == WHILE:
                after = statistics.fmean(one[f"{scheme} {AFTERWARDS}"]["loss"] for one in found)
                if after - exact > noise:  # otherwise there is nothing to win
                    lost = (statistics.fmean(losses) - exact) / (after - exact)
            formats = SCHEMES[scheme].formats if way else FULL
            rows.append(
                Row(
                    scheme=scheme,
                    way=way,
                    start=float(start or 0),
                    bytes=found[0][case]["bytes"],
                    loss=statistics.fmean(losses),
                    spread=spread(losses),
                    kl=statistics.fmean(one[case]["kl"] for one in found),
                    of_the_loss=lost,
                    seeds=tuple(losses),
                    latency={name: latencies[name] for name in formats if name in latencies},
                    machine=describe_machine(),
                )
            )
        return rows

    @property
    def _folder(self) -> Path:
        return self.run / "qat" / self.name

    @property
    def _heldout(self) -> StoreReader:
        return open_store(self.run / "heldout")

    def _exact_job(self, seed: int) -> StudentJob:
        return StudentJob(
            name=EXACT,
            architecture=self.student.architecture,
            model=self.model,
            objective=self.student.objective,
            config=self.student.train,
            seed=seed,
            folder=self._folder / f"{EXACT}-{seed}",
        )

    def _of(self, seed: int) -> dict[str, dict[str, Any]]:
        """Figures of every case, by scheme, way and start."""
        store, heldout = open_store(self.run / "logits"), self._heldout
        job = self._exact_job(seed)
        asked = settings_of(job, store, heldout)
        found: dict[str, dict[str, Any]] = {}
        schemes = dict.fromkeys(replace(case, start=0.0) for case in self.cases)
        for case in (None, *schemes):
            name = EXACT if case is None else f"{case.scheme} {AFTERWARDS}"
            record = job.folder / f"{name.replace(' ', '-')}.json"
            measure = partial(self._measured, job, store, case)
            found[name] = kept(record, {**asked, "rounded": case}, measure)
            print(f"{name}, seed {seed}: loss {found[name]['loss']:.4f}", flush=True)
        for case in self.cases:
            name = f"{case.scheme}/{case.start}".replace("/", "-")
            own = replace(job, name=name, quantize=case, folder=self._folder / f"{name}-{seed}")
            figures = trained(own, store, heldout)
            key = f"{case.scheme} {WHILE}/{case.start}"
            found[key] = {**figures, "bytes": found[f"{case.scheme} {AFTERWARDS}"]["bytes"]}
            print(f"{key}, seed {seed}: loss {figures['loss']:.4f}", flush=True)
        return found

    def _measured(
        self, job: StudentJob, store: StoreReader, case: QuantizeConfig | None
    ) -> dict[str, Any]:
        """Figures of the student that is trained without rounding, rounded as a case says."""
        if job.model is None:
            train_student(job, store)
        start = job.model or str(job.model_folder)
        model = load_model(start, EXACT, precision="fp32")
        size_of = 4 * model.num_parameters()
        if case is not None:
            size_of = size(round_layers(model, case, 1, EXACT).finish())
        return {**quality_of(model, self._heldout, EXACT), "bytes": size_of}

    def _latencies(self) -> dict[str, float]:
        """Milliseconds a token, by runtime, of the exact student and its exports."""
        job, heldout = self._exact_job(self.seeds[0]), self._heldout
        schemes = dict.fromkeys(case.scheme for case in CASES)
        wanted = (FULL[1], *(name for scheme in schemes for name in SCHEMES[scheme].formats))
        formats = [name for name in wanted if FORMATS[name].missing_runtime is None]
        if lacking := set(wanted) - set(formats):
            print(f"no latency of {', '.join(sorted(lacking))}: the runtime is not installed")
        return kept(
            self._folder / "latency" / "result.json",
            {"formats": formats, "machine": describe_machine()},
            lambda: latencies(job, heldout, formats),
        )


def latencies(job: StudentJob, heldout: StoreReader, formats: list[str]) -> dict[str, Any]:
    """Milliseconds a token of a student and its exports."""
    reference = load_reference(EXACT, Path(job.model or job.model_folder), heldout)
    prompt = reference.prompt
    assert prompt is not None
    runtimes: dict[str, Runtime] = {FULL[0]: reference.runtime}
    seconds: dict[str, list[float]] = {}
    with contextlib.ExitStack() as held:
        scratch = Path(held.enter_context(tempfile.TemporaryDirectory()))

        def write(name: str) -> Path:
            folder, form = scratch / name, FORMATS[name]
            if not folder.exists():
                base = None if form.base is None else write(form.base)
                folder.mkdir()
                form.write(reference.student, folder, base)
            return folder

        for name in formats:
            try:
                runtimes[name] = FORMATS[name].open(reference.student, write(name))
            except ColdstillError as error:
                print(f"{name}: no latency: {error}")
            else:
                held.callback(runtimes[name].close)
        for _ in range(TURNS):
            for name, runtime in runtimes.items():
                if (speed := writing_speed(runtime, prompt, 0)) is not None:
                    seconds.setdefault(name, []).append(speed.token_seconds)
    return {name: 1e3 * statistics.median(each) for name, each in seconds.items()}


def table(rows: list[Row]) -> str:
    """The Markdown table of `tests/README.md`."""
    lines = [
        "| scheme | rounded | size | loss | KL | of the loss | ms/token |",
        "|---|---|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        way = f"{row.way}, after {row.start:.0%} of the steps" if row.start else row.way
        lost = "" if row.of_the_loss is None else f"{row.of_the_loss:.0%}"
        latency = ", ".join(f"{each:.2f} ({name})" for name, each in row.latency.items())
        lines.append(
            f"| {row.scheme} | {way} | {row.bytes / 1e6:.2f} MB | {row.loss:.4f} ± "
            f"{row.spread:.4f} | {row.kl:.4f} | {lost} | {latency} |"
        )
    return "\n".join(lines) + "\n"


@click.command(help=__doc__)
@click.argument("recipe", default="demo")
@click.option("--student", default=None, help="A student of the recipe; by default its first.")
@click.option("--scheme", multiple=True, help="Only these schemes.")
@click.option("--seeds", default=3, help="Number of seeds.")
def main(recipe: str, student: str | None, scheme: tuple[str, ...], seeds: int) -> None:
    """Measure every case without a result and print the table."""
    quiet_libraries()
    command = [sys.executable, "-m", "coldstill.pipeline.cli", "teacher-logits", recipe]
    subprocess.run([*command, "--runs", str(OUTPUT)], check=True)
    work = open_work(recipe, (), OUTPUT, silent)
    student = student or next(iter(work.recipe.students))
    chosen = work.recipe.student(student)
    if chosen.architecture is None and chosen.model is None:
        raise click.UsageError("the student must start from an architecture or a model")
    bench = Bench(
        run=work.run.root,
        name=student,
        student=chosen,
        model=None if chosen.model is None else work.local(chosen.model),
        cases=tuple(case for case in CASES if not scheme or case.scheme in scheme),
        seeds=tuple(range(seeds)),
    )
    rows = bench.rows()
    name = f"qat-{work.recipe.name}-{student}"
    write_rows(name, rows)
    (OUTPUT / f"{name}.md").write_text(table(rows))
    print(table(rows), end="")


if __name__ == "__main__":
    main()
