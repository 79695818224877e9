"""A distillation step against the same model's own cross-entropy step through transformers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from coldstill.data.schema import Capture
from coldstill.stages.chunked_loss import Term
from coldstill.stages.device import best_device
from coldstill.stages.losses import LOSSES
from coldstill.stages.objective import attach_objective
from coldstill.stages.output_head import OutputHead
from measure import Figure, compare_memory, compare_times, write
from transformers import LlamaConfig, LlamaForCausalLM

LAYERS, WIDTH, BATCH, LENGTH = 6, 384, 8, 512
VOCABULARIES = (32_000, 128_256)
HEAD = TAIL = 16


def main() -> None:
    """Measure both vocabularies."""
    torch.set_num_threads(2)
    figures: list[Figure] = []
    for vocabulary in VOCABULARIES:
        figures += _figures(vocabulary)
    write("student_step", figures)


def _figures(vocabulary: int) -> list[Figure]:
    device = best_device()
    model = _model(vocabulary).to(device)
    tokens = torch.randint(0, vocabulary, (BATCH, LENGTH), device=device)
    own_forward = model.forward

    def baseline() -> None:
        model.zero_grad()
        model.forward = own_forward
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()

    capture = Capture(head=HEAD, tail=TAIL)
    terms = [Term(LOSSES["kl"], 0.9), Term(LOSSES["cross_entropy"], 0.1)]
    batch = {key: value.to(device) for key, value in _batch(tokens.cpu(), vocabulary).items()}
    attach_objective(OutputHead(model, vocabulary), terms, capture)
    distilling = model.forward

    def ours() -> None:
        model.zero_grad()
        model.forward = distilling
        (model(**batch)["loss"] / len(batch["labels"])).backward()

    name = f"KL + CE step against transformers CE step, V = {vocabulary:,}"
    return [compare_times(name, ours, baseline, repeats=5), compare_memory(name, ours, baseline)]


def _model(vocabulary: int) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=6,
            max_position_embeddings=LENGTH,
            tie_word_embeddings=True,
        )
    )


def _batch(tokens_BT: torch.Tensor, vocabulary: int) -> dict[str, torch.Tensor]:
    """A record at every position but each sequence's last, as the feed would give it."""
    positions = torch.arange(BATCH * LENGTH).view(BATCH, LENGTH)[:, :-1].flatten()
    count = len(positions)
    random = np.random.default_rng(0)
    ids = torch.from_numpy(random.integers(0, vocabulary, (count, HEAD + TAIL)))
    logprobs = torch.randn(count, HEAD).sort(descending=True).values.log_softmax(1) - 0.2
    return {
        "input_ids": tokens_BT,
        "positions": positions,
        "labels": tokens_BT[:, 1:].flatten(),
        "head_ids": ids[:, :HEAD],
        "head_logprobs": logprobs,
        "log_tail": torch.log1p(-logprobs.exp().sum(1)),
        "tail_ids": ids[:, HEAD:],
        "entropy": torch.full((count,), 2.0),
        "log_norm": torch.zeros(count, 0),
    }


if __name__ == "__main__":
    main()
