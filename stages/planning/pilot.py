"""A pilot: captures a sample of sequences in several ways, and measures speed, bytes and quality.

One pass of the teacher over the sample. Every way selects from the same chunk of logits; only the
recipe's own capture counts for the speed. Bytes are measured on real shards, which the store's
writer makes in a scratch folder and which are deleted once they are counted.
"""

from __future__ import annotations

import math
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from ...data.schema import Block, Capture
from ...data.store.layout import shard_name
from ...data.store.writer import ShardWriter, fitted
from ..capture.batches import batches_of
from ..capture.forward import ChunkedForward, Pending, prepare
from ..capture.plan import make_manifest
from ..capture.selection import select
from ..models.device import describe_machine
from ..report import Report, Reporter, silent
from ..targets.tensors import TargetTensors
from .estimator import EstimatorMeter

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from ...data.schema import Sequences
    from ...data.store.manifest import Manifest
    from ..capture.forward import Chunk
    from ..capture.plan import CapturePlan
    from ..capture.teacher import Teacher
    from .estimator import EstimatorQuality

STAGE = "pilot"
HEAD_SIZES = (1, 4, 8, 16, 32, 64, 128)
"""Head sizes whose covered probability mass is measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WayFigures:
    """Figures of one capture with one codec."""

    manifest: Manifest
    bytes_per_position: float
    """Bytes of whole shards, including tokens and document borders. The frame of a file takes some
    kilobytes, which is a large part of a small shard and negligible in a real one."""
    kl: float
    """Mean KL(captured || stored) in nats: the error of the codec."""
    quality: EstimatorQuality

    @property
    def gradient_error(self) -> float:
        """Distance between the summed gradient and the exact one, relative to the length of the
        exact one: by the law of cosines from their angle and the ratio of their lengths."""
        ratio, angle = self.quality.norm_ratio, math.radians(self.quality.angle)
        return math.sqrt(max(0.0, 1.0 + ratio * ratio - 2.0 * ratio * math.cos(angle)))


@dataclass(frozen=True, slots=True, kw_only=True)
class PilotFigures:
    """Figures of a pilot."""

    sequences: int
    positions: int
    tokens_per_second: float
    """Speed of the recipe's own capture; every sequence counts with its full length, as in stage
    one."""
    covered_mass: dict[int, float]
    """Mean probability inside a head, by the size of the head."""
    ways: list[WayFigures]
    machine: str


@torch.no_grad()
def run_pilot(
    plans: Sequence[CapturePlan], teacher: Teacher, scratch: Path, report: Reporter = silent
) -> PilotFigures:
    """Measure all plans on the same sequences.

    plans    one for each capture and codec, the recipe's own first; they differ in nothing else
    scratch  folder for shards that are counted and deleted
    """
    own = plans[0]
    sequences = own.sequences.read(own.rows)
    measured = _Measuring(plans, teacher)
    done, total = 0, len(sequences) * own.sequence_length
    with ExitStack() as held:
        stores = [
            _CountingStore(scratch / str(number), make_manifest(plan, teacher.isolation))
            for number, plan in enumerate(plans)
        ]
        for store in stores:
            held.enter_context(store.writer)
        report(Report(stage=STAGE, total=total))
        for rows in batches_of(own.most_tokens(sequences), own.batch_tokens):
            blocks = measured.measure(sequences.take(rows))
            for store in stores:
                store.add(blocks[store.manifest.capture])
            step = len(rows) * own.sequence_length
            done += step
            report(Report(stage=STAGE, done=done, total=total, step=step))
        report(Report(stage=STAGE, doing="measure the shards"))
        for store in stores:
            store.finish()
    seconds = measured.seconds_per_sequence
    if teacher.head.device.type != "cuda":
        # with an accelerator other threads encode and write; on a CPU they need the same cores
        seconds += stores[0].seconds / len(sequences)
    qualities = {quality.capture: quality for quality in measured.meter.result()}
    return PilotFigures(
        sequences=len(sequences),
        positions=measured.positions,
        tokens_per_second=round(own.sequence_length / seconds, 1),
        covered_mass={
            size: round(mass / measured.positions, 6) for size, mass in measured.mass.items()
        },
        ways=[
            WayFigures(
                manifest=store.manifest,
                bytes_per_position=round(store.bytes / store.positions, 2),
                kl=store.distortion / store.positions,
                quality=qualities[store.manifest.capture],
            )
            for store in stores
        ],
        machine=describe_machine(),
    )


class _Measuring:
    """Forward passes, selections of every capture, and the time of the recipe's own."""

    def __init__(self, plans: Sequence[CapturePlan], teacher: Teacher) -> None:
        self._own, self._teacher = plans[0], teacher
        self._captures = list(dict.fromkeys(plan.capture for plan in plans))
        self._forward = ChunkedForward(teacher.head)
        self._seconds: list[float] = []
        self._sequences: list[int] = []
        self.meter = EstimatorMeter(self._captures)
        self.positions = 0
        sizes = [size for size in HEAD_SIZES if size <= teacher.head.vocabulary]
        self.mass = dict.fromkeys(sizes, 0.0)
        """Sum of the probability inside a head, by the size of the head."""
        self._widest = Capture(head=sizes[-1], tail=0)

    @property
    def seconds_per_sequence(self) -> float:
        """Time of the own capture. The first batch is a warm-up and counts only if it is the only
        one."""
        first = 1 if len(self._seconds) > 1 else 0
        return sum(self._seconds[first:]) / sum(self._sequences[first:])

    def measure(self, sequences: Sequences) -> dict[Capture, Block]:
        head, own = self._teacher.head, self._captures[0]
        watch = _Stopwatch(head.device)
        if self._own.generate is not None:
            sequences = self._teacher.answer(self._own, sequences)
        batch = prepare(self._teacher, sequences, own.seed, pin=False)
        parts: dict[Capture, list[TargetTensors]] = {capture: [] for capture in self._captures}
        for chunk in self._forward.chunks(batch):
            kept = list(select(chunk.logits_MV, chunk.labels_M, chunk.uniform_M, own))
            parts[own].extend(kept)
            with watch.paused():
                if not all(bool(part.entropy.isfinite().all()) for part in kept):
                    break  # refused below
                self._compare(parts, chunk)
        # refuses a teacher whose logits are not finite, as stage one does
        pending = Pending(sequences, self._teacher.name, self._own.split, parts[own])
        targets = {own: pending.targets()}
        self._seconds.append(watch.seconds())
        self._sequences.append(len(sequences))
        self.positions += len(batch.positions)
        targets |= {c: TargetTensors.concatenate(parts[c]).to_targets() for c in self._captures[1:]}
        return {
            capture: Block(sequences=sequences, targets=found, capture=capture)
            for capture, found in targets.items()
        }

    def _compare(self, parts: dict[Capture, list[TargetTensors]], chunk: Chunk) -> None:
        """Everything that stage one does not do: other captures, covered mass, gradients."""
        for capture in self._captures[1:]:
            parts[capture].extend(select(chunk.logits_MV, chunk.labels_M, chunk.uniform_M, capture))
        for part in select(chunk.logits_MV, chunk.labels_M, chunk.uniform_M, self._widest):
            sums_K = part.head_logprobs.double().exp().sum(0).cumsum(0)
            for size in self.mass:
                self.mass[size] += float(sums_K[size - 1])
        self.meter.add(chunk.hidden_MD, chunk.logits_MV, chunk.labels_M, chunk.uniform_M)


