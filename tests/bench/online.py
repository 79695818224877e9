"""A step from a record against a step with a teacher of eight times the size in the process.

The other side is the usual loop: full logits of teacher and student, and forward KL between them by
autograd. Its memory includes the teacher's weights.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from coldstill.data.schema import Capture
from coldstill.stages.models.device import best_device
from coldstill.stages.models.output_head import OutputHead
from coldstill.stages.targets.losses import LOSSES
from coldstill.stages.training.chunked_loss import Term
from coldstill.stages.training.objective import attach_objective
from measure import Figure, compare_memory, compare_times, write
from student_step import make_batch
from synthetic_store import make_model
from torch.nn import functional

VOCABULARY, BATCH, LENGTH = 32_000, 4, 512
STUDENT, TEACHER = (256, 4), (640, 12)
"""Width and layers: 12.4 and 99 million parameters."""
CAPTURE = Capture()


def main() -> None:
    """Measure time and memory."""
    torch.set_num_threads(2)
    device = best_device()
    student = make_model(VOCABULARY, *STUDENT, LENGTH).to(device)
    teacher = make_model(VOCABULARY, *TEACHER, LENGTH).to(device).eval()
    times = teacher.num_parameters() / student.num_parameters()
    tokens = torch.randint(0, VOCABULARY, (BATCH, LENGTH), device=device)
    own_forward = student.forward

    def online() -> None:
        student.zero_grad()
        student.forward = own_forward
        with torch.no_grad():
            theirs = teacher(input_ids=tokens, use_cache=False).logits[:, :-1].log_softmax(-1)
        ours = student(input_ids=tokens, use_cache=False).logits[:, :-1].log_softmax(-1)
        loss: Any = functional.kl_div(
            ours.flatten(0, 1), theirs.flatten(0, 1), log_target=True, reduction="batchmean"
        )
        loss.backward()

    batch = make_batch(tokens.cpu(), VOCABULARY, CAPTURE).to(device)
    attach_objective(OutputHead(student, VOCABULARY), [Term(LOSSES["kl"], 1.0)])
    distilling: Any = student.forward

    def offline() -> None:
        student.zero_grad()
        student.forward = distilling
        (student(batch)["loss"] / len(batch.targets)).backward()

    name = f"step from a record against one with a teacher {times:.0f} times the student"
    time = compare_times(name, offline, online, repeats=5)
    memory = compare_memory(name, offline, online)
    weights = sum(weight.nbytes for weight in teacher.parameters())
    write("online", [time, _with(memory, weights)])


def _with(memory: Figure, teacher: int) -> Figure:
    baseline = memory.baseline + teacher
    return dataclasses.replace(memory, baseline=baseline, ratio=memory.ours / baseline)


if __name__ == "__main__":
    main()
