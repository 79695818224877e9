"""Held-out loss of a model without a store of targets, and its calibration error."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ...data.alignment import labels
from ...data.errors import ColdstillError
from ..models.inputs import flat_positions
from ..report import Report, Reporter, silent

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from ...data.prepared import SequenceFile
    from ...data.schema import Sequences
    from ..models.inputs import Isolation
    from ..models.output_head import OutputHead

ECE_BINS = 21
"""Equal bins of top-1 confidence (as in Distillation Scaling Laws, arXiv 2502.08606)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationBin:
    """Positions whose top-1 confidence is in one bin."""

    count: int
    confidence: float | None
    """Mean confidence; None for an empty bin."""
    accuracy: float | None
    """Share of positions whose most probable token is the label; None for an empty bin."""


class Calibration:
    """Expected calibration error: mean over bins of |accuracy - confidence|, by position count."""

    def __init__(self) -> None:
        self._count, self._confidence, self._correct = (np.zeros(ECE_BINS) for _ in range(3))

    def add(self, confidence: NDArray[Any], correct: NDArray[Any]) -> None:
        """Add [M] top-1 probabilities, and whether each top-1 token is correct, [M]."""
        bins = np.minimum((confidence * ECE_BINS).astype(np.int64), ECE_BINS - 1)
        self._count += np.bincount(bins, minlength=ECE_BINS)
        self._confidence += np.bincount(bins, weights=confidence, minlength=ECE_BINS)
        self._correct += np.bincount(bins, weights=correct, minlength=ECE_BINS)

    def bins(self) -> tuple[CalibrationBin, ...]:
        """All bins in the order of confidence."""
        sums = zip(self._count, self._confidence, self._correct, strict=True)
        return tuple(
            CalibrationBin(
                count=int(count),
                confidence=float(confidence / count) if count else None,
                accuracy=float(correct / count) if count else None,
            )
            for count, confidence, correct in sums
        )

    def error(self) -> float:
        """Expected calibration error, between 0 and 1."""
        total = self._count.sum()
        return float(np.abs(self._correct - self._confidence).sum() / total) if total else 0.0


@dataclass(frozen=True, slots=True)
class Heldout:
    """Held-out sequences to measure a model on."""

    sequences: SequenceFile
    rows: NDArray[np.int64] | range
    """Indices of sequences in the file, increasing."""
    batch: int
    """Sequences per forward pass."""


@torch.no_grad()
def heldout_loss(
    head: OutputHead,
    heldout: Heldout,
    isolation: Isolation,
    stage: str = "held-out loss",
    report: Reporter = silent,
) -> float:
    """Mean -log p(label) over the supervised positions of held-out sequences, in nats.

    The model runs in its own precision, without dropout.

    Raises
        ColdstillError: no position is supervised, or the loss is NaN or infinite
    """
    rows, batch = heldout.rows, heldout.batch
    training = head.model.training
    head.model.eval()
    blocks = (
        heldout.sequences.read(rows[start : start + batch]) for start in range(0, len(rows), batch)
    )
    total, positions = summed_loss(head, blocks, isolation, len(rows), stage, report)
    head.model.train(training)
    if positions == 0:
        raise ColdstillError(
            f"{stage}: no supervised position in {len(rows)} held-out sequences, so there is "
            "nothing to measure; raise corpus.holdout"
        )
    loss = total / positions
    if not math.isfinite(loss):
        raise ColdstillError(
            f"{stage}: the held-out loss is {loss}, expected a finite number; the weights overflow "
            "in this precision, or training has diverged (lower train.learning_rate)"
        )
    return loss


@torch.no_grad()
def summed_loss(
    head: OutputHead,
    blocks: Iterable[Sequences],
    isolation: Isolation,
    count: int,
    stage: str,
    report: Reporter = silent,
) -> tuple[float, int]:
    """Sum of -log p(label) over the supervised positions of batches, and their number.

    count  number of sequences in all batches, for reports
    """
    total, positions, done = 0.0, 0, 0
    report(Report(stage=stage, total=count, unit="sequences"))
    for block in blocks:
        total -= label_logprobs(head, block, isolation)
        positions += len(block.positions.values)
        done += len(block)
        report(Report(stage=stage, done=done, total=count, step=len(block), unit="sequences"))
    return total, positions


def label_logprobs(head: OutputHead, block: Sequences, isolation: Isolation) -> float:
    """Sum of log p(label) over the supervised positions of a batch.

    Logits are computed for one chunk of positions at a time.
    """
    device = head.model.device
    if not len(block.positions.values):
        return 0.0
    states_BTD = head.read(block, isolation)
    positions = flat_positions(block, states_BTD.shape[1]).to(device)
    hidden_MD = states_BTD.flatten(0, 1)[positions]
    labels_M = torch.from_numpy(labels(block).astype(np.int64)).to(device)
    buffer, weight_VD = head.buffer(len(hidden_MD), device), head.real_weight(hidden_MD.dtype)
    total = torch.zeros((), dtype=torch.float64, device=device)
    for start in range(0, len(hidden_MD), len(buffer)):
        rows = slice(start, start + len(buffer))
        logits_MV = head.logits(hidden_MD[rows], buffer, weight_VD)
        logits_MV.sub_(logits_MV.amax(1, keepdim=True))
        label_M = logits_MV.gather(1, labels_M[rows, None])[:, 0]
        total += (label_M - logits_MV.exp_().sum(1).log_()).double().sum()
    return float(total)
