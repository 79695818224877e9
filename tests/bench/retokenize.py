"""What a teacher is worth to a student with other tokens, in bits per byte of held-out text.

Two students of the same shape learn from one store: one with the teacher's tokens, one with those
of a byte-pair tokenizer that is trained on the same texts. Each is trained with cross-entropy and
with what the teacher knows. The gap is what the teacher wins for the student with its own tokens;
the other student wins a share of it. Every row is the mean of three seeds of the student's weights
and the order. Results are kept, so an interrupted benchmark continues.

By default the corpus, teacher and student are the demo's. `--teacher` takes the folder of another
model, with the texts on the command line.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click
from coldstill.data.maintenance.retokenize import Decisions, retokenize
from coldstill.data.store.reader import open_store
from coldstill.pipeline.quiet import quiet_libraries
from coldstill.pipeline.recipe.reading import load_recipe
from coldstill.stages.config import (
    ArchitectureConfig,
    TokenizerConfig,
    TrainConfig,
    sequences_in,
)
from coldstill.stages.corpus.train_tokenizer import train_tokenizer
from coldstill.stages.evaluate import bits_per_byte
from coldstill.stages.models.device import describe_machine
from coldstill.stages.objective_config import ObjectiveConfig, WeightConfig
from coldstill.stages.students.job import StudentJob
from measure import OUTPUT, write_rows
from trials import spread, trained

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from coldstill.data.store.reader import StoreReader
    from coldstill.data.store.retokenized import Ambiguous

FALLING = WeightConfig(weight=0.0, start=2.0, schedule="linear")
OBJECTIVES = {
    "cross-entropy": ObjectiveConfig(kl=0.0, cross_entropy=1.0),
    "kl": ObjectiveConfig(),
    "kl and cross-entropy": ObjectiveConfig(kl=0.5, cross_entropy=0.5),
    "chunk likelihood": ObjectiveConfig(kl=0.0, chunk_likelihood=1.0),
    "kl and chunk likelihood": ObjectiveConfig(chunk_likelihood=1.0),
    "kl and branches": ObjectiveConfig(branches=FALLING),
    "kl, chunk likelihood and branches": ObjectiveConfig(chunk_likelihood=1.0, branches=FALLING),
    "kl, cross-entropy and branches": ObjectiveConfig(kl=0.5, cross_entropy=0.5, branches=FALLING),
}
OWN = ("cross-entropy", "kl", "kl and cross-entropy")
"""Objectives of the student with the teacher's tokens."""
TEACHERS = "the teacher's"
RECIPE = """\
name = "{name}"
[corpus]
files = {files}
sequence_length = 256
holdout = 0.1
[teacher]
model = "{teacher}"
[logits]
shard_tokens = 16384
[evaluation]
sequences = 64
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One objective, with means over the seeds."""

    tokens: str
    objective: str
    bits_per_byte: float
    spread: float
    """Standard deviation over the seeds."""
    won: float
    """Bits per byte below those of cross-entropy with the same tokens."""
    of_the_gap: float
    """Share of what the teacher wins for the student with the teacher's tokens, with the better of
    its objectives."""
    seeds: tuple[float, ...]
    """Bits per byte of each seed."""
    machine: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """A captured run and the shape of its students."""

    run: Path
    architecture: ArchitectureConfig
    config: TrainConfig
    tokenizer: Path | None
    """Folder of the other student's tokenizer; None trains one."""
    vocabulary: int
    """Tokens of a tokenizer that is trained."""
    seeds: tuple[int, ...]
    ambiguous: Ambiguous
    """What becomes of the probability of ambiguous tokens."""
    branches: float
    """Most branches for each token."""
    objectives: tuple[str, ...]
    """Objectives of the student with other tokens."""

    @property
    def folder(self) -> Path:
        tokens = self.vocabulary if self.tokenizer is None else self.tokenizer.name
        return OUTPUT / f"{self.run.name}-retokenize-{tokens}"

    def stores(self) -> dict[str, tuple[StoreReader, StoreReader]]:
        """The store and the held-out store in the teacher's tokens and in the others."""
        recipe = load_recipe(str(self.run))
        tokenizer = self.tokenizer or self.folder / "tokenizer"
        if not tokenizer.is_dir():
            table = TokenizerConfig(vocabulary=self.vocabulary)
            train_tokenizer(tokenizer, table, recipe.recipe.corpus, recipe.base)
        found = {}
        made = self.folder / self.ambiguous
        for name in ("logits", "heldout"):
            branches = self.branches if name == "logits" else 0.0
            decisions = Decisions(ambiguous=self.ambiguous, branches=branches)
            retokenize(str(self.run / name), str(made / name), tokenizer, decisions)
        for tokens, root in ((TEACHERS, self.run), ("others", made)):
            found[tokens] = open_store(root / "logits"), open_store(root / "heldout")
        return found

    def rows(self) -> list[Row]:
        stores = self.stores()
        print(stores["others"][0].manifest.retokenized)
        figures: dict[tuple[str, str], list[float]] = {}
        for seed in self.seeds:
            for tokens, (store, heldout) in stores.items():
                for name in OWN if tokens == TEACHERS else self.objectives:
                    found = self._bits(tokens, name, seed, store, heldout)
                    figures.setdefault((tokens, name), []).append(found)
            print(f"{seed + 1} of {len(self.seeds)} seeds\n{table(_rows(figures))}", flush=True)
        return _rows(figures)

    def _bits(
        self, tokens: str, name: str, seed: int, store: StoreReader, heldout: StoreReader
    ) -> float:
        """Bits per byte of one student."""
        # those with the teacher's tokens are the same for every other tokenizer
        own = OUTPUT / f"{self.run.name}-retokenize"
        folder = own if tokens == TEACHERS else self.folder / self.ambiguous
        key = f"{name.replace(',', '').replace(' ', '-')}-{self.config.steps}-{seed}"
        # as much text in a step, whatever the number of its tokens
        base = open_store(self.run / "logits").manifest.packing.sequence_length
        sequences = sequences_in(self.config.batch_tokens, base)
        batch = sequences * store.manifest.packing.sequence_length
        job = StudentJob(
            name="bench",
            architecture=self.architecture,
            model=None,
            objective=OBJECTIVES[name],
            config=replace(self.config, batch_tokens=batch),
            seed=seed,
            folder=folder / "students" / key,
        )
        bits = bits_per_byte(heldout, trained(job, store, heldout)["loss"])
        assert bits is not None
        print(f"{tokens} tokens, {name}, seed {seed}: {bits:.4f} bits per byte", flush=True)
        return bits


