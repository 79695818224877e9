"""Stage one: run the teacher once over the corpus and write down what it believes.

Never loads a student. The shard is the unit of work: its batches are always the same ones, so a
run that was killed and went on leaves the same bytes as one that was not.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..data.files import json_bytes
from ..data.places.opening import place_at
from ..data.schema import Block
from ..data.store.layout import MANIFEST, MEASUREMENTS
from ..data.store.manifest import read_manifest
from ..data.store.reader import open_store
from ..data.store.writer import ShardWriter, with_error
from .capture.forward import TeacherForward, capture_batch
from .capture.lockstep import follow, follows, lead
from .capture.plan import CapturePlan, make_manifest
from .capture.shards import answered, capture_shards
from .evaluation.speed import forward_speed
from .evaluation.usage import SEQUENCES, measure_usage, writing_progress
from .models.device import describe_machine, peak_memory
from .ranks import world_size
from .report import Report, Reporter, silent

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..data.store.statistics import ShardStatistics
    from .capture.teacher import Teacher
    from .evaluation.usage import Usage

STAGE = "teacher-logits"
_LEAST_SECONDS, _MOST_SECONDS = 2.0, 30.0
"""Each measurement of the teacher's speed may take a tenth of the capture's time, within these."""
RARE_SEPARATOR = 1e-3
"""Below this mean probability the teacher does not know the separator: it was never trained to end
a document that way, and the student would learn nonsense there."""


def is_captured(plan: CapturePlan) -> bool:
    """Whether the store is whole already. Needs no teacher.

    Raises
        ColdstillError: it was made by another teacher, tokenizer, corpus, packing or capture, or
            a shard is not what was committed
    """
    place = place_at(plan.folder)
    if not place.exists(MANIFEST):
        make_manifest(plan, "positions")  # refuse what cannot be captured before loading anything
        return False
    # the way of isolation is the teacher's doing and part of its fingerprint's consequences
    isolation = read_manifest(place).packing.isolation
    manifest = make_manifest(plan, isolation)
    ShardWriter(plan.folder, manifest).check()
    store = open_store(plan.folder, incomplete=True)
    store.expect_sizes()
    return len(store.done) == manifest.shards


def capture_split(
    plan: CapturePlan,
    teacher: Teacher,
    report: Reporter = silent,
    begin: Callable[[], None] = lambda: None,
    stop: Callable[[], bool] = lambda: False,
) -> None:
    """Capture the shards that are missing, together with any other process that does the same; or
    keep step with the process that does, where one teacher is cut across several.

    begin  called once, when nothing can be refused any more
    stop   asked after each batch: whether to leave the rest for later

    Raises
        ColdstillError: the store was made otherwise, the teacher gives no numbers, the disk is full
    """
    if follows(teacher):
        forward = TeacherForward(teacher, plan.capture, plan.batch_tokens)
        follow(teacher, lambda sequences: forward.prepare(sequences).inputs)
        return
    try:
        _capture_split(plan, teacher, report, begin, stop)
    finally:
        lead(teacher, None)


def _capture_split(
    plan: CapturePlan,
    teacher: Teacher,
    report: Reporter,
    begin: Callable[[], None],
    stop: Callable[[], bool],
) -> None:
    manifest = make_manifest(plan, teacher.isolation)
    stage = f"{STAGE} {plan.split}"
    if not place_at(plan.folder).exists(MANIFEST) and len(plan.rows):
        report(Report(stage=stage, doing="measure the codec's error"))
        manifest = with_error(manifest, _first_batch(plan, teacher))
    forward = TeacherForward(teacher, plan.capture, plan.batch_tokens, report, plan.split)
    writer = ShardWriter(
        plan.folder, manifest, shared=True, save_tokenizer=plan.tokenizer.save_pretrained
    )
    with writer:
        begin()
        found = manifest.shards - len(writer.missing())
        if found:
            report(Report(stage=stage, note=f"going on: {found} of {manifest.shards} shards done"))
        started = time.perf_counter()
        with peak_memory(teacher.head.device) as memory:
            tally = capture_shards(plan, teacher, writer, forward, report, stop)
        if tally.done and not stop():
            took = time.perf_counter() - started
            clock = _Clock(tally.done / took, min(max(took / 10, _LEAST_SECONDS), _MOST_SECONDS))
            report(Report(stage=stage, doing="measure the teacher's speed"))
            measured = _measure(plan, teacher, forward.budget, clock, memory.bytes, report)
            writer.place.write(MEASUREMENTS, json_bytes(measured))
        left = len(writer.missing())
    if left and stop():
        return
    if not left:
        _tell_of_separator(open_store(plan.folder).statistics, plan, report)
    report(Report(stage=stage, note=_outcome(writer, left), warning=bool(left)))


def _outcome(writer: ShardWriter, left: int) -> str:
    shards = writer.manifest.shards
    if left:
        return (
            f"{shards - left} of {shards} shards in {writer.place}; other processes are at the "
            "rest or have lost it: once they have ended, run the same command again"
        )
    return f"{'1 shard' if shards == 1 else f'{shards} shards'} in {writer.place}"


def _first_batch(plan: CapturePlan, teacher: Teacher) -> Block:
    """What the codec's error is measured on."""
    size = max(1, plan.batch_tokens // plan.sequence_length)
    sequences = plan.sequences.read(plan.rows[:size])
    if plan.generate is not None:
        sequences = answered(plan, teacher, sequences)
    targets = capture_batch(teacher, sequences, plan.capture, plan.split)
    return Block(sequences=sequences, targets=targets, capture=plan.capture)


def _tell_of_separator(sums: ShardStatistics, plan: CapturePlan, report: Reporter) -> None:
    # once is enough: the held-out split is captured first, and the teacher is the same
    if plan.split != "heldout" or not sums.separators:
        return
    mean = sums.separator_mass / sums.separators
    token = plan.tokenizer.decode(list(plan.corpus.separator)[:1])
    note = f"where documents end with {token!r}, the teacher's mean probability of it is {mean:.2g}"
    known = mean >= RARE_SEPARATOR
    if not known:
        note += (
            ": it hardly knows this separator; set corpus.separator to the one it was trained "
            'with, or to "" for none'
        )
    report(Report(stage=STAGE, note=note, warning=not known))


@dataclass(frozen=True, slots=True)
class _Clock:
    """What a capture's time allows to measure."""

    tokens_per_second: float
    """Of the capture,"""
    seconds: float
    """and what each of two measurements after it may take."""


def _measure(
    plan: CapturePlan,
    teacher: Teacher,
    budget: int,
    clock: _Clock,
    memory: int,
    report: Reporter,
) -> dict[str, Any]:
    size = max(1, budget // plan.sequence_length)  # what is known to fit
    sample = plan.sequences.read(plan.rows[: min(size, len(plan.rows))])
    forward = None
    if not teacher.lockstep:
        forward = forward_speed(teacher.head, sample, teacher.isolation, clock.seconds)
    # students are compared with it on held-out documents
    alone = plan.split == "heldout" and not teacher.lockstep
    usage = _usage(plan, teacher, clock.seconds, report) if alone else None
    return {
        "machine": describe_machine(),
        "runtime": f"torch {torch.__version__}",
        "processes": world_size(),
        "capture_tokens_per_second": round(clock.tokens_per_second, 1),
        "capture_peak_memory_bytes": memory,
        "forward": None if forward is None else asdict(forward),
        "usage": None if usage is None else asdict(usage),
    }


def _usage(plan: CapturePlan, teacher: Teacher, seconds: float, report: Reporter) -> Usage:
    """On the sequences that students will be measured on."""
    sequences = plan.sequences.read(plan.rows[:SEQUENCES])
    if plan.generate is not None:
        sequences = answered(plan, teacher, sequences)
    stage = f"{STAGE} {plan.split}"
    return measure_usage(
        teacher.head.model,
        sequences,
        plan.sequence_length,
        lambda note: report(Report(stage=stage, note=note, warning=True)),
        seconds=seconds,
        measured=lambda done: report(writing_progress(stage, done)),
    )