class _CountingStore:
    """A store that writes real shards and deletes each one once its bytes are counted."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.manifest = manifest
        self.writer = ShardWriter(folder, manifest)
        self._suffix = manifest.make_store(folder).suffix
        self._waiting: list[Block] = []
        self._shard = 0
        self.bytes = 0
        self.positions = 0
        self.distortion = 0.0
        """Sum of KL(captured || stored) in nats."""
        self.seconds = 0.0
        """Time of encoding and writing."""

    def add(self, block: Block) -> None:
        """Take any number of sequences; write the shards that are full."""
        self._waiting.append(block)
        while sum(map(len, self._waiting)) >= self.manifest.shard_sequences:
            self._write(self.manifest.shard_sequences)

    def finish(self) -> None:
        if self._waiting:
            self._write(sum(map(len, self._waiting)))

    def _write(self, count: int) -> None:
        joined = Block.concatenate(self._waiting) if len(self._waiting) > 1 else self._waiting[0]
        if self._shard == 0:  # as stage one does, which learns from a batch before the first shard
            self.writer.use(fitted(self.manifest, joined.take(np.arange(count))))
        started = time.perf_counter()
        commit = self.writer.write(self._shard, joined.take(np.arange(count)))
        rest = joined.take(np.arange(count, len(joined)))
        self._waiting = [rest] if len(rest) else []
        self.seconds += time.perf_counter() - started
        self.writer.place.remove(shard_name(self._shard, self._suffix))
        self._shard += 1
        self.bytes += commit.bytes
        self.positions += commit.positions
        self.distortion += commit.statistics.distortion


class _Stopwatch:
    """Measures time on a device, waiting for an accelerator to finish."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._passed = device, 0.0
        self._since = self._now()

    def seconds(self) -> float:
        return self._passed + self._now() - self._since

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count the time inside."""
        self._passed = self.seconds()
        try:
            yield
        finally:
            self._since = self._now()

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()