def _rows(figures: Mapping[tuple[str, str], Sequence[float]]) -> list[Row]:
    means = {key: statistics.fmean(each) for key, each in figures.items()}
    won = {key: means[key[0], OWN[0]] - mean for key, mean in means.items()}
    gap = max(won.get((TEACHERS, name), 0.0) for name in OWN)
    return [
        Row(
            tokens=tokens,
            objective=name,
            bits_per_byte=means[tokens, name],
            spread=spread(each),
            won=won[tokens, name],
            of_the_gap=won[tokens, name] / gap,
            seeds=tuple(each),
            machine=describe_machine(),
        )
        for (tokens, name), each in figures.items()
    ]


def captured(teacher: str | None, texts: tuple[str, ...], name: str) -> Path:
    """The run of the demo, or of a teacher on texts."""
    recipe = "demo"
    if teacher is not None:
        OUTPUT.mkdir(parents=True, exist_ok=True)
        path = OUTPUT / f"{name}.toml"
        files = [str(Path(text).resolve()) for text in texts]
        text = RECIPE.format(name=name, files=files, teacher=Path(teacher).resolve())
        path.write_text(text, encoding="utf-8")
        recipe = str(path)
    command = [sys.executable, "-m", "coldstill.pipeline.cli", "teacher-logits", recipe]
    subprocess.run([*command, "--runs", str(OUTPUT)], check=True)
    return OUTPUT / (name if teacher is not None else "demo")


def table(rows: list[Row]) -> str:
    """The Markdown table of `tests/README.md`."""
    lines = [
        "| tokens | objective | bits per byte | won | of the gap |",
        "|---|---|---:|---:|---:|",
    ]
    lines += [
        f"| {row.tokens} | {row.objective} | {row.bits_per_byte:.4f} ± {row.spread:.4f} | "
        f"{row.won:.4f} | {row.of_the_gap:.0%} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


@click.command(help=__doc__)
@click.argument("texts", nargs=-1)
@click.option("--run", metavar="FOLDER", type=click.Path(exists=True, path_type=Path))
@click.option("--teacher", metavar="FOLDER", help="Another teacher than the demo's.")
@click.option("--name", default="retokenize-texts", help="Name of that teacher's run.")
@click.option("--tokenizer", metavar="FOLDER", type=click.Path(exists=True, path_type=Path))
@click.option("--vocabulary", default=3000, help="Tokens of a tokenizer that is trained.")
@click.option("--steps", default=450, help="Steps of each student.")
@click.option("--seeds", default=3, help="Number of seeds.")
@click.option("--ambiguous", type=click.Choice(["split", "map"]), default="split")
@click.option("--branches", default=0.25, help="Most branches for each token of a sequence.")
@click.option("--objective", "objectives", multiple=True, type=click.Choice([*OBJECTIVES]))
def main(
    texts: tuple[str, ...],
    run: Path | None,
    teacher: str | None,
    name: str,
    tokenizer: Path | None,
    vocabulary: int,
    steps: int,
    seeds: int,
    ambiguous: Ambiguous,
    branches: float,
    objectives: tuple[str, ...],
) -> None:
    """Measure every case without a result and print the table."""
    if bool(texts) != (teacher is not None) or (run and teacher):
        raise click.UsageError("texts and --teacher need each other, and --run neither")
    quiet_libraries()
    student = load_recipe("demo").recipe.students["small"]
    assert student.architecture is not None
    bench = Bench(
        run=run or captured(teacher, texts, name),
        # bytes take several times as many positions as the teacher's tokens
        architecture=replace(student.architecture, context=4096),
        config=replace(student.train, steps=steps),
        tokenizer=tokenizer,
        vocabulary=vocabulary,
        seeds=tuple(range(seeds)),
        ambiguous=ambiguous,
        branches=branches,
        # the first is what the others are compared with
        objectives=tuple(n for n in OBJECTIVES if not objectives or n in (OWN[0], *objectives)),
    )
    rows = bench.rows()
    found = f"{bench.folder.name}-{ambiguous}"
    write_rows(found, rows)
    (OUTPUT / f"{found}.md").write_text(table(rows))


if __name__ == "__main__":
    main()
