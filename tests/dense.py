"""The obvious way: float64, whole vocabulary, one document at a time. Slow, hard to get wrong."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from coldstill.stages.targets.softmax import StudentSoftmax
from coldstill.stages.targets.tensors import TailTensors, TargetTensors

if TYPE_CHECKING:
    from coldstill.data.schema import Capture, Sequences


def record(
    logits_MV: torch.Tensor, labels_M: torch.Tensor, uniform_M: torch.Tensor, capture: Capture
) -> TargetTensors:
    """What selection should keep, in float64."""
    logprobs_MV = logits_MV.double().log_softmax(1)
    order_MV = logprobs_MV.sort(dim=1, descending=True, stable=True).indices
    head_ids = order_MV[:, : capture.head]
    outside_MV = logprobs_MV.scatter(1, head_ids, -torch.inf)
    tail_ids = torch.stack(
        [
            systematic(outside_V, float(u), capture.tail)
            for outside_V, u in zip(outside_MV, uniform_M, strict=True)
        ]
    )
    norms = [(logprobs_MV / t).logsumexp(1) for t in capture.temperatures]
    return TargetTensors(
        labels=labels_M,
        head_ids=head_ids,
        head_logprobs=logprobs_MV.gather(1, head_ids),
        log_tail=outside_MV.logsumexp(1),
        tail=TailTensors.from_draws(
            tail_ids, logprobs_MV.gather(1, tail_ids) if capture.keeps_tail_logprobs else None
        ),
        label_logprob=logprobs_MV.gather(1, labels_M[:, None])[:, 0],
        entropy=-(logprobs_MV.exp() * logprobs_MV).sum(1),
        log_norm=torch.stack(norms, 1) if norms else logprobs_MV[:, :0],
        capture=capture,
    )


def cast(target: TargetTensors, dtype: torch.dtype) -> TargetTensors:
    """The same with other floating-point numbers."""
    return target.map(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)


def systematic(outside_V: torch.Tensor, shift: float, samples: int) -> torch.Tensor:
    """[R] laying the probabilities end to end, the token found at each of R equal steps."""
    probs = outside_V.exp().tolist()
    total, found = sum(probs), []
    for j in range(samples):
        point, end = (shift + j) / samples * total, 0.0
        for token, p in enumerate(probs):
            end += p
            if p > 0 and end > point:
                found.append(token)
                break
        else:
            found.append(max(token for token, p in enumerate(probs) if p > 0))
    return torch.tensor(found, dtype=torch.long)


def softmax_of(logits_MV: torch.Tensor, target: TargetTensors) -> StudentSoftmax:
    """A student's distribution in the shape that closed forms take."""
    logprobs = logits_MV.log_softmax(1)
    return StudentSoftmax(
        probs_MV=logprobs.exp(),
        head_logprobs=logprobs.gather(1, target.head_ids),
        tail_logprobs=logprobs[target.tail.rows(), target.tail.ids],
        tail_places=target.tail.rows() * logits_MV.shape[1] + target.tail.ids,
        label_logprob=logprobs.gather(1, target.labels[:, None])[:, 0],
        top_logprob=logprobs.amax(1),
        entropy=-(logprobs.exp() * logprobs).sum(1),
    )


def forward_kl(
    teacher_MV: torch.Tensor, student_MV: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """[M] KL(teacher || student) from both sides' whole logits."""
    teacher = (teacher_MV.double() / temperature).log_softmax(1)
    student = (student_MV.double() / temperature).log_softmax(1)
    return (teacher.exp() * (teacher - student)).sum(1)


def cross_entropy(student_MV: torch.Tensor, labels_M: torch.Tensor) -> torch.Tensor:
    """[M] -log q(label)."""
    return -student_MV.double().log_softmax(1)[torch.arange(len(labels_M)), labels_M]


def documents(sequences: Sequences) -> list[tuple[int, int, int]]:
    """Every document of every sequence: its row, first token, and one past its last."""
    found = []
    for row in range(len(sequences)):
        edges = [*sequences.document_starts[row].tolist(), len(sequences.tokens[row])]
        found += [(row, start, end) for start, end in pairwise(edges)]
    return found


def logits_alone(
    model: Any, sequences: Sequences, vocabulary: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits `[M, V]` and labels `[M]` at the supervised positions, each document run by itself."""
    logits, labels = [], []
    for row, start, end in documents(sequences):
        tokens = torch.from_numpy(sequences.tokens[row][start:end].astype(np.int64))
        own = model(input_ids=tokens[None], use_cache=False).logits[0, :, :vocabulary]
        for position in sequences.positions[row].tolist():
            if start <= position < end:
                logits.append(own[position - start])
                labels.append(tokens[position - start + 1])
    return torch.stack(logits), torch.stack(labels)


def calibration_error(probs_MV: torch.Tensor, labels_M: torch.Tensor, bins: int) -> float:
    """Expected calibration error of the most probable token, one bin after the other."""
    error = 0.0
    for index in range(bins):
        inside = []
        for probs, label in zip(probs_MV, labels_M, strict=True):
            confidence, top = probs.max(0)
            if index <= float(confidence) * bins < index + 1 or (
                index == bins - 1 and confidence >= 1
            ):
                inside.append((float(confidence), float(top == label)))
        if inside:
            gap = np.mean([c for c, _ in inside]) - np.mean([right for _, right in inside])
            error += len(inside) / len(labels_M) * abs(float(gap))
    return error


def angle_and_ratio(ours: torch.Tensor, full: torch.Tensor) -> tuple[float, float]:
    """Degrees between two gradients, and how long the first is in terms of the second."""
    cosine = float((ours * full).sum() / (ours.norm() * full.norm()))
    return float(np.degrees(np.arccos(min(1.0, cosine)))), float(ours.norm() / full.norm())
