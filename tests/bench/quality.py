"""What each kind of record is worth: the same student, steps and order with every record.

By default the corpus, teacher and student are the demo's. `--teacher smollm2` takes a real teacher,
SmolLM2-135M-Instruct, with the texts on the command line and a student of 6.7 million parameters.

`cross-entropy` has no teacher. `online` computes the teacher's full distribution at every position
while the student trains. The difference of their held-out losses is the gap, and a record recovers
a share of it. Every row is the mean of three seeds of the student's weights, the order and the
samples. Results are kept, so an interrupted benchmark continues.

Two rows of the demo have the default's record in other stores: one with its sequences sorted by
mean surprise, one with shuffled sequences. Both have 40 shards of four sequences, so the training
order mixes only eight shards (a fifth of the store) at a time.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import click
import numpy as np
import torch
from coldstill.data.prepared import CorpusLayout
from coldstill.data.schema import Block, Capture, Tail, Targets
from coldstill.data.store.reader import StoreReader, open_store
from coldstill.pipeline.recipe.reading import load_recipe
from coldstill.stages.capture.plan import CapturePlan, chosen_rows
from coldstill.stages.capture.teacher import Teacher
from coldstill.stages.config import ArchitectureConfig, TrainConfig
from coldstill.stages.models.device import describe_machine
from coldstill.stages.models.inputs import flat_positions, model_inputs
from coldstill.stages.models.loading import load_model, load_tokenizer
from coldstill.stages.models.output_head import OutputHead, connect_head
from coldstill.stages.objective_config import ObjectiveConfig
from coldstill.stages.students.job import StudentJob
from coldstill.stages.teacher_logits import capture_split
from measure import OUTPUT, write_rows
from oracles import write_missing
from real_teacher import REAL_RUN, captured_run, teacher_weights
from trials import trained

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

SEEDS = (0, 1, 2)
NO_TEACHER, ONLINE = "cross-entropy", "online"
DEFAULT = Capture()
SORTED, SHUFFLED = "default, sorted store", "default, shuffled store"
FIGURES = ("loss", "kl", "agreement", "acceptance", "ece")
REAL = """\
[corpus]
sequence_length = 256
holdout = 0.08
[logits]
sequences = 160
shard_tokens = 16384
[evaluation]
sequences = 64
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One kind of record, with means over the seeds."""

    case: str
    bytes_per_position: float | None
    """None if nothing is stored."""
    loss: float
    spread: float
    """Standard deviation of the loss over the seeds."""
    kl: float
    agreement: float
    acceptance: float
    ece: float
    recovered: float
    """Share of the gap in loss between cross-entropy and online."""
    machine: str


class LivingTeacher(StoreReader):
    """The sequences of a store with the full distributions of a live teacher."""

    def __init__(self, store: StoreReader, teacher: Teacher) -> None:
        vars(self).update(vars(store))
        self._sequences, self._teacher = store, teacher
        self._whole = Capture(head=teacher.head.vocabulary, tail=0)
        self.manifest = replace(store.manifest, capture=self._whole)

    def block(self, shard: int, number: int) -> Block:
        # the shards on disk have the capture of the store
        return self._sequences.block(shard, number)

    @torch.no_grad()
    def read(self, rows: NDArray[np.integer[Any]]) -> Block:
        """Some sequences with full distributions as targets."""
        sequences = self._sequences.read(rows).sequences
        head = self._teacher.head
        inputs = model_inputs(sequences, self._teacher.isolation, head.model.dtype)
        positions = flat_positions(sequences, inputs["input_ids"].shape[1])
        hidden = head.hidden(inputs).flatten(0, 1)[positions]
        logits = head.logits(hidden, head.buffer(len(hidden), hidden.device, least=len(hidden)))
        return Block(sequences=sequences, targets=_whole(logits), capture=self._whole)


def _whole(logits_MV: torch.Tensor) -> Targets:
    """Full distributions in the order of ids, except that the most probable token is first."""
    logprobs = logits_MV.log_softmax(1)
    count, vocabulary = logprobs.shape
    ids = torch.arange(vocabulary, dtype=torch.int32).expand(count, vocabulary).clone()
    best = logprobs.argmax(1, keepdim=True)
    entropy = -(logprobs.exp() * logprobs).sum(1)
    for tensor in (ids, logprobs):
        first, most = tensor[:, :1].clone(), tensor.gather(1, best)
        tensor.scatter_(1, best, first)
        tensor[:, :1] = most
    nothing = np.zeros((count, 0), np.float32)
    return Targets(
        head_ids=ids.numpy(),
        head_logprobs=logprobs.numpy(),
        log_tail=np.full(count, -np.inf, np.float32),
        tail=Tail.empty(count),
        label_logprob=np.zeros(count, np.float32),  # no loss reads it
        entropy=entropy.numpy(),
        log_norm=nothing,
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RememberingHead(OutputHead):
    """A teacher's head that keeps the states of every sequence: each record and seed reads the same
    ones, and the head's own work is left."""

    states: dict[bytes, torch.Tensor] = field(default_factory=dict)

    def hidden(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        names = sorted(inputs)
        keys = [
            b"".join(inputs[name][row].cpu().numpy().tobytes() for name in names)
            for row in range(len(inputs["input_ids"]))
        ]
        if not self.states.keys() >= set(keys):
            # named, since a dataclass with slots is another class than its methods were made for
            self.states.update(zip(keys, OutputHead.hidden(self, inputs), strict=True))
        return torch.stack([self.states[key] for key in keys])


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """The teacher, texts and student of one table."""

    run: Path
    student: ArchitectureConfig
    config: TrainConfig
    alone: TrainConfig
    """For the student without a teacher, which may have another best learning rate."""
    teacher: Teacher
    records: tuple[tuple[int, int], ...]
    """Head and tail of each record."""
    ordered: bool
    """Whether the default's record is measured in other orders too."""

    @property
    def folder(self) -> Path:
        return self.run.with_name(f"{self.run.name}-quality")

    @property
    def heldout(self) -> StoreReader:
        return open_store(self.run / "heldout")

    def rows(self) -> list[Row]:
        captures = {f"({k}, {r})": Capture(head=k, tail=r) for k, r in self.records}
        cases = (NO_TEACHER, ONLINE, *captures, *((SORTED, SHUFFLED) if self.ordered else ()))
        found: dict[str, list[dict[str, Any]]] = {case: [] for case in cases}
        for seed in SEEDS:  # all cases run on the same machine at the same time
            for case in cases:
                found[case].append(self._figures(case, captures.get(case, DEFAULT), seed))
        return _rows(found)

    def _figures(self, case: str, capture: Capture, seed: int) -> dict[str, Any]:
        """The figures of one training."""
        store = self._captured(capture, seed)
        size = sum(commit.bytes for commit in store.commits()) / store.positions
        source = store
        if case == ONLINE:
            source = LivingTeacher(store, self.teacher)
        elif case in (SORTED, SHUFFLED):
            source = self._in_order(case, seed, store)
        alone = ObjectiveConfig(kl=0.0, cross_entropy=1.0)
        job = StudentJob(
            name="bench",
            architecture=self.student,
            model=None,
            objective=alone if case == NO_TEACHER else ObjectiveConfig(),
            config=self.alone if case == NO_TEACHER else self.config,
            seed=seed,
            folder=self.folder / f"{_file_name(case)}-{seed}",
        )
        found = trained(job, source, self.heldout)
        print(f"{case}, seed {seed}: loss {found['loss']:.4f}, KL {found['kl']:.4f}", flush=True)
        return {**found, "bytes_per_position": None if case in (NO_TEACHER, ONLINE) else size}

    def _captured(self, capture: Capture, seed: int) -> StoreReader:
        """Capture the run's sequences to a store."""
        table = load_recipe(str(self.run)).recipe
        corpus = CorpusLayout(self.run / "corpus")
        sequences, record = corpus.open("train"), corpus.read_record()
        assert record is not None
        base = open_store(self.run / "logits")
        folder = self.folder / "stores" / f"{capture.head}-{capture.tail}-{seed}"
        plan = CapturePlan(
            split="train",
            teacher=base.manifest.teacher,
            context=None,
            tokenizer=load_tokenizer(str(base.tokenizer_folder()), "teacher"),
            corpus=record,
            sequences=sequences,
            rows=chosen_rows(len(sequences), table.logits.sequences, table.seed),
            capture=replace(capture, seed=seed),
            sequence_length=table.corpus.sequence_length,
            shard_tokens=table.logits.shard_tokens,
            batch_tokens=table.logits.batch_tokens,
            codec="compact",
            store="arrow",
            folder=folder,
        )
        capture_split(plan, self.teacher)
        return open_store(folder)

    def _in_order(self, case: str, seed: int, store: StoreReader) -> StoreReader:
        """Write the default's record in small shards, sorted by surprise or shuffled."""
        block = store.read(np.arange(len(store)))
        if case == SORTED:
            starts = block.sequences.positions.offsets[:-1]
            surprise = np.add.reduceat(-block.targets.label_logprob, starts)
            order = np.argsort(surprise / block.sequences.positions.lengths)
        else:
            order = np.random.default_rng(seed).permutation(len(store))
        folder = self.folder / "stores" / f"{_file_name(case)}-{seed}"
        manifest = replace(store.manifest, shard_sequences=4, block_sequences=1)
        write_missing(folder, manifest, block.take(order))
        shutil.copytree(store.tokenizer_folder(), folder / "tokenizer", dirs_exist_ok=True)
        return open_store(folder)


def demo_bench() -> Bench:
    """The demo's corpus, teacher and student."""
    command = [sys.executable, "-m", "coldstill.pipeline.cli", "teacher-logits", "demo"]
    subprocess.run([*command, "--runs", str(OUTPUT)], check=True)
    run, student = OUTPUT / "demo", load_recipe("demo").recipe.students["small"]
    assert student.architecture is not None
    return Bench(
        run=run,
        student=student.architecture,
        config=student.train,
        alone=student.train,
        teacher=_teacher(run, str(run / "teacher" / "model")),
        records=(
            (50, 0),
            (12, 0),
            (0, 12),
            (0, 24),
            (8, 8),
            (16, 16),
            (DEFAULT.head, DEFAULT.tail),
        ),
        ordered=True,
    )


def real_bench(texts: list[str]) -> Bench:
    """A real teacher on the given texts."""
    run = captured_run(REAL_RUN, texts, REAL)
    config = TrainConfig(steps=120, batch_tokens=1024, learning_rate=4e-3, warmup=0.1)
    return Bench(
        run=run,
        student=ArchitectureConfig(layers=2, hidden=128, heads=4),
        config=config,
        alone=replace(config, learning_rate=2e-3),  # the best of `objectives.py`
        teacher=_teacher(run, teacher_weights().name),
        records=((50, 0), (16, 16), (0, 12), (0, 24), (DEFAULT.head, DEFAULT.tail)),
        ordered=False,
    )


def _teacher(run: Path, folder: str) -> Teacher:
    packing = open_store(run / "heldout").manifest.packing
    vocabulary = open_store(run / "heldout").manifest.tokenizer.size
    head = connect_head(load_model(folder, "teacher", precision="fp32"), vocabulary)
    own = {each.name: getattr(head, each.name) for each in fields(OutputHead)}
    return Teacher(head=RememberingHead(**own), isolation=packing.isolation)


@click.command(help=__doc__)
@click.argument("texts", nargs=-1)
@click.option("--teacher", type=click.Choice(["demo", "smollm2"]), default="demo")
def main(texts: tuple[str, ...], teacher: str) -> None:
    """Measure every case without a result and print the table."""
    if texts and teacher == "demo":
        raise click.UsageError("texts need --teacher smollm2; the demo has its own")
    rows = (demo_bench() if teacher == "demo" else real_bench(list(texts))).rows()
    name = "quality" if teacher == "demo" else f"quality-{teacher}"
    write_rows(name, rows)
    (OUTPUT / f"{name}.md").write_text(table(rows))
    print(table(rows), end="")


def table(rows: list[Row]) -> str:
    """The Markdown table of `tests/README.md`."""
    lines = [
        "| record (head, tail) | bytes/position | loss | KL | acceptance | ECE | of the gap |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        size = "" if row.bytes_per_position is None else f"{row.bytes_per_position:.1f}"
        lines.append(
            f"| {row.case} | {size} | {row.loss:.4f} ± {row.spread:.4f} | {row.kl:.4f} | "
            f"{row.acceptance:.1%} | {row.ece:.1%} | {row.recovered:.1%} |"
        )
    return "\n".join(lines) + "\n"


def _rows(found: Mapping[str, list[dict[str, Any]]]) -> list[Row]:
    means = {
        case: {name: statistics.fmean(one[name] for one in ones) for name in FIGURES}
        for case, ones in found.items()
    }
    nothing, everything = means[NO_TEACHER]["loss"], means[ONLINE]["loss"]
    return [
        Row(
            case=case,
            bytes_per_position=ones[0]["bytes_per_position"],
            spread=statistics.stdev(one["loss"] for one in ones),
            recovered=(nothing - means[case]["loss"]) / (nothing - everything),
            machine=describe_machine(),
            **means[case],
        )
        for case, ones in found.items()
    ]


def _file_name(case: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in case).split())


if __name__ == "__main__":
    main()
