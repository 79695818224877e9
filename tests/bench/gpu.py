"""What a GPU must prove, and how fast it is: `make gpu`.

One script for one card of the H100 class and 8 minutes. Models and stores are made in place;
nothing is downloaded. It prints a table and writes `runs/bench/gpu.json`, also after each check. It
ends with 1 if a check failed or did not run.

`--tiny` runs the same lines on any machine, at sizes that say nothing about speed.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import json
import multiprocessing
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
import torch
from coldstill.data.codecs import distortion
from coldstill.data.schema import Capture
from coldstill.data.store.reader import open_store
from coldstill.stages.capture.forward import capture_batch
from coldstill.stages.capture.teacher import Teacher
from coldstill.stages.models.device import best_device, describe_machine, peak_memory
from coldstill.stages.models.output_head import OutputHead
from coldstill.stages.report import silent
from coldstill.stages.training.checkpoints import last_whole_checkpoint
from coldstill.stages.training.loop import train
from measure import compare_memory, compare_times, write_rows
from student_step import step_figures
from synthetic_store import make_block, make_model, make_store, training_job
from teacher_forward import ONE_BILLION, Shape, Side

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from coldstill.data.schema import Tail, Targets
    from coldstill.data.store.reader import StoreReader
    from coldstill.stages.report import Report, Reporter
    from numpy.typing import NDArray

MOST_KL = {torch.bfloat16: 1e-3, torch.float32: 1e-6}
"""Largest mean KL, in nats, of a teacher on the GPU from the same weights in fp32 on the CPU."""
SAME_DRAWS = 0.999
"""Least share of samples that are the same, in fp32. A sample on the border of two tokens may
differ with the last digit of their probabilities."""
SAME_PROGRESS = 0.1
"""Largest relative difference of what a training has taken off the loss from that in fp32."""
WAIT = 120
"""Seconds within which a training must have written its first checkpoint."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How large everything is."""

    teacher: Shape
    vocabularies: tuple[int, ...]
    """Vocabularies of the student's steps; that of the teacher is the last."""
    student: tuple[int, int]
    """Width and layers of the student whose steps are measured."""
    trained: tuple[int, int]
    """Those of the student that is trained, whose checkpoints take disk."""
    batch: tuple[int, int]
    """Sequences of a student's step, and their tokens."""
    compared: int
    """Sequences that the teacher reads on the CPU too."""
    steps: int
    """Steps of each training."""
    repeats: int


