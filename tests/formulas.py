"""Losses as published, on full distributions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from coldstill.stages.targets.losses import LOSSES
from coldstill.stages.targets.losses.chunks import ChunkLikelihood
from coldstill.stages.targets.losses.partition import JensenShannon, SkewKL, SkewReverseKL

Formula = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""[M] of the teacher's and the student's probabilities, each [M, V], and the labels."""


def divergence(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """[M] KL(p || q); cells with p = 0 add nothing."""
    return torch.where(p > 0, p * (p / q).log(), 0.0 * q).sum(1)


def cross_entropy(p: torch.Tensor, q: torch.Tensor, labels_M: torch.Tensor) -> torch.Tensor:
    return -q[torch.arange(len(q)), labels_M].log()


def skewed(s: float) -> Formula:
    return lambda p, q, _: divergence(p, s * p + (1 - s) * q)


def skewed_reverse(s: float) -> Formula:
    return lambda p, q, _: divergence(q, (1 - s) * p + s * q)


def jensen_shannon(beta: float) -> Formula:
    def formula(p: torch.Tensor, q: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        m = beta * p + (1 - beta) * q
        return beta * divergence(p, m) + (1 - beta) * divergence(q, m)

    return formula


def binarised(tau: float) -> Formula:
    def formula(p: torch.Tensor, q: torch.Tensor, labels_M: torch.Tensor) -> torch.Tensor:
        rows = torch.arange(len(q))
        a, b = p[rows, labels_M] ** (1 / tau), q[rows, labels_M] ** (1 / tau)
        return tau * (a * (a / b).log() + (1 - a) * ((1 - a) / (1 - b)).log())

    return formula


PLAIN: dict[str, tuple[Any, Formula]] = {
    "kl": (LOSSES["kl"], lambda p, q, _: divergence(p, q)),
    "cross_entropy": (LOSSES["cross_entropy"], cross_entropy),
    "reverse_kl": (LOSSES["reverse_kl"], lambda p, q, _: divergence(q, p)),
    "jsd": (LOSSES["jsd"], jensen_shannon(0.5)),
    "jsd at 0": (JensenShannon(0.0), lambda p, q, _: divergence(p, q)),
    "jsd at 0.2": (JensenShannon(0.2), jensen_shannon(0.2)),
    "jsd at 1": (JensenShannon(1.0), lambda p, q, _: divergence(q, p)),
    "total_variation": (LOSSES["total_variation"], lambda p, q, _: (p - q).abs().sum(1) / 2),
    "skew_kl": (LOSSES["skew_kl"], skewed(0.1)),
    "skew_kl at 0": (SkewKL(0.0), skewed(0.0)),
    "skew_kl at 0.7": (SkewKL(0.7), skewed(0.7)),
    "skew_kl at 1": (SkewKL(1.0), skewed(1.0)),
    "skew_reverse_kl": (LOSSES["skew_reverse_kl"], skewed_reverse(0.1)),
    "skew_reverse_kl at 0": (SkewReverseKL(0.0), skewed_reverse(0.0)),
    "skew_reverse_kl at 0.7": (SkewReverseKL(0.7), skewed_reverse(0.7)),
    "skew_reverse_kl at 1": (SkewReverseKL(1.0), skewed_reverse(1.0)),
    "residual_to_label": (LOSSES["residual_to_label"], lambda p, q, _: divergence(p, q)),
    "chunk_likelihood": (LOSSES["chunk_likelihood"], binarised(100.0)),
    "chunk_likelihood at 10": (ChunkLikelihood(10.0), binarised(10.0)),
}
"""Each loss with its formula on full distributions."""
