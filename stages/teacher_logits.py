"""Stage one: run the teacher once over the corpus and store its distributions.

Loads no student. The shard is the unit of work, and its batches are always the same, so an
interrupted capture that continues writes the same bytes as an uninterrupted one.

The way of a sequence: `capture.shards` claims a shard and reads its sequences, `capture.generate`
answers prompts, `capture.forward` runs the teacher, `capture.selection` selects head and tail on
the device, and `data.store.writer` encodes and commits the shard.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..data.files import json_bytes
from ..data.places.place import place_at
from ..data.schema import Block
from ..data.store.layout import MANIFEST, MEASUREMENTS
from ..data.store.manifest import read_manifest
from ..data.store.reader import open_store
from ..data.store.writer import ShardWriter, fitted
from .capture.forward import ChunkedForward, TeacherForward, capture_batch, forward_of, prepare
from .capture.plan import CapturePlan, make_manifest
from .capture.served import ServedTeacher
from .capture.shards import capture_shards
from .capture.teacher import Teacher
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
    from .capture.shards import ShardSource
    from .capture.teacher import AnyTeacher

STAGE = "teacher-logits"
_LEAST_SECONDS, _MOST_SECONDS = 2.0, 30.0
"""Limits of one speed measurement, which may take a tenth of the capture's time."""
RARE_SEPARATOR = 1e-3
"""Mean probability of the separator below which a warning is given: the teacher was not trained to
end documents with it, and students would learn noise there."""
_TRIAL_ANSWERS, _TRIAL_ANSWER = 32, 16
"""Most answers on which the codec's error is measured, and most tokens of each."""
_ENDS, _END_SEQUENCES = 64, 256
"""Ends of documents on which the probability of special tokens is measured, and the most sequences
that are read for them."""
_CLEARLY = 2.0
"""Another special token is proposed as separator if it is this many times as probable."""


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
    store = open_store(plan.folder, incomplete=True)
    complete = len(store.done) == store.manifest.shards
    # nothing is captured any more, by whichever engine
    ShardWriter(plan.folder, manifest, other_engine=plan.other_engine or complete).check()
    store.expect_sizes()
    return complete


def capture_split(
    plan: CapturePlan,
    teacher: AnyTeacher,
    report: Reporter = silent,
    begin: Callable[[], None] = lambda: None,
    stop: Callable[[], bool] = lambda: False,
    source: ShardSource | None = None,
) -> None:
    """Capture the missing shards of one split, sharing them with other processes that do the same.

    If the teacher is split across processes, all but the first only compute their slices.

    begin   called once, after every check
    stop    called after each batch and, while the teacher answers prompts, after each token; True
            leaves the rest for later
    source  the shards that another process gives to this one; if None, this process claims them
    """
    if isinstance(teacher, Teacher) and teacher.follows:
        forward = TeacherForward(teacher, plan.capture, plan.batch_tokens)
        teacher.follow(lambda sequences: forward.prepare(sequences).inputs)
        return
    try:
        _capture_split(plan, teacher, report, begin, stop, source)
    finally:
        teacher.lead(None)


def _capture_split(
    plan: CapturePlan,
    teacher: AnyTeacher,
    report: Reporter,
    begin: Callable[[], None],
    stop: Callable[[], bool],
    source: ShardSource | None,
) -> None:
    manifest = make_manifest(plan, teacher.isolation)
    stage = f"{STAGE} {plan.split}"
    if not place_at(plan.folder).exists(MANIFEST) and len(plan.rows):
        report(Report(stage=stage, doing="measure the codec's error"))
        manifest = fitted(manifest, _first_batch(plan, teacher, stop))
    forward = forward_of(teacher, plan.capture, plan.batch_tokens, report, plan.split, stop)
    writer = ShardWriter(
        plan.folder,
        manifest,
        shared=True,
        save_tokenizer=plan.tokenizer.save_pretrained,
        other_engine=plan.other_engine,
    )
    with writer:
        begin()
        if isinstance(teacher, ServedTeacher):
            teacher.expect_that_of(open_store(plan.folder, incomplete=True))
        done = manifest.shards - len(writer.missing())
        if done and source is None:  # the driver of a cluster reports this itself
            note = f"continuing: {done} of {manifest.shards} shards done"
            report(Report(stage=stage, note=note))
        started = time.perf_counter()
        with peak_memory(teacher.device) as memory:
            tally = capture_shards(plan, teacher, writer, forward, report, stop, source)
        if isinstance(teacher, ServedTeacher) and not stop():
            teacher.server.expect_same_model()
        took = time.perf_counter() - started
        # the cost of the teacher is known from the corpus
        if tally.done and not stop() and plan.written is None:
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
            sums = open_store(plan.folder).statistics
            if sums.separators:
                _report_separator(
                    sums, plan, _special_at_ends(plan, teacher, forward.budget), report
                )
        shards = "1 shard" if manifest.shards == 1 else f"{manifest.shards} shards"
        note = f"{shards} in {writer.place}"
    report(Report(stage=stage, note=note, warning=bool(left)))


