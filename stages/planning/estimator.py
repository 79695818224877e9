"""Gradient error of a captured record, compared with the whole distribution.

Compares the gradient of forward KL with respect to the weight of the output head: the sum over
positions of (q - p) h^T with student q, teacher p and hidden state h. This is the exact gradient
for any student's head, and through the head it drives all other gradients of the student.

No student exists when a teacher is captured. The student is therefore replaced by
q = (p + f) / 2, the mean of the teacher and of the token frequencies f, which every student learns
first, with the teacher's hidden states. On a small teacher this reproduces arXiv 2503.16870,
table 3: top-12, 50 and 300, truncated and normalised, are 48, 39 and 20 degrees off and 3.6, 2.2
and 1.3 times as long (paper: 58, 48, 30 degrees; 2.4, 1.8, 1.3); twelve samples are 6.7 degrees off
over 8,000 positions. It also agrees with a trained student: top 12 with a bucket for the rest is 23
degrees off against 24, twelve samples 6.7 against 8.6. A flattened teacher in place of
the student shows no such error (7 and 3), because its tail already has the right shape.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ...data.errors import ColdstillError
from ..capture.selection import select
from ..targets.losses.forward_kl import ForwardKL
from ..targets.softmax import GradientSum, softmax_in_place
from ..targets.tensors import TargetTensors

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ...data.schema import Capture

_KL = ForwardKL()
_WIDTH = 64
"""Wider hidden states are projected to this width. A sum then has V x 64 numbers (33 MB at
V = 128,256), one for each capture and one for the whole distribution. A random projection keeps
inner products on average: compared with width 256, no angle changed by a tenth of its value."""
_CHUNK_ELEMENTS = 1 << 23
"""Logits processed at a time: 32 MB, of which five copies exist at once."""


@dataclass(frozen=True, slots=True)
class EstimatorQuality:
    """Gradient of one capture, compared with the gradient of the whole distribution."""

    capture: Capture
    angle: float
    """Degrees between the two gradients, each summed over all positions. The angle of an unbiased
    record falls with the number of positions; the angle of a biased record does not."""
    norm_ratio: float
    """Length of the summed gradient, relative to that of the whole distribution."""
    relative_error: float
    """Mean squared distance of one position's gradient from the exact one, relative to the mean
    square of the exact one. For samples this is noise, which a batch of B positions divides by
    B."""
    positions: int


class EstimatorMeter:
    """Adds up the gradients of several captures, chunk by chunk."""

    def __init__(self, captures: Sequence[Capture]) -> None:
        self._captures = tuple(captures)
        for capture in self._captures:
            if reason := _KL.refuse(capture, 1.0):
                raise ColdstillError(f"estimator: {reason}")
        self._positions = 0
        self._sums: _Sums | None = None

    @torch.no_grad()
    def add(
        self,
        hidden_MD: torch.Tensor,
        logits_MV: torch.Tensor,
        labels_M: torch.Tensor,
        uniform_M: torch.Tensor,
    ) -> None:
        """Measure M more positions.

        hidden_MD  the teacher's hidden states before its head, any precision
        logits_MV  fp32, real vocabulary only; not changed
        labels_M   int64, the next token of the text
        uniform_M  float64 in [0, 1), one number per position (`data.order.uniform`)
        """
        vocabulary = logits_MV.shape[1]
        if self._sums is None:
            width = hidden_MD.shape[1]
            self._sums = _Sums(len(self._captures), vocabulary, width, logits_MV.device)
        sums = self._sums
        rows = max(1, _CHUNK_ELEMENTS // vocabulary)
        for start in range(0, len(logits_MV), rows):
            part = slice(start, start + rows)
            teacher_MV = logits_MV[part].softmax(1)
            sums.frequencies += teacher_MV.sum(0)
            student_MV = teacher_MV + sums.frequencies / sums.frequencies.sum()
            student_MV.mul_(0.5)
            full_MV = student_MV - teacher_MV
            student_logits = student_MV.log_()
            states_MD = hidden_MD[part].float()
            squares_M = states_MD.square().sum(1)
            narrow_MD = sums.narrow(states_MD)
            sums.add(-1, full_MV, full_MV, narrow_MD, squares_M)
            for index, capture in enumerate(self._captures):
                parts = list(select(logits_MV[part], labels_M[part], uniform_M[part], capture))
                target = TargetTensors.concatenate(parts)
                gradient_MV = _gradient(student_logits.clone(), target)
                sums.add(index, gradient_MV, gradient_MV - full_MV, narrow_MD, squares_M)
        self._positions += len(logits_MV)

    def result(self) -> list[EstimatorQuality]:
        """Figures of each capture, in order."""
        if self._sums is None or self._positions == 0:
            raise ColdstillError("estimator: no position was measured, so there is no gradient")
        *gradients, full = self._sums.gradients
        errors = (self._sums.errors[:-1] / self._sums.errors[-1]).tolist()
        return [
            EstimatorQuality(capture, *_angle_and_ratio(gradient, full), error, self._positions)
            for capture, gradient, error in zip(self._captures, gradients, errors, strict=True)
        ]


def _gradient(logits_MV: torch.Tensor, target: TargetTensors) -> torch.Tensor:
    """[M, V] gradient with respect to the student's logits, as in training. Overwrites the
    logits."""
    student = softmax_in_place(logits_MV, target)
    total = GradientSum({0: student}, {0: target.head_ids})
    total.add(0, 1.0, _KL.gradient(student, target, 1.0))
    return total.write()


class _Sums:
    """Gradients of the output head for each capture; the last is of the whole distribution."""

    def __init__(self, captures: int, vocabulary: int, width: int, device: torch.device) -> None:
        self._projection: torch.Tensor | None = None
        if width > _WIDTH:
            generator = torch.Generator().manual_seed(0)
            matrix = torch.randn(width, _WIDTH, generator=generator) / math.sqrt(_WIDTH)
            self._projection = matrix.to(device)
        self.gradients = torch.zeros(captures + 1, vocabulary, min(width, _WIDTH), device=device)
        self.errors = torch.zeros(captures + 1, dtype=torch.float64, device=device)
        # starts with one uniform position, so that the replaced student never equals the teacher
        self.frequencies = torch.full((vocabulary,), 1.0 / vocabulary, device=device)

    def narrow(self, hidden_MD: torch.Tensor) -> torch.Tensor:
        """[M, at most 64] hidden states, projected if they are wider."""
        return hidden_MD if self._projection is None else hidden_MD @ self._projection

    def add(
        self,
        index: int,
        gradient_MV: torch.Tensor,
        error_MV: torch.Tensor,
        narrow_MD: torch.Tensor,
        squares_M: torch.Tensor,
    ) -> None:
        """Add positions. The square of an outer product is the product of both squares."""
        self.gradients[index].addmm_(gradient_MV.t(), narrow_MD)
        lengths_M = torch.linalg.vecdot(error_MV, error_MV) * squares_M
        self.errors[index] += lengths_M.double().sum()


def _angle_and_ratio(ours: torch.Tensor, full: torch.Tensor) -> tuple[float, float]:
    """Angle in degrees and ratio of lengths. The half-angle form is exact near 0 degrees, where an
    arc cosine loses all digits."""
    tiny = torch.finfo(torch.float32).tiny
    ours_length, full_length = (float(g.norm().clamp(min=tiny)) for g in (ours, full))
    a, b = ours / ours_length, full / full_length
    angle = 2.0 * math.atan2(float((a - b).norm()), float((a + b).norm()))
    return math.degrees(angle), ours_length / full_length