FULL = Sizes(
    teacher=ONE_BILLION,
    vocabularies=(32_000, 128_256),
    student=(2048, 8),
    trained=(768, 6),
    batch=(8, 2048),
    compared=1,
    steps=12,
    repeats=5,
)
TINY = Sizes(
    teacher=Shape(
        "tiny",
        "llama",
        {
            "hidden_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "intermediate_size": 128,
        },
        torch.bfloat16,
        batch=4,
        batches=2,
        length=32,
    ),
    vocabularies=(500,),
    student=(64, 1),
    trained=(64, 1),
    batch=(4, 32),
    compared=2,
    steps=6,
    repeats=1,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One figure."""

    check: str
    what: str
    value: float | None = None
    unit: str = ""
    expected: str = ""
    """What the value must be; empty for a measurement."""
    passed: bool | None = None
    """None for a measurement, and for a check that could not run here."""


def stage_one(sizes: Sizes, folder: Path) -> Iterator[Row]:
    """Speed and memory of the capture against the bare forward pass, also compiled."""
    side = Side(sizes.teacher, sizes.vocabularies[-1], folder)
    tokens = sizes.teacher.batch * sizes.teacher.batches * sizes.teacher.length
    for capture in (Capture(), Capture(head=16, tail=16)):
        name = f"({capture.head}, {capture.tail})"
        ours = functools.partial(side.capture, capture)
        time_ = compare_times("", ours, side.bare, repeats=sizes.repeats)
        memory = compare_memory("", ours, side.bare)
        share = f"share of the bare forward pass, {name}"
        yield Row(check="stage one", what=share, value=1 / time_.ratio)
        yield _speed("stage one", f"capture {name}", tokens, time_.ours)
        yield _memory("stage one", f"capture {name}", memory.ours)
        yield _memory("stage one", "bare forward pass", memory.baseline)
    side.model.base_model.compile(dynamic=True)
    time_ = compare_times("", functools.partial(side.capture, Capture()), side.bare, repeats=1)
    yield _speed("stage one", "capture (0, 50), compiled", tokens, time_.ours)


def same_record(sizes: Sizes, folder: Path) -> Iterator[Row]:
    """The record of the GPU against that of the same weights in fp32 on the CPU."""
    side = Side(sizes.teacher, sizes.vocabularies[-1], folder)
    sequences = side.sequences.read(np.arange(sizes.compared))
    exact_model = copy.deepcopy(side.model).float().cpu()
    whole = Capture(head=side.vocabulary, tail=0)

    def record(model: Any, capture: Capture) -> Targets:
        head = OutputHead(model, side.vocabulary)
        return capture_batch(Teacher(head=head, isolation="positions"), sequences, capture)

    exact = record(exact_model, whole)
    draws = record(exact_model, Capture()).tail
    on_device = copy.deepcopy(exact_model).to(side.model.device)
    for model in (side.model, on_device):
        kl = float(distortion(exact, record(model, whole)).mean())
        most = MOST_KL[model.dtype]
        dtype = str(model.dtype).removeprefix("torch.")
        yield _proof("record", f"mean KL of {dtype} from fp32 on the CPU", kl, most, "nats")
    share = float(np.mean(_same_draws(draws, record(on_device, Capture()).tail)))
    yield Row(
        check="record",
        what="samples that are the same, float32",
        value=share,
        expected=f">= {SAME_DRAWS}",
        passed=share >= SAME_DRAWS,
    )


def steps(sizes: Sizes, folder: Path) -> Iterator[Row]:
    """The step from a record against steps of cross-entropy, in bf16."""
    for vocabulary in sizes.vocabularies:
        model = make_model(vocabulary, *sizes.student, sizes.batch[1])
        found = step_figures(
            f"V = {vocabulary:,}",
            model,
            Capture(),
            *sizes.batch,
            precision=torch.bfloat16,
            repeats=sizes.repeats,
        )
        for one in found:
            yield Row(check="step", what=f"ratio, {one.name}", value=one.ratio)
            if one.unit == "B":
                yield _memory("step", one.name, one.ours)
            else:
                yield Row(check="step", what=one.name, value=one.ours, unit=one.unit)


def trainings(sizes: Sizes, folder: Path) -> Iterator[Row]:
    """Trainings in bf16, with gradient checkpointing and compiled, against one in fp32."""
    store = _store(sizes, folder / "store")
    expected = 0.0
    cases: dict[str, dict[str, Any]] = {
        "fp32": {},
        "bf16": {"precision": "bf16"},
        "bf16, gradient checkpointing": {"precision": "bf16", "gradient_checkpointing": True},
        "bf16, compiled": {"precision": "bf16", "compile": True},
    }
    for name, settings in cases.items():
        own = folder / name.replace(", ", "-").replace(" ", "-")
        with peak_memory(best_device()) as memory:
            losses, seconds = _trained(sizes, store, own, settings)
        tokens = sizes.steps * sizes.batch[0] * sizes.batch[1]
        yield _speed("training", name, tokens, seconds)
        yield _memory("training", name, memory.bytes)
        progress = losses[0] - losses[-1]
        if name == "fp32":
            expected = progress
            yield Row(
                check="training",
                what="loss at the end less that at the start",
                value=-progress,
                unit="nats",
                expected="< -0.05 nats",
                passed=progress > 0.05,
            )
        else:
            off = abs(progress / expected - 1.0)
            yield _proof("training", f"progress of {name} from that of fp32", off, SAME_PROGRESS)


def out_of_memory(sizes: Sizes, folder: Path) -> Iterator[Row]:
    """A capture whose batch does not fit: the batch is halved, and the store is complete."""
    # a large batch and few tokens, so that memory depends on the batch and not on the logits
    shape = dataclasses.replace(sizes.teacher, batch=4 * sizes.teacher.batch, batches=1)
    side = Side(shape, 2_000, folder, store=folder / "small")
    half = copy.copy(side)
    half.shape = dataclasses.replace(shape, batch=shape.batch // 2)
    peaks = []
    for one in (side, half):
        one.capture(Capture())
        with peak_memory(side.model.device) as memory:
            one.capture(Capture())
        peaks.append(memory.bytes)
    expected = _labels(side.store)
    notes: list[Report] = []
    side.clear(Capture())
    with _little_memory(side, sum(peaks) // 2):
        side.fill(Capture(), notes.append)
    halved = sum(note.note.startswith("out of memory") for note in notes)
    yield Row(
        check="memory",
        what="times that the batch was halved",
        value=halved,
        expected=">= 1",
        passed=halved >= 1,
    )
    off = float(np.abs(_labels(side.store) - expected).max())
    # other batch sizes take other kernels, which round differently
    yield _proof("memory", "largest difference of a label's log-probability", off, 0.1, "nats")


def kill_and_resume(sizes: Sizes, folder: Path) -> Iterator[Row]:
    """A training that is killed after its first checkpoint and started again."""
    store = _store(sizes, folder / "store")
    settings = {"checkpoint_every": sizes.steps // 3}
    expected, _ = _trained(sizes, store, folder / "whole", settings)
    killed = folder / "killed"
    child = multiprocessing.get_context("spawn").Process(
        target=_train_and_wait, args=(sizes, folder / "store", killed, settings)
    )
    child.start()
    end = time.monotonic() + WAIT
    while child.is_alive() and last_whole_checkpoint(killed / "checkpoints") is None:
        if time.monotonic() > end:
            break
        time.sleep(0.1)
    child.kill()
    child.join()
    left = last_whole_checkpoint(killed / "checkpoints")
    assert left is not None, f"no checkpoint after {WAIT} s"
    step = int(left.name.rpartition("-")[2])
    what = f"step of the checkpoint that was left, of {sizes.steps}"
    yield _proof("resume", what, step, sizes.steps - 1)
    found, _ = _trained(sizes, store, killed, settings)
    off = abs(found[-1] / expected[-1] - 1.0)
    yield _proof("resume", "last loss from that of a whole training", off, 1e-3)


NO_TIME = "not run: no time is left"

CHECKS: dict[str, Callable[[Sizes, Path], Iterator[Row]]] = {
    "record": same_record,
    "memory": out_of_memory,
    "resume": kill_and_resume,
    "training": trainings,
    "stage one": stage_one,
    "step": steps,
}
"""Proofs first: they take least time."""


def run(sizes: Sizes, seconds: float) -> list[Row]:
    """The rows of every check; a check that fails is a row."""
    end = time.monotonic() + seconds
    rows: list[Row] = []
    for name, check in CHECKS.items():
        if time.monotonic() > end:
            rows.append(Row(check=name, what=NO_TIME))
            continue
        print(f"{name} ...", file=sys.stderr, flush=True)
        try:
            with tempfile.TemporaryDirectory() as folder:
                rows.extend(check(sizes, Path(folder)))
        except Exception as error:  # whatever fails, the other checks run
            traceback.print_exc()
            rows.append(Row(check=name, what=f"{type(error).__name__}: {error}", passed=False))
        write_rows("gpu", rows)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return rows


def table(rows: list[Row]) -> str:
    """A Markdown table."""
    lines = ["| check | | value | expected | |", "|---|---|---:|---|---|"]
    for row in rows:
        value = "" if row.value is None else f"{row.value:,.4g} {row.unit}".strip()
        passed = {None: "", True: "passed", False: "**failed**"}[row.passed]
        what = " ".join(row.what.split())
        lines.append(f"| {row.check} | {what} | {value} | {row.expected} | {passed} |")
    return "\n".join(lines) + "\n"


@click.command(help=__doc__)
@click.option("--tiny", is_flag=True, help="Small sizes, for a machine without a GPU.")
@click.option("--minutes", default=7.0, help="Start no check after this many minutes.")
def main(*, tiny: bool, minutes: float) -> None:
    """Run the checks, print the table and write the file."""
    if not tiny and not torch.cuda.is_available():
        raise click.ClickException("torch finds no GPU here; --tiny runs the checks at small sizes")
    rows = run(TINY if tiny else FULL, 60 * minutes)
    print(f"{describe_machine()}\n\n{table(rows)}", end="")
    if any(row.passed is False for row in rows) or any(row.what == NO_TIME for row in rows):
        raise SystemExit(1)


def _proof(check: str, what: str, value: float, most: float, unit: str = "") -> Row:
    expected = f"<= {most:g} {unit}".strip()
    return Row(
        check=check, what=what, value=value, unit=unit, expected=expected, passed=value <= most
    )


def _speed(check: str, what: str, tokens: int, seconds: float) -> Row:
    return Row(check=check, what=f"speed, {what}", value=tokens / seconds, unit="tokens/s")


def _memory(check: str, what: str, size: float) -> Row:
    return Row(check=check, what=f"peak memory, {what}", value=size / 1e9, unit="GB")


def _store(sizes: Sizes, folder: Path) -> StoreReader:
    rows, length = sizes.batch
    block = make_block(sizes.vocabularies[0], length, 2 * rows, Capture())
    return make_store(folder, block, sizes.vocabularies[0], 2 * rows)


def _trained(
    sizes: Sizes,
    store: StoreReader,
    folder: Path,
    settings: dict[str, Any],
    report: Reporter = silent,
) -> tuple[list[float], float]:
    """Train a student. Returns the loss of every step, and the seconds."""
    rows, length = sizes.batch
    model = make_model(sizes.vocabularies[0], *sizes.trained, length)
    job = training_job(
        store,
        model,
        folder,
        steps=sizes.steps,
        batch_tokens=rows * length,
        learning_rate=1e-3,
        warmup=0.0,
        log_every=1,
        **settings,
    )
    began = time.perf_counter()
    train(job, report)
    seconds = time.perf_counter() - began
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [float(json.loads(line)["loss"]) for line in lines], seconds


def _train_and_wait(sizes: Sizes, root: Path, folder: Path, settings: dict[str, Any]) -> None:
    """Train in a process of its own, and wait after the first checkpoint to be killed."""

    def wait(_: Report) -> None:
        if last_whole_checkpoint(folder / "checkpoints") is not None:
            time.sleep(600)

    _trained(sizes, open_store(root), folder, settings, wait)


def _same_draws(ours: Tail, theirs: Tail) -> NDArray[np.bool_]:
    """[M, R] whether samples are the same."""
    first_MR, second_MR = (
        np.sort(tail.ids[tail.draws(Capture().tail)], axis=1) for tail in (ours, theirs)
    )
    same_MR: NDArray[np.bool_] = first_MR == second_MR
    return same_MR


def _labels(store: Path) -> Any:
    reader = open_store(store)
    return reader.read(np.arange(len(reader))).targets.label_logprob


@contextlib.contextmanager
def _little_memory(side: Side, size: int) -> Iterator[None]:
    """Less memory than a whole batch needs: on a GPU by a limit of the allocator, elsewhere by an
    error of the model for more than half a batch.  size  bytes beside those in use"""
    device = side.model.device
    if device.type == "cuda":
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(device).total_memory
        limit = (torch.cuda.memory_allocated(device) + size) / total
        torch.cuda.set_per_process_memory_fraction(limit, device)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, device)
        return
    most = side.shape.batch * side.shape.length // 2

    def refuse(module: Any, args: Any, given: dict[str, Any]) -> None:
        if given["input_ids"].numel() > most:
            raise torch.OutOfMemoryError(f"more than {most} tokens")

    handle = side.model.base_model.register_forward_pre_hook(refuse, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


if __name__ == "__main__":
    main()
