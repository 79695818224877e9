"""A distillation step against the model's own cross-entropy step in transformers.

The time of the other side depends on the current cost of memory for its full logits. The step is
therefore also compared with its matrix products only, which every exact step needs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from coldstill.data.schema import Capture
from coldstill.stages.models.device import best_device
from coldstill.stages.models.output_head import OutputHead
from coldstill.stages.targets.losses import LOSSES
from coldstill.stages.targets.tensors import TargetTensors
from coldstill.stages.training.chunked_loss import Term
from coldstill.stages.training.feed import Batch
from coldstill.stages.training.objective import attach_objective
from measure import Figure, compare_memory, compare_times, write
from real_teacher import SIZES
from synthetic_store import make_model
from transformers import LlamaConfig, LlamaForCausalLM

LAYERS, WIDTH, BATCH, LENGTH = 6, 384, 8, 512
VOCABULARIES = (32_000, 128_256)
PRUNED = {**SIZES, "intermediate_size": 896}
"""SmolLM2-135M with 896 of its 1,536 neurons, as in the recipe `smollm2`."""


def main() -> None:
    """Measure both vocabularies, and the pruned real model."""
    torch.set_num_threads(2)
    figures: list[Figure] = []
    for vocabulary in VOCABULARIES:
        model = make_model(vocabulary, WIDTH, LAYERS, LENGTH)
        figures += _figures(f"V = {vocabulary:,}", model, Capture(head=16, tail=16), BATCH, LENGTH)
    pruned = LlamaForCausalLM(LlamaConfig(**PRUNED))
    figures += _figures("SmolLM2-135M cut to 75 %", pruned, Capture(), 8, 256)
    write("student_step", figures)


def _figures(what: str, model: Any, capture: Capture, rows: int, length: int) -> list[Figure]:
    device, vocabulary = best_device(), model.config.vocab_size
    model.to(device)
    tokens = torch.randint(0, vocabulary, (rows, length), device=device)
    own_forward = model.forward

    def baseline() -> None:
        model.zero_grad()
        model.forward = own_forward
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()

    terms = [Term(LOSSES["kl"], 0.9), Term(LOSSES["cross_entropy"], 0.1)]
    batch = make_batch(tokens.cpu(), vocabulary, capture).to(device)
    head = OutputHead(model, vocabulary)
    attach_objective(head, terms)
    distilling = model.forward

    def ours() -> None:
        model.zero_grad()
        model.forward = distilling
        (model(batch)["loss"] / len(batch.targets)).backward()

    def products() -> None:
        model.zero_grad()
        states = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
        _head_products(head, states.detach().flatten(0, 1))
        states.sum().backward()

    name = f"KL + CE step against transformers CE step, {what}"
    floor = f"KL + CE step against its matrix products only, {what}"
    return [
        compare_times(name, ours, baseline, repeats=5),
        compare_memory(name, ours, baseline),
        compare_times(floor, ours, products, repeats=5),
    ]


def _head_products(head: OutputHead, states_MD: torch.Tensor) -> None:
    """The products of every exact loss: logits, and the gradients of states and head."""
    weight = head.real_weight(torch.float32)
    assert weight is not None
    buffer = head.buffer(len(states_MD), states_MD.device)
    gradient, total = torch.empty_like(states_MD), torch.zeros_like(weight)
    for start in range(0, len(states_MD), head.chunk):
        states = states_MD[start : start + head.chunk]
        logits = buffer[: len(states)]
        torch.mm(states, weight.t(), out=logits)
        torch.mm(logits, weight, out=gradient[start : start + head.chunk])
        total.addmm_(logits.t(), states)


def make_batch(tokens_BT: torch.Tensor, vocabulary: int, capture: Capture) -> Batch:
    """Made-up targets at every position but the last of each sequence."""
    head, tail = capture.head, capture.tail
    positions = torch.arange(tokens_BT.numel()).view(tokens_BT.shape)[:, :-1].flatten()
    count = len(positions)
    random = np.random.default_rng(0)
    ids = torch.from_numpy(random.integers(0, vocabulary, (count, head + tail)))
    logprobs = torch.randn(count, head).sort(descending=True).values.log_softmax(1) - 0.2
    targets = TargetTensors(
        labels=tokens_BT[:, 1:].flatten(),
        head_ids=ids[:, :head],
        head_logprobs=logprobs,
        log_tail=torch.log1p(-logprobs.exp().sum(1)),
        tail_ids=ids[:, head:],
        label_logprob=torch.zeros(count),
        entropy=torch.full((count,), 2.0),
        log_norm=torch.zeros(count, 0),
        capture=capture,
    )
    return Batch({"input_ids": tokens_BT}, positions, targets, tuple(range(len(tokens_BT))))


if __name__ == "__main__":
    main()
