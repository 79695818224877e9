"""A distillation step against the model's own cross-entropy step in transformers.

The time of the other side depends on the current cost of memory for its full logits. The step is
therefore also compared with its matrix products only, which every exact step needs.
"""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from coldstill.data.schema import Capture, Tail
from coldstill.stages.models.device import best_device
from coldstill.stages.models.output_head import OutputHead
from coldstill.stages.targets.losses import LOSSES
from coldstill.stages.targets.tensors import TailTensors, TargetTensors
from coldstill.stages.training.batch import Batch
from coldstill.stages.training.chunked_loss import Term
from coldstill.stages.training.objective import attach_objective
from measure import Figure, compare_memory, compare_times, write
from real_teacher import SIZES
from synthetic_store import likely_draws, make_model
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

if TYPE_CHECKING:
    from collections.abc import Callable

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
        figures += step_figures(
            f"V = {vocabulary:,}", model, Capture(head=16, tail=16), BATCH, LENGTH
        )
    pruned = LlamaForCausalLM(LlamaConfig(**PRUNED))
    figures += step_figures("SmolLM2-135M cut to 75 %", pruned, Capture(), 8, 256)
    write("student_step", figures)


def step_figures(
    what: str,
    model: Any,
    capture: Capture,
    rows: int,
    length: int,
    *,
    precision: torch.dtype | None = None,
    repeats: int = 5,
) -> list[Figure]:
    """Time and memory of a step against those of the model's own step.

    precision  of matrix products, by autocast; then fused heads are compared too, where installed
    """
    device, vocabulary = best_device(), model.config.vocab_size
    model.to(device)
    tokens = torch.randint(0, vocabulary, (rows, length), device=device)
    own_forward = model.forward

    def products_in() -> Any:
        if precision is None:
            return contextlib.nullcontext()
        return torch.autocast(device.type, dtype=precision)

    def baseline() -> None:
        model.zero_grad()
        model.forward = own_forward
        with products_in():
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()

    def fused(head: FusedHead) -> None:
        model.zero_grad()
        weight = model.get_output_embeddings().weight
        with products_in():
            states = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
            states = states[:, :-1].flatten(0, 1).to(precision)
            loss = head(states, weight.to(precision), tokens[:, 1:].flatten())
        loss.backward()

    terms = [Term(LOSSES["kl"], 0.9), Term(LOSSES["cross_entropy"], 0.1)]
    batch = make_batch(tokens.cpu(), vocabulary, capture).to(device)
    head = OutputHead(model, vocabulary)
    attach_objective(head, terms)
    distilling = model.forward

    def ours() -> None:
        model.zero_grad()
        model.forward = distilling
        with products_in():
            loss = model(batch)["loss"]
        (loss / len(batch.targets)).backward()

    def products() -> None:
        model.zero_grad()
        states = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
        _head_products(head, states.detach().flatten(0, 1))
        states.sum().backward()

    name = f"KL + CE step against transformers CE step, {what}"
    found = [
        compare_times(name, ours, baseline, repeats=repeats),
        compare_memory(name, ours, baseline),
    ]
    if precision is None:
        floor = f"KL + CE step against its matrix products only, {what}"
        return [*found, compare_times(floor, ours, products, repeats=repeats)]
    for library, other in fused_heads().items():
        name = f"KL + CE step against {library} CE step, {what}"
        found.append(compare_times(name, ours, functools.partial(fused, other), repeats=repeats))
        found.append(compare_memory(name, ours, functools.partial(fused, other)))
    return found


if TYPE_CHECKING:
    FusedHead = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Any]


def fused_heads() -> dict[str, FusedHead]:
    """Heads of other projects that compute cross-entropy from states `[M, D]`, the head's weight
    `[V, D]` and labels `[M]`, without keeping all logits. Those that are installed."""
    found: dict[str, FusedHead] = {}
    with contextlib.suppress(AttributeError):  # PyTorch before 2.13
        chunked = torch.nn.LinearCrossEntropyOptions()
        found["PyTorch's chunked"] = functools.partial(
            functional.linear_cross_entropy, options=chunked
        )
    with contextlib.suppress(ImportError):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss()
        found["Liger"] = lambda states, weight, labels: liger(weight, states, labels)
    with contextlib.suppress(ImportError):
        from cut_cross_entropy import linear_cross_entropy

        found["cut-cross-entropy"] = linear_cross_entropy
    return found


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
    head_ids = random.integers(0, vocabulary, (count, head))
    draws = likely_draws(random, vocabulary, count, tail)
    logprobs = torch.randn(count, head).sort(descending=True).values.log_softmax(1) - 0.2
    targets = TargetTensors(
        labels=tokens_BT[:, 1:].flatten(),
        head_ids=torch.from_numpy(head_ids),
        head_logprobs=logprobs,
        log_tail=torch.log1p(-logprobs.exp().sum(1)),
        tail=TailTensors.from_tail(Tail.from_draws(draws)),
        label_logprob=torch.zeros(count),
        entropy=torch.full((count,), 2.0),
        log_norm=torch.zeros(count, 0),
        capture=capture,
    )
    return Batch({"input_ids": tokens_BT}, positions, targets, tuple(range(len(tokens_BT))))


if __name__ == "__main__":
    main()
