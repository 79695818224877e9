"""A capture in small, before the whole one: how fast it is, what it takes and what it is worth.

One pass over a sample of sequences. The logits of a chunk are looked at in every way that is asked
about while they are there; only the recipe's own way counts for the speed. Bytes are those of real
shards, made by the store's writer in a scratch folder and deleted once they are counted.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ...data.schema import Block, Capture
from ..capture.batches import batches_of
from ..capture.forward import Pending, prepare
from ..capture.selection import select
from ..models.device import describe_machine
from ..report import Report, Reporter, silent
from ..targets.tensors import TargetTensors
from .estimator import EstimatorMeter
from .pilot_store import PilotStore
from .stopwatch import Stopwatch

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from ...data.prepared import SequenceFile
    from ...data.schema import Sequences
    from ...data.store.manifest import Manifest
    from ..capture.forward import Prepared
    from ..capture.teacher import Teacher
    from ..config import GenerateConfig
    from .estimator import EstimatorQuality

STAGE = "pilot"
SPLIT = "train"
"""Whose sequences a pilot samples: for messages."""
HEAD_SIZES = (1, 4, 8, 16, 32, 64, 128)
"""Heads whose covered mass is told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PilotPlan:
    """What is measured, and on what."""

    sequences: SequenceFile
    rows: NDArray[np.int64]
    """Which of them, increasing."""
    manifests: tuple[Manifest, ...]
    """Of a store for each way of keeping them (capture and codec); the first is the recipe's own.
    Their captures share temperatures and seed."""
    batch_tokens: int
    tokenizer: Any = None
    generate: GenerateConfig | None = None
    """How the teacher answers, where the sequences are prompts."""

    @property
    def captures(self) -> tuple[Capture, ...]:
        """Each once, the recipe's own first."""
        return tuple(dict.fromkeys(manifest.capture for manifest in self.manifests))


@dataclass(frozen=True, slots=True, kw_only=True)
class WayFigures:
    """One way of keeping the teacher's distribution."""

    manifest: Manifest
    bytes_per_position: float
    """Of whole shards, tokens and borders included. A file's frame takes some kilobytes: of few
    positions it is a large part, of a real shard none worth naming."""
    kl: float
    """Mean KL(captured || stored), in nats: what the codec cost."""
    quality: EstimatorQuality

    @property
    def gradient_error(self) -> float:
        """Distance of the gradient summed over all positions from the exact one, in lengths of that
        one: by the law of cosines, from the angle between them and their lengths' ratio."""
        ratio, angle = self.quality.norm_ratio, math.radians(self.quality.angle)
        return math.sqrt(max(0.0, 1.0 + ratio * ratio - 2.0 * ratio * math.cos(angle)))


@dataclass(frozen=True, slots=True, kw_only=True)
class PilotFigures:
    """What was measured."""

    sequences: int
    positions: int
    tokens_per_second: float
    """Of the recipe's own capture; a sequence counts with its greatest length, as in stage one."""
    covered_mass: dict[int, float]
    """Head size to the mean probability inside."""
    ways: list[WayFigures]
    machine: str


@torch.no_grad()
def run_pilot(
    plan: PilotPlan, teacher: Teacher, scratch: Path, report: Reporter = silent
) -> PilotFigures:
    """Measure everything on the plan's sequences.

    scratch  a folder for shards that are counted and deleted

    Raises
        ColdstillError: the teacher gives no numbers
    """
    sequences = plan.sequences.read(plan.rows)
    measured = _Pass(plan, teacher)
    length = plan.manifests[0].packing.sequence_length
    with ExitStack() as held:
        stores = [
            held.enter_context(PilotStore(scratch / str(number), manifest))
            for number, manifest in enumerate(plan.manifests)
        ]
        done, total = 0, len(sequences) * length
        report(Report(stage=STAGE, total=total))
        for places in batches_of(_lengths(plan, sequences), plan.batch_tokens):
            part = sequences.take(places)
            blocks = measured.measure(part)
            for store in stores:
                store.add(blocks[store.manifest.capture])
            done += len(part) * length
            report(Report(stage=STAGE, done=done, total=total, step=len(part) * length))
        report(Report(stage=STAGE, doing="weigh the shards"))
        for store in stores:
            store.finish()
    return _figures(plan, teacher, measured, stores, length)