def _first_batch(plan: CapturePlan, teacher: AnyTeacher, stop: Callable[[], bool]) -> Block:
    """A captured batch, on which the codec's error is measured. Answers are few and cut short: they
    are made again for the store."""
    count = sequences_in(plan.batch_tokens, plan.sequence_length)
    if plan.generate is not None:
        short = min(plan.generate.max_new_tokens, _TRIAL_ANSWER)
        plan = replace(plan, generate=replace(plan.generate, max_new_tokens=short))
        sequences = plan.sequences.read(plan.rows[: min(count, _TRIAL_ANSWERS)])
        sequences = teacher.answer(plan, sequences)
    else:
        sequences = plan.sequences.read(plan.rows[:count])
    targets = capture_batch(teacher, sequences, plan.capture, plan.split, stop)
    return Block(sequences=sequences, targets=targets, capture=plan.capture)


def _special_at_ends(plan: CapturePlan, teacher: AnyTeacher, budget: int) -> dict[int, float]:
    """The teacher's mean probability of every special token where the separator is the label.

    Measured on the first sequences of the split, `_ENDS` such positions or a few more. `budget` is
    the most tokens of a batch. Empty if the teacher answers prompts, which end by its own
    rule, and for a server, which does not say it.
    """
    if plan.generate is not None or isinstance(teacher, ServedTeacher):
        return {}
    vocabulary = teacher.head.vocabulary
    added = plan.tokenizer.added_tokens_decoder.items()
    special = [token for token, entry in added if entry.special and token < vocabulary]
    forward = ChunkedForward(teacher.head)
    sums, count = torch.zeros(len(special), dtype=torch.float64), 0
    rows = sequences_in(budget, plan.sequence_length)
    for start in range(0, min(len(plan.rows), _END_SEQUENCES), rows):
        if count >= _ENDS:
            break
        sequences = plan.sequences.read(plan.rows[start : start + rows])
        teacher.lead(sequences)
        batch = prepare(teacher, sequences, plan.capture.seed, pin=False)
        for chunk in forward.chunks(batch):
            at_end = chunk.logits_MV[chunk.labels_M == plan.corpus.separator[0]]
            sums += at_end.double().softmax(1)[:, special].sum(0).cpu()
            count += len(at_end)
    means = (sums / max(1, count)).tolist()
    return dict(zip(special, means, strict=True)) if count else {}


def _report_separator(
    sums: ShardStatistics, plan: CapturePlan, special: dict[int, float], report: Reporter
) -> None:
    mean = sums.separator_mass / sums.separators
    used = plan.corpus.separator[0]
    note = (
        f"where documents end with {plan.tokenizer.decode([used])!r}, the teacher's mean "
        f"probability of it is {mean:.2g}"
    )
    known = mean >= RARE_SEPARATOR
    likeliest = max(special, key=lambda token: special[token], default=used)
    least = max(_CLEARLY * mean, RARE_SEPARATOR)
    proposes = likeliest != used and special[likeliest] >= least
    if proposes:
        text = plan.tokenizer.decode([likeliest])
        note += (
            f"; it expects {text!r} there with {special[likeliest]:.2g}: set corpus.separator = "
            f"{json.dumps(text, ensure_ascii=False)} in the recipe, and give the run another name"
        )
    elif not known:
        note += (
            ": it was not trained with this separator; set corpus.separator to the one it was "
            'trained with, or to "" for none'
        )
    report(Report(stage=STAGE, note=note, warning=proposes or not known))


def _first_sequences(plan: CapturePlan) -> Sequences:
    """The first sequences of the store if they are answered prompts, otherwise of the plan. While
    other processes still answer, they are prompts without answers."""
    store = open_store(plan.folder, incomplete=True)
    if plan.generate is not None and len(store.done) == store.manifest.shards:
        return store.read(np.arange(min(SEQUENCES, len(store)))).sequences
    return plan.sequences.read(plan.rows[:SEQUENCES])


def _measure(
    plan: CapturePlan, teacher: AnyTeacher, budget: int, took: float, report: Reporter
) -> dict[str, Any]:
    """Speed and cost of the teacher, for `measurements.json`.

    budget  tokens of a batch that fit into memory
    took    seconds of the capture
    """
    seconds = min(max(took / 10, _LEAST_SECONDS), _MOST_SECONDS)
    forward = usage = None
    if isinstance(teacher, Teacher) and teacher.is_whole:
        sample = plan.sequences.read(plan.rows[: max(1, budget // plan.sequence_length)])
        forward = forward_speed(teacher.head, sample, teacher.isolation, seconds)
        if plan.split == "heldout":  # students are measured on these sequences
            stage = f"{STAGE} {plan.split}"
            # students are measured uncompiled, and graphs of a capture do not fit a growing cache
            with torch.compiler.set_stance("force_eager"):
                usage = measure_usage(
                    teacher.head.model,
                    _first_sequences(plan),
                    plan.sequence_length,
                    lambda note: report(Report(stage=stage, note=note, warning=True)),
                    seconds=seconds,
                    measured=lambda done: report(writing_progress(stage, done)),
                )
    return {
        "machine": describe_machine(),
        "runtime": teacher.runtime,
        "processes": world_size(),
        "forward": None if forward is None else asdict(forward),
        "usage": None if usage is None else asdict(usage),
    }
