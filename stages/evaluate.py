"""Evaluates students on the held-out store, and the teacher from what the store recorded.

The teacher is never loaded. Figures are exact on the store's head, and unbiased on the tail, whose
samples have their log-probabilities in a held-out store.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..data.alignment import labels
from ..data.errors import ColdstillError
from ..data.store.caveats import caveats, not_given
from ..data.store.manifest import read_measurements
from ..data.token_bytes import token_bytes_of
from .evaluation.quality import Calibration, CalibrationBin
from .evaluation.usage import SEQUENCES, Usage, measure_usage, writing_progress
from .models.device import best_device, describe_machine, short_dtype
from .models.grids import grid_record
from .models.inputs import flat_positions
from .models.isolation import student_isolation
from .models.loading import load_model, teacher_identity
from .models.output_head import connect_head
from .report import Report, Reporter, silent
from .targets.losses.forward_kl import ForwardKL
from .targets.softmax import softmax_in_place
from .targets.tensors import TargetTensors, summed, tempered

if TYPE_CHECKING:
    from pathlib import Path

    from ..data.schema import Block
    from ..data.store.reader import StoreReader
    from .evaluation.speed import GenerationSpeed
    from .models.inputs import Isolation
    from .models.output_head import OutputHead

STAGE = "evaluate"
_WRITING_SECONDS = 30.0
"""Time limit for measuring generation speed, unless a single short text takes longer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Figures of one model."""

    name: str
    role: str
    """`teacher` or `student`."""
    parameters: int
    bytes: int
    """Size of the weight files."""
    positions: int
    loss: float | None
    """Mean -log p(label), in nats; None for a teacher whose record cannot give it, as for its
    other figures."""
    perplexity: float | None
    bits_per_byte: float | None
    """The loss in bits per byte of the labels' text, which compares models with different tokens.
    None if the store has no tokenizer, or one whose decoding is not known, or without a loss."""
    kl: float
    """Mean KL(teacher || model), in nats."""
    agreement: float
    """Share of positions whose most probable token is the teacher's."""
    accuracy: float
    """Share of positions whose most probable token is the label."""
    acceptance: float | None
    """Expected acceptance in speculative decoding: mean of sum_i min(p_i, q_i). None without the
    mass outside the head."""
    ece: float | None
    """Expected calibration error of top-1 confidence."""
    calibration: tuple[CalibrationBin, ...]
    """`ECE_BINS` bins of confidence: [0, 1/21), [1/21, 2/21) and so on."""
    flops_per_token: int | None
    """Floating point operations per token of a forward pass (`flops.py`)."""
    generation: tuple[GenerationSpeed, ...]
    """Generation speed and memory by batch size; empty if not measured."""
    dtype: str
    """Precision of the weights on disk and in the measurement: `fp32`, `bf16`, `fp16`."""
    machine: str
    runtime: str
    """Name and version of the library that ran it."""
    weights: str
    """SHA-256 of the weights."""
    caveats: tuple[str, ...]
    """What the figures cannot say because of what the store lacks, one sentence each."""
    grid: str = ""
    """Scheme of few bits whose rounded values the weights are, such as `int4`; empty for others."""


def evaluate_student(
    name: str,
    model_folder: Path,
    store: StoreReader,
    report: Reporter = silent,
    *,
    own_code: bool = False,
) -> Evaluation:
    """Measure a trained student on the held-out store.

    own_code  run the Python code in the model's folder (`trust_remote_code`)
    """
    where, stage = f"students.{name}", f"{STAGE} {name}"
    report(Report(stage=stage, doing="load the model"))
    identity = teacher_identity(str(model_folder), where, dtype="auto", revision="main")
    model = load_model(str(model_folder), where, precision="fp32", own_code=own_code)
    model.to(best_device())
    head = connect_head(model, store.manifest.tokenizer.size, report)
    isolation = student_isolation(model, store, where, report)
    sums, calibration = measure_quality(head, isolation, store, stage, report)
    report(Report(stage=stage, doing="measure its speed and memory"))
    usage = measure_usage(
        model,
        store.read(np.arange(min(SEQUENCES, len(store)))).sequences,
        store.manifest.packing.sequence_length,
        lambda note: report(Report(stage=stage, note=note, warning=True)),
        seconds=_WRITING_SECONDS,
        measured=lambda done: report(writing_progress(stage, done)),
    )
    means = sums.means()
    return Evaluation(
        name=name,
        role="student",
        parameters=model.num_parameters(),
        bytes=identity.bytes,
        **means,
        bits_per_byte=bits_per_byte(store, means["loss"]),
        ece=calibration.error(),
        calibration=calibration.bins(),
        flops_per_token=usage.flops_per_token,
        generation=usage.generation,
        dtype=short_dtype(identity.dtype),
        machine=describe_machine(),
        runtime=f"torch {torch.__version__}",
        weights=identity.fingerprint,
        caveats=tuple(caveats(store.manifest)),
        grid=_grid(model_folder, stage, report),
    )


