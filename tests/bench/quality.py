"""What each kind of record is worth: the same student, steps and order with every record.

The corpus, teacher and student are the demo's. `cross-entropy` has no teacher. `online` computes
the teacher's full distribution at every position while the student trains. The difference of their
held-out losses is the gap, and a record recovers a share of it. Every row is the mean of three
seeds of the student's weights, the order and the samples.

The last two rows have the default's record in other stores: one with its sequences sorted by mean
surprise, one with shuffled sequences. Both have 40 shards of four sequences, so the training order
mixes only eight shards (a fifth of the store) at a time.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from coldstill.data.prepared import CorpusLayout
from coldstill.data.schema import Block, Capture, Targets
from coldstill.data.store.reader import StoreReader, open_store
from coldstill.pipeline.recipe.reading import load_recipe
from coldstill.stages.capture.plan import CapturePlan, chosen_rows
from coldstill.stages.capture.teacher import Teacher
from coldstill.stages.config import ObjectiveConfig
from coldstill.stages.evaluate import evaluate_student
from coldstill.stages.models.device import describe_machine
from coldstill.stages.models.isolation import flat_positions, model_inputs
from coldstill.stages.models.loading import load_model, load_tokenizer
from coldstill.stages.models.output_head import connect_head
from coldstill.stages.students.job import StudentJob
from coldstill.stages.teacher_logits import capture_split
from coldstill.stages.train_student import train_student
from measure import OUTPUT, write_rows
from oracles import write_missing

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

SEEDS = (0, 1, 2)
RUN = OUTPUT / "demo"
FOLDER = OUTPUT / "quality"
NO_TEACHER, ONLINE = "cross-entropy", "online"
DEFAULT = Capture()
RECORDS = {
    f"({k}, {r})": Capture(head=k, tail=r)
    for k, r in ((50, 0), (12, 0), (0, 12), (0, 24), (8, 8), (16, 16), (DEFAULT.head, DEFAULT.tail))
}
SORTED, SHUFFLED = "default, sorted store", "default, shuffled store"
CASES = (NO_TEACHER, ONLINE, *RECORDS, SORTED, SHUFFLED)
FIGURES = ("loss", "kl", "agreement", "acceptance", "ece")


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


class LivingTeacher:
    """The sequences of a store with the full distributions of a live teacher."""

    def __init__(self, store: StoreReader, teacher: Teacher) -> None:
        self._store, self._teacher = store, teacher
        self._whole = Capture(head=teacher.head.vocabulary, tail=0)
        self.manifest = replace(store.manifest, capture=self._whole)

    def __len__(self) -> int:
        return len(self._store)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    @torch.no_grad()
    def read(self, rows: NDArray[np.int64]) -> Block:
        """Some sequences with full distributions as targets."""
        sequences = self._store.read(rows).sequences
        head = self._teacher.head
        inputs = model_inputs(sequences, self._teacher.isolation, head.model.dtype)
        positions = flat_positions(sequences, inputs["input_ids"].shape[1])
        hidden = head.hidden(inputs).flatten(0, 1)[positions]
        logits = head.logits(hidden, head.buffer(len(hidden), hidden.device))
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
        tail_ids=nothing.astype(np.int32),
        tail_logprobs=None,
        label_logprob=np.zeros(count, np.float32),  # no loss reads it
        entropy=entropy.numpy(),
        log_norm=nothing,
    )


def main() -> None:
    """Measure every case without a result and print the table."""
    command = [sys.executable, "-m", "coldstill.pipeline.cli", "teacher-logits", "demo"]
    subprocess.run([*command, "--runs", str(OUTPUT)], check=True)
    heldout = open_store(RUN / "heldout")
    teacher = _teacher(heldout)
    # seed by seed, so that all cases run on the same machine at the same time
    found = {
        case: [_result(case, seed, teacher, heldout) for seed in SEEDS] for case in (NO_TEACHER,)
    }
    for seed in SEEDS:
        for case in CASES[1:]:
            found.setdefault(case, []).append(_result(case, seed, teacher, heldout))
    rows = _rows(found)
    write_rows("quality", rows)
    (OUTPUT / "quality.md").write_text(table(rows))
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


def _rows(found: dict[str, list[dict[str, Any]]]) -> list[Row]:
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


def _result(case: str, seed: int, teacher: Teacher, heldout: StoreReader) -> dict[str, Any]:
    """The figures of one training; they are stored, so an interrupted benchmark continues."""
    folder = FOLDER / f"{_file_name(case)}-{seed}"
    record = folder / "result.json"
    if not record.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        store = _store(case, seed, teacher)
        _train(case, seed, folder, store)
        row = evaluate_student(case, folder / "model", heldout)
        figures = {name: getattr(row, name) for name in FIGURES}
        size = None
        if case not in (NO_TEACHER, ONLINE):
            size = sum(commit.bytes for commit in store.commits()) / store.positions
        record.write_text(json.dumps({**figures, "bytes_per_position": size}))
    result: dict[str, Any] = json.loads(record.read_text())
    print(f"{case}, seed {seed}: loss {result['loss']:.4f}, KL {result['kl']:.4f}", flush=True)
    return result


def _train(case: str, seed: int, folder: Path, store: StoreReader) -> None:
    student = load_recipe("demo").recipe.students["small"]
    alone = ObjectiveConfig(kl=0.0, cross_entropy=1.0)
    job = StudentJob(
        name="bench",
        architecture=student.architecture,
        model=None,
        objective=alone if case == NO_TEACHER else ObjectiveConfig(),
        config=student.train,
        seed=seed,
        folder=folder,
    )
    train_student(job, store)


def _store(case: str, seed: int, teacher: Teacher) -> Any:
    """The store that the student reads."""
    if case in RECORDS:
        return _captured(RECORDS[case], seed, teacher)
    store = _captured(DEFAULT, seed, teacher)
    if case == ONLINE:
        return LivingTeacher(store, teacher)
    return store if case == NO_TEACHER else _in_order(case, seed, store)


def _captured(capture: Capture, seed: int, teacher: Teacher) -> StoreReader:
    """Capture the demo's sequences to a store."""
    table = load_recipe("demo").recipe
    corpus = CorpusLayout(RUN / "corpus")
    sequences, record = corpus.open("train"), corpus.read_record()
    assert record is not None
    base = open_store(RUN / "logits").manifest
    folder = FOLDER / "stores" / f"{capture.head}-{capture.tail}-{seed}"
    plan = CapturePlan(
        split="train",
        teacher=base.teacher,
        context=None,
        tokenizer=load_tokenizer(str(RUN / "teacher" / "tokenizer"), "teacher"),
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
    capture_split(plan, teacher)
    return open_store(folder)


def _in_order(case: str, seed: int, store: StoreReader) -> StoreReader:
    """Write the default's record in small shards, sorted by surprise or shuffled."""
    block = store.read(np.arange(len(store)))
    if case == SORTED:
        starts = block.sequences.positions.offsets[:-1]
        surprise = np.add.reduceat(-block.targets.label_logprob, starts)
        order = np.argsort(surprise / block.sequences.positions.lengths)
    else:
        order = np.random.default_rng(seed).permutation(len(store))
    folder = FOLDER / "stores" / f"{_file_name(case)}-{seed}"
    manifest = replace(store.manifest, shard_sequences=4, block_sequences=1)
    write_missing(folder, manifest, block.take(order))
    shutil.copytree(store.tokenizer_folder(), folder / "tokenizer", dirs_exist_ok=True)
    return open_store(folder)


def _teacher(heldout: StoreReader) -> Teacher:
    model = load_model(str(RUN / "teacher" / "model"), "teacher", precision="fp32")
    return Teacher(
        head=connect_head(model, heldout.manifest.tokenizer.size),
        isolation=heldout.manifest.packing.isolation,
    )


def _file_name(case: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in case).split())


if __name__ == "__main__":
    main()