def _figures(
    plan: PilotPlan, teacher: Teacher, measured: _Pass, stores: Sequence[PilotStore], length: int
) -> PilotFigures:
    qualities = {quality.capture: quality for quality in measured.meter.result()}
    seconds = measured.seconds_per_sequence
    if teacher.head.device.type != "cuda":
        # beside an accelerator other threads encode and write; on a CPU they need the same cores
        seconds += stores[0].seconds / len(plan.rows)
    return PilotFigures(
        sequences=len(plan.rows),
        positions=measured.positions,
        tokens_per_second=round(length / seconds, 1),
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


class _Pass:
    """The teacher's side: forward passes, selections, and the clock."""

    def __init__(self, plan: PilotPlan, teacher: Teacher) -> None:
        self._plan, self._teacher, self._captures = plan, teacher, plan.captures
        self.meter = EstimatorMeter(self._captures)
        self.positions = 0
        sizes = [size for size in HEAD_SIZES if size <= teacher.head.vocabulary]
        self.mass = dict.fromkeys(sizes, 0.0)
        self._widest = Capture(head=sizes[-1], tail=0)
        self._buffer: torch.Tensor | None = None
        self._seconds: list[float] = []
        self._sequences: list[int] = []

    @property
    def seconds_per_sequence(self) -> float:
        """Of the own capture alone. The first batch also warms up: others tell, if there are."""
        first = 1 if len(self._seconds) > 1 else 0
        return sum(self._seconds[first:]) / sum(self._sequences[first:])

    def measure(self, sequences: Sequences) -> dict[Capture, Block]:
        """One batch, answered if it is of prompts, captured in every way."""
        head, own = self._teacher.head, self._captures[0]
        watch = Stopwatch(head.device)
        if self._plan.generate is not None:
            sequences = _answered(self._plan, self._teacher, sequences)
        batch = prepare(sequences, self._teacher.isolation, head.model.dtype, own.seed, pin=False)
        hidden_MD, labels_M, uniform_M = self._forward(batch)
        parts: dict[Capture, list[TargetTensors]] = {capture: [] for capture in self._captures}
        buffer = self._room(len(hidden_MD))
        for start in range(0, len(hidden_MD), len(buffer)):
            rows = slice(start, start + len(buffer))
            logits = head.logits(hidden_MD[rows], buffer)
            kept = list(select(logits, labels_M[rows], uniform_M[rows], own))
            parts[own].extend(kept)
            with watch.stopped():
                if not all(bool(part.entropy.isfinite().all()) for part in kept):
                    break  # no numbers: refused below
                self._look(parts, hidden_MD[rows], logits, labels_M[rows], uniform_M[rows])
        # a teacher that gives no numbers is refused here, as in stage one
        pending = Pending(sequences, self._teacher.name, SPLIT, parts[own], own)
        targets = {own: pending.targets()}
        self._seconds.append(watch.seconds())
        self._sequences.append(len(sequences))
        self.positions += len(hidden_MD)
        targets |= {c: TargetTensors.concatenate(parts[c]).to_targets() for c in self._captures[1:]}
        return {
            capture: Block(sequences=sequences, targets=found, capture=capture)
            for capture, found in targets.items()
        }

    def _forward(self, batch: Prepared) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Hidden states `[M, D]`, labels and random numbers of the supervised positions."""
        head = self._teacher.head
        inputs = {name: tensor.to(head.input_device) for name, tensor in batch.inputs.items()}
        states = head.hidden(inputs).flatten(0, 1)
        hidden_MD = states[batch.positions.to(states.device)].to(head.device)
        return hidden_MD, batch.labels.to(head.device), batch.uniform.to(head.device)

    def _room(self, positions: int) -> torch.Tensor:
        """Memory for logits, kept from batch to batch as in stage one."""
        head = self._teacher.head
        if self._buffer is None or len(self._buffer) < min(head.chunk, positions):
            self._buffer = head.buffer(positions, head.device)
        return self._buffer

    def _look(
        self,
        parts: dict[Capture, list[TargetTensors]],
        hidden_MD: torch.Tensor,
        logits_MV: torch.Tensor,
        labels_M: torch.Tensor,
        uniform_M: torch.Tensor,
    ) -> None:
        """Everything that a capture would not do: other ways, covered mass, gradients."""
        for capture in self._captures[1:]:
            parts[capture].extend(select(logits_MV, labels_M, uniform_M, capture))
        for selected in select(logits_MV, labels_M, uniform_M, self._widest):
            sums_K = selected.head_logprobs.double().exp().sum(0).cumsum(0)
            for size in self.mass:
                self.mass[size] += float(sums_K[size - 1])
        self.meter.add(hidden_MD, logits_MV, labels_M, uniform_M)


def _lengths(plan: PilotPlan, sequences: Sequences) -> NDArray[np.int64]:
    """[N] what each takes in a batch; of a prompt, with the longest answer there can be."""
    lengths_N = sequences.tokens.lengths
    if plan.generate is None:
        return lengths_N
    most = plan.manifests[0].packing.sequence_length
    return (lengths_N + plan.generate.max_new_tokens).clip(max=most)


def _answered(plan: PilotPlan, teacher: Teacher, prompts: Sequences) -> Sequences:
    """What the teacher says to prompts: where it answers them, that is what is captured."""
    from ..capture.generate import answer, end_tokens

    assert plan.generate is not None
    return answer(
        teacher.head,
        prompts,
        plan.generate,
        seed=plan.captures[0].seed,
        ends=end_tokens(teacher.head.model, plan.tokenizer),
        sequence_length=plan.manifests[0].packing.sequence_length,
        answering=teacher.answering,
    )