def _grid(model_folder: Path, stage: str, report: Reporter) -> str:
    """The scheme that a student was trained for; reports what its figures leave out."""
    record = grid_record(model_folder)
    if record is None:
        return ""
    scheme = str(record["scheme"])
    if record["activations"] is not None:
        note = (
            f"measured with the rounded weights of {scheme} and exact inputs of layers; the "
            "figures of its exports include the rounding of both"
        )
        report(Report(stage=stage, note=note))
    return scheme


def measure_quality(
    head: OutputHead,
    isolation: Isolation,
    store: StoreReader,
    stage: str = STAGE,
    report: Reporter = silent,
) -> tuple[Sums, Calibration]:
    """Sums and calibration of a model over the held-out store."""
    size = max(1, 8192 // store.manifest.packing.sequence_length)
    sums, calibration = Sums(), Calibration()
    report(Report(stage=stage, total=store.positions, unit="positions"))
    for block in store.batches(size):
        _add_block(head, block, isolation, sums, calibration)
        report(Report(stage=stage, done=sums.positions, total=store.positions, unit="positions"))
    return sums, calibration


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnText:
    """Figures of a student on text that it wrote, at the positions of its answers."""

    round: int
    """Number of the training that made the measured model, from 1."""
    positions: int
    kl: float
    """Mean KL(teacher || student), in nats."""
    agreement: float
    acceptance: float


def evaluate_own_text(
    name: str,
    model_folder: Path,
    store: StoreReader,
    report: Reporter = silent,
    *,
    own_code: bool = False,
) -> OwnText:
    """Measure a student on its own answers to held-out prompts, which the teacher has scored.

    Raises
        ColdstillError: another model wrote the answers, or it cannot be loaded
    """
    where, written = f"students.{name}", store.manifest.written
    identity = teacher_identity(str(model_folder), where, dtype="auto", revision="main")
    if written is None or written.fingerprint != identity.fingerprint:
        raise ColdstillError(
            f"{store.place}: another model wrote this text than {model_folder}; delete the folder "
            f"{store.place} and the text beside it, then write and score it again"
        )
    stage = f"{STAGE} {name}"
    report(Report(stage=stage, doing=f"load the model of round {written.round}"))
    model = load_model(str(model_folder), where, precision="fp32", own_code=own_code)
    model.to(best_device())
    head = connect_head(model, store.manifest.tokenizer.size, report)
    isolation = student_isolation(model, store, where, report)
    means = measure_quality(head, isolation, store, stage, report)[0].means()
    return OwnText(
        round=written.round,
        **{each: means[each] for each in ("positions", "kl", "agreement", "acceptance")},
    )


def evaluate_teacher(store: StoreReader, report: Reporter = silent) -> Evaluation:
    """Figures of the teacher, from what the store recorded."""
    calibration = Calibration()
    correct, known = 0, 0
    stage, done = f"{STAGE} teacher", 0
    report(Report(stage=stage, total=len(store), unit="sequences"))
    for block in store.batches(256):
        done += len(block)
        report(Report(stage=stage, done=done, total=len(store), step=len(block), unit="sequences"))
        targets, rows = block.targets, np.arange(len(block.targets))
        if block.capture.chunks:  # inside a chunk the record says that the label is certain
            rows = np.flatnonzero(targets.chunk_sizes[:, 0] > 0)
        if block.capture.head:
            right = (targets.head_ids[:, 0] == labels(block.sequences))[rows]
            confidence = np.exp(targets.head_logprobs[rows, 0].astype(np.float64))
            calibration.add(confidence, right)
            correct, known = correct + int(right.sum()), known + len(right)
    statistics, count = store.statistics, store.positions
    measured = read_measurements(store.place)
    usage = Usage.of(measured.get("usage"))
    teacher = store.manifest.teacher
    lacking = not_given(store.manifest.capture)
    loss = None if "teacher_loss" in lacking else statistics.loss / count
    is_calibrated = "teacher_calibration" not in lacking
    return Evaluation(
        name="teacher",
        role="teacher",
        parameters=teacher.parameters,
        bytes=teacher.bytes,
        positions=count,
        loss=loss,
        perplexity=None if loss is None else float(np.exp(loss)),
        bits_per_byte=None if loss is None else bits_per_byte(store, loss),
        kl=0.0,
        agreement=1.0,
        accuracy=correct / known if store.manifest.capture.chunks else statistics.correct / count,
        acceptance=None if "acceptance" in lacking else 1.0,
        ece=calibration.error() if is_calibrated else None,
        calibration=calibration.bins() if is_calibrated else (),
        flops_per_token=usage.flops_per_token,
        generation=usage.generation,
        dtype=short_dtype(teacher.dtype),
        machine=str(measured.get("machine", "")),
        runtime=str(measured.get("runtime", "")),
        weights=teacher.fingerprint,
        caveats=tuple(caveats(store.manifest)),
    )


@dataclass(slots=True)
class Sums:
    """Sums of figures over positions, in fp64."""

    positions: int = 0
    known: int = 0
    """Positions at which the teacher's distribution is known: fewer in a store with other tokens
    than the teacher's. KL, agreement and acceptance are means over these."""
    loss: float = 0.0
    kl: float = 0.0
    agreement: float = 0.0
    accuracy: float = 0.0
    acceptance: float = 0.0
    lacking: frozenset[str] = frozenset()
    """Figures that the record cannot give."""

    def means(self) -> dict[str, Any]:
        """Means, by the fields of an `Evaluation`."""
        counts = {"loss": self.positions, "accuracy": self.positions}
        names = ("loss", "kl", "agreement", "accuracy", "acceptance")
        means: dict[str, Any] = {
            name: getattr(self, name) / counts.get(name, self.known)
            for name in names
            if name not in self.lacking
        }
        lacking: dict[str, Any] = dict.fromkeys(self.lacking.intersection(names))
        perplexity = float(np.exp(means["loss"]))
        return {**means, **lacking, "positions": self.positions, "perplexity": perplexity}


@torch.no_grad()
def _add_block(
    head: OutputHead, block: Block, isolation: Isolation, sums: Sums, calibration: Calibration
) -> None:
    device, target = head.model.device, TargetTensors.from_block(block)
    states_BTD = head.read(block.sequences, isolation)
    positions = flat_positions(block.sequences, states_BTD.shape[1])
    hidden_MD = states_BTD.flatten(0, 1)[positions.to(device)]
    buffer = head.buffer(len(hidden_MD), device)
    for start in range(0, len(hidden_MD), len(buffer)):
        rows = slice(start, start + len(buffer))
        chunk = target.rows(rows.start, rows.stop).to(device)
        add_positions(head.logits(hidden_MD[rows], buffer), chunk, sums, calibration)


def add_positions(
    logits_MV: torch.Tensor, target: TargetTensors, sums: Sums, calibration: Calibration
) -> None:
    """Add a student's logits at some positions, which are overwritten, and the targets there."""
    student = softmax_in_place(logits_MV, target)
    right = student.label_logprob >= student.top_logprob
    calibration.add(student.top_logprob.exp().double().cpu().numpy(), right.cpu().numpy())
    sums.lacking |= not_given(target.capture)
    known_M = torch.ones_like(right) if target.known is None else target.known
    sums.positions += len(target)
    sums.known += int(known_M.sum())
    sums.loss -= float(student.label_logprob.double().sum())
    sums.accuracy += float(right.sum())
    agrees = student.head_logprobs[:, 0] >= student.top_logprob
    sums.agreement += float((agrees & known_M).sum())
    sums.acceptance += float((_acceptance(student, target) * known_M).double().sum())
    # computed last, because it overwrites the probabilities
    divergence = ForwardKL().gradient(student, target, 1.0).value
    sums.kl += float((divergence * known_M).double().sum())


def _acceptance(student: Any, target: TargetTensors) -> torch.Tensor:
    """[M] `sum_i min(p_i, q_i)`: exact on the head, estimated on the tail.

    Each of R samples stands for `rest / R` of the teacher's mass. The share `min(1, q / p)` of it
    is accepted.
    """
    exact = torch.minimum(target.head_logprobs, student.head_logprobs).exp().sum(1)
    if target.tail.logprobs is None:
        return exact
    ratio = (student.tail_logprobs - target.tail.logprobs).clamp_(max=0.0).exp()
    accepted: torch.Tensor = exact + summed(target, tempered(target, 1.0).tail * ratio)
    return accepted


def bits_per_byte(store: StoreReader, loss: float) -> float | None:
    """A mean loss in nats over all labels, in bits per byte of the labels' text.

    Special tokens such as an end of text cost bits and add no byte.
    """
    table = token_bytes_of(store)
    counts = None if table is None else table.counts(store.manifest.tokenizer.size)
    if counts is None:
        return None
    total = sum(counts.of_labels(block.sequences) for block in store.batches(256))
    return loss * store.positions / math.log(2) / total if total else None
