"""Stage one: run the teacher once over the corpus and store its distributions.

Loads no student. The shard is the unit of work, and its batches are always the same, so an
interrupted capture that continues writes the same bytes as an uninterrupted one.

The way of a sequence: `capture.shards` claims a shard and reads its sequences, `capture.generate`
answers prompts, `capture.forward` runs the teacher, `capture.selection` selects head and tail on
the device, and `data.store.writer` encodes and commits the shard.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from ..data.files import json_bytes
from ..data.places.place import place_at
from ..data.schema import Block
from ..data.store.layout import MANIFEST, MEASUREMENTS
from ..data.store.manifest import read_manifest
from ..data.store.reader import open_store
from ..data.store.writer import ShardWriter, with_error
from .capture.forward import TeacherForward, capture_batch
from .capture.plan import CapturePlan, make_manifest
from .capture.shards import capture_shards
from .config import sequences_in
from .evaluation.speed import forward_speed
from .evaluation.usage import SEQUENCES, measure_usage, writing_progress
from .models.device import describe_machine, peak_memory
from .ranks import world_size
from .report import Report, Reporter, silent

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..data.schema import Sequences
    from ..data.store.commit import ShardStatistics
    from .capture.teacher import Teacher

STAGE = "teacher-logits"
_LEAST_SECONDS, _MOST_SECONDS = 2.0, 30.0
"""Limits of one speed measurement, which may take a tenth of the capture's time."""
RARE_SEPARATOR = 1e-3
"""Mean probability of the separator below which a warning is given: the teacher was not trained to
end documents with it, and students would learn noise there."""


def is_captured(plan: CapturePlan) -> bool:
    """Whether the store is complete. Needs no teacher.

    Raises
        ColdstillError: the store was made with another teacher, tokenizer, corpus, packing or
            capture, or a shard differs from its commit record
    """
    place = place_at(plan.folder)
    if not place.exists(MANIFEST):
        make_manifest(plan, "positions")  # refuse an impossible capture before loading anything
        return False
    # the isolation follows from the teacher, whose fingerprint is compared
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
    """Capture the missing shards of one split, sharing them with other processes that do the same.

    If the teacher is split across processes, all but the first only compute their slices.

    begin  called once, after every check
    stop   called after each batch; returning True leaves the rest for later
    """
    if teacher.follows:
        forward = TeacherForward(teacher, plan.capture, plan.batch_tokens)
        teacher.follow(lambda sequences: forward.prepare(sequences).inputs)
        return
    try:
        _capture_split(plan, teacher, report, begin, stop)
    finally:
        teacher.lead(None)


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
        done = manifest.shards - len(writer.missing())
        if done:
            note = f"continuing: {done} of {manifest.shards} shards done"
            report(Report(stage=stage, note=note))
        started = time.perf_counter()
        with peak_memory(teacher.head.device) as memory:
            tally = capture_shards(plan, teacher, writer, forward, report, stop)
        took = time.perf_counter() - started
        if tally.done and not stop():
            report(Report(stage=stage, doing="measure the teacher's speed"))
            measured = {
                **_measure(plan, teacher, forward.budget, took, report),
                "capture_tokens_per_second": round(tally.done / took, 1),
                "capture_peak_memory_bytes": memory.bytes,
            }
            writer.place.write(MEASUREMENTS, json_bytes(measured))
        left = len(writer.missing())
    if left and stop():
        return
    if left:
        note = (
            f"{manifest.shards - left} of {manifest.shards} shards in {writer.place}; other "
            "processes work on the rest or have failed: once they have ended, run the same "
            "command again"
        )
    else:
        # the held-out split is captured first, so one report for both is enough
        if plan.split == "heldout":
            _report_separator(open_store(plan.folder).statistics, plan, report)
        shards = "1 shard" if manifest.shards == 1 else f"{manifest.shards} shards"
        note = f"{shards} in {writer.place}"
    report(Report(stage=stage, note=note, warning=bool(left)))


def _sequences(plan: CapturePlan, teacher: Teacher, count: int) -> Sequences:
    """The first sequences of the plan, with answers if they are prompts."""
    sequences = plan.sequences.read(plan.rows[:count])
    return sequences if plan.generate is None else teacher.answer(plan, sequences)


def _first_batch(plan: CapturePlan, teacher: Teacher) -> Block:
    """A captured batch, on which the codec's error is measured."""
    sequences = _sequences(plan, teacher, sequences_in(plan.batch_tokens, plan.sequence_length))
    targets = capture_batch(teacher, sequences, plan.capture, plan.split)
    return Block(sequences=sequences, targets=targets, capture=plan.capture)


def _report_separator(sums: ShardStatistics, plan: CapturePlan, report: Reporter) -> None:
    if not sums.separators:
        return
    mean = sums.separator_mass / sums.separators
    token = plan.tokenizer.decode(list(plan.corpus.separator)[:1])
    note = f"where documents end with {token!r}, the teacher's mean probability of it is {mean:.2g}"
    known = mean >= RARE_SEPARATOR
    if not known:
        note += (
            ": it was not trained with this separator; set corpus.separator to the one it was "
            'trained with, or to "" for none'
        )
    report(Report(stage=STAGE, note=note, warning=not known))


def _measure(
    plan: CapturePlan, teacher: Teacher, budget: int, took: float, report: Reporter
) -> dict[str, Any]:
    """Speed and cost of the teacher, for `measurements.json`.

    budget  tokens of a batch that fit into memory
    took    seconds of the capture
    """
    seconds = min(max(took / 10, _LEAST_SECONDS), _MOST_SECONDS)
    forward = usage = None
    if not teacher.lockstep:
        sample = plan.sequences.read(plan.rows[: max(1, budget // plan.sequence_length)])
        forward = forward_speed(teacher.head, sample, teacher.isolation, seconds)
    if not teacher.lockstep and plan.split == "heldout":  # students are measured on these sequences
        stage = f"{STAGE} {plan.split}"
        usage = measure_usage(
            teacher.head.model,
            _sequences(plan, teacher, SEQUENCES),
            plan.sequence_length,
            lambda note: report(Report(stage=stage, note=note, warning=True)),
            seconds=seconds,
            measured=lambda done: report(writing_progress(stage, done)),
        )
    return {
        "machine": describe_machine(),
        "runtime": f"torch {torch.__version__}",
        "processes": world_size(),
        "forward": None if forward is None else asdict(forward),
        "usage": None if usage is None else asdict(usage),
    }
