"""The student's distribution at some positions, made in the memory of its logits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .losses.sparse import StudentSoftmax

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .targets import TargetTensors


def softmax_in_place(
    logits_MV: torch.Tensor, target: TargetTensors
) -> tuple[StudentSoftmax, torch.Tensor]:
    """`softmaxes_in_place` for one target."""
    students, top_ids = softmaxes_in_place(logits_MV, {0: target})
    return students[0], top_ids


def softmaxes_in_place(
    logits_MV: torch.Tensor, targets: Mapping[int, TargetTensors]
) -> tuple[dict[int, StudentSoftmax], torch.Tensor]:
    """Turn logits into probabilities, keeping log-probabilities where the targets need them.

    Also returns `[M]` the most probable token. The normaliser is read off at that token, whose
    probability is never small: `log Z = z_max - log q_max`.
    """
    wanted = [ids for target in targets.values() for ids in (target.head_ids, target.tail_ids)]
    wanted.append(next(iter(targets.values())).labels[:, None])
    chosen = logits_MV.gather(1, torch.cat(wanted, 1))
    top, top_ids = logits_MV.max(1)
    torch.softmax(logits_MV, 1, out=logits_MV)  # row by row, so it may overwrite its input
    log_norm = top - logits_MV.gather(1, top_ids[:, None])[:, 0].log()
    widths = [ids.shape[1] for ids in wanted]
    *logprobs, label = torch.split_with_sizes(chosen - log_norm[:, None], widths, 1)
    students = {
        source: StudentSoftmax(logits_MV, head, tail, label[:, 0])
        for source, head, tail in zip(targets, logprobs[::2], logprobs[1::2], strict=True)
    }
    return students, top_ids
