"""Stage one against the bare forward pass of the same model over the same batches."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from coldstill.data.packing import TokenizedDocument, build_sequences
from coldstill.data.schema import Capture
from coldstill.stages.device import best_device
from coldstill.stages.isolation import model_inputs
from coldstill.stages.output_head import OutputHead
from coldstill.stages.teacher_logits import capture_batch
from measure import Figure, compare_memory, compare_times, write
from transformers import GPT2Config, GPT2LMHeadModel

VOCABULARY, BATCH, LENGTH = 50_257, 4, 512
CAPTURES = ((64, 0), (0, 24), (16, 16))


def main() -> None:
    """Measure a model of GPT-2-small's shape."""
    torch.set_num_threads(2)
    torch.manual_seed(0)
    model: Any = GPT2LMHeadModel(GPT2Config()).eval().to(best_device())
    random = np.random.default_rng(0)
    documents = [
        [
            TokenizedDocument(
                i,
                random.integers(0, VOCABULARY, LENGTH).astype(np.int32),
                np.ones(LENGTH, np.bool_),
            )
        ]
        for i in range(BATCH)
    ]
    sequences = build_sequences(0, documents)
    inputs = model_inputs(sequences, "positions", model.dtype)
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    head = OutputHead(model, VOCABULARY)
    buffer = head.buffer(BATCH * LENGTH, model.device)

    @torch.no_grad()
    def baseline() -> None:
        model(**inputs, use_cache=False)

    figures: list[Figure] = []
    for k, r in CAPTURES:
        capture = Capture(head=k, tail=r)

        def ours(capture: Capture = capture) -> None:
            capture_batch(head, sequences, "positions", capture, buffer)

        def ours_from_nothing(capture: Capture = capture) -> None:
            own = head.buffer(BATCH * LENGTH, model.device)
            capture_batch(head, sequences, "positions", capture, own)

        name = f"stage one against bare forward, GPT-2 small, ({k}, {r})"
        figures.append(compare_times(name, ours, baseline, repeats=5))
        if (k, r) == CAPTURES[-1]:
            figures.append(compare_memory(name, ours_from_nothing, baseline))
    write("teacher_forward", figures)


if __name__ == "__main__":
    main()
